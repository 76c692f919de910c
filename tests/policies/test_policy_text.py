"""Policies as text: what is written is what is built, and what is wrong is named."""

import sys
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies import (
    POLICIES,
    ByContext,
    ByHeads,
    ByLayer,
    Full,
    InfLLM,
    OffloadAll,
    Policy,
    Quest,
    RetrievalAttention,
    ShadowKV,
    SinkWindow,
    SnapKV,
    SqueezedAttention,
    describe,
    parse_policy,
)
from policies.text import parse

SHARES = st.floats(1e-6, 1, allow_subnormal=False)
NUMBERS = st.integers(1, 10**6)
LEAVES: st.SearchStrategy[Policy] = st.one_of(
    st.just(Full()),
    st.builds(OffloadAll, staging_layers=NUMBERS, write_back=st.sampled_from(["new", "all"])),
    st.builds(SinkWindow, sink_tokens=st.integers(0, 100), positions=st.sampled_from(["slot", "original"])),
    st.builds(SnapKV, budget_tokens=st.integers(36, 10**6), per=st.sampled_from(["kv_head", "query_head"])),
    st.builds(
        lambda pages, page, sinks: Quest(budget_tokens=(sinks + 1 + pages) * page, page_tokens=page, sink_tokens=sinks),
        NUMBERS,
        NUMBERS,
        st.integers(0, 100),
    ),
    st.builds(InfLLM, sink_tokens=NUMBERS, window_tokens=NUMBERS, top_k=st.integers(1, 32)),
    st.builds(SqueezedAttention, keep=SHARES, budget_tokens=st.none() | NUMBERS, tier=st.sampled_from(["hbm", "ddr"])),
    st.builds(ShadowKV, rank=NUMBERS, outlier_chunks=st.none() | st.integers(0, 100)),
    st.builds(RetrievalAttention, scanned=SHARES, index=st.sampled_from(["graph", "ivf", "flat"])),
)
HEADS = st.lists(st.tuples(st.integers(1, 8), LEAVES), min_size=2, max_size=3).map(lambda p: ByHeads(parts=tuple(p)))


def on_layers(first: int, more: int, policy: Policy, rest: Policy) -> Policy:
    # As text has no parentheses, one list of layers followed by another is one list.
    return rest if isinstance(rest, ByLayer) else ByLayer(parts=((first, first + more, policy),), otherwise=rest)


RESTS = st.recursive(
    LEAVES,
    lambda rest: st.one_of(
        st.builds(ByContext, below_tokens=NUMBERS, short=LEAVES, long=rest),
        st.builds(on_layers, NUMBERS, NUMBERS, LEAVES, rest),
    ),
    max_leaves=3,
)


@given(policy=st.one_of(LEAVES, HEADS, RESTS))
def test_what_is_described_parses_to_the_same(policy: Policy) -> None:
    assert parse_policy(describe(policy)) == policy


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("full", Full()),
        (" quest ", Quest()),
        ("shadowkv:budget_tokens=2k,chunk_tokens=8", ShadowKV(budget_tokens=2000)),
        ("shadowkv:budget_tokens=2Ki, rank=64", ShadowKV(rank=64)),
        ("infllm:window_tokens=1Mi", InfLLM(window_tokens=2**20)),
        ("infllm:window_tokens=1M", InfLLM(window_tokens=10**6)),
        ("squeezed-attention:keep=0.2,budget_tokens=none", SqueezedAttention(keep=0.2)),
        ("shadowkv:outlier_chunks=0", ShadowKV(outlier_chunks=0)),
        ("full@layers=0-1+shadowkv", ByLayer(parts=((0, 1, Full()),), otherwise=ShadowKV())),
        ("full@layers=5+quest", ByLayer(parts=((5, 5, Full()),), otherwise=Quest())),
        (
            "full@layers=0-1+quest@layers=2-3+shadowkv",
            ByLayer(parts=((0, 1, Full()), (2, 3, Quest())), otherwise=ShadowKV()),
        ),
        ("full@below=8k+shadowkv", ByContext(below_tokens=8000, short=Full(), long=ShadowKV())),
        (
            "full@below=8k+full@layers=0-1+quest",
            ByContext(below_tokens=8000, short=Full(), long=ByLayer(parts=((0, 1, Full()),), otherwise=Quest())),
        ),
        ("full@heads=2+sink-window@heads=6", ByHeads(parts=((2, Full()), (6, SinkWindow())))),
    ],
)
def test_texts(text: str, policy: Policy) -> None:
    assert parse_policy(text) == policy


def test_the_shortest_text_leaves_defaults_out() -> None:
    assert describe(ShadowKV(budget_tokens=2048, rank=64)) == "shadowkv:rank=64"
    assert describe(Full()) == "full"
    assert describe(ByLayer(parts=((0, 1, Full()),), otherwise=Quest())) == "full@layers=0-1+quest"


COMPOSE = "the last part, for the rest, has no selector"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shadwkv", r"unknown policy 'shadwkv'; did you mean 'shadowkv'\? known: shadowkv, .*full"),
        ("zzz", "unknown policy 'zzz'; known: "),
        ("", "unknown policy ''; known: "),
        ("quest+", "unknown policy ''; known: "),
        ("shadwkv:rank=5", r"unknown policy 'shadwkv'; did you mean 'shadowkv'\?"),
        (":Full", "unknown policy ''; known: "),
        (".x:Full", "unknown policy '.x'; known: "),
        ("full:rank=5", "unknown parameter of full 'rank'; none is known"),
        (
            "shadowkv:budget=5",
            r"unknown parameter of shadowkv 'budget'; did you mean 'budget_tokens'\? known: budget_t",
        ),
        ("shadowkv:rank", "policy 'shadowkv:rank': 'rank' must be key=value"),
        ("shadowkv:rank=5,rank=6", "policy 'shadowkv:rank=5,rank=6': rank is given twice"),
        ("shadowkv:rank=big", "shadowkv: rank='big' is not a whole number such as 2048, 2k or 2Ki"),
        ("shadowkv:rank=", "shadowkv: rank='' is not a whole number"),
        ("shadowkv:rank=1.5k", "shadowkv: rank='1.5k' is not a whole number"),
        ("shadowkv:rank=2ki", "shadowkv: rank='2ki' is not a whole number"),
        ("shadowkv:rank=none", "shadowkv: rank='none' is not a whole number"),
        ("squeezed-attention:keep=most", "squeezed-attention: keep='most' is not a number"),
        ("squeezed-attention:keep=inf", "squeezed-attention: keep='inf' is not finite"),
        ("squeezed-attention:keep=nan", "squeezed-attention: keep='nan' is not finite"),
        ("full@layers=0-1", COMPOSE),
        ("full@heads=2+quest", COMPOSE),
        ("full@layers=0+quest@heads=2", COMPOSE),
        ("full+quest", COMPOSE),
        ("full@+quest", COMPOSE),
        ("full@", COMPOSE),
        ("full@tenants=2+quest", COMPOSE),
        ("full@layers=+quest", "full@layers='' is not a whole number"),
        ("full@layers=1-+quest", "full@layers='' is not a whole number"),
        ("full@below=soon+quest", "full@below='soon' is not a whole number"),
        ("full@heads=two+quest@heads=6", "full@heads='two' is not a whole number"),
        ("full@layers=0-3+full@layers=2-4+quest", "layers=2-4 of full overlap layers=0-3 of full"),
        ("nowhere.at_all:Lazy", "policy nowhere.at_all:Lazy: cannot import 'nowhere.at_all' .*is it on PYTHONPATH"),
        ("math:pi", "policy math:pi: 'pi' in 'math' is not a subclass of policies.Policy"),
        ("math:Lazy", "policy math:Lazy: 'Lazy' in 'math' is not a subclass of policies.Policy"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_policy(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("offload-all:staging_layers=0", "offload-all: staging_layers=0 must be at least 1"),
        ("offload-all:write_back=none", "offload-all: write_back='none' must be one of new, all"),
        ("sink-window:window_tokens=0", "sink-window: window_tokens=0 must be at least 1"),
        ("sink-window:positions=far", "sink-window: positions='far' must be one of slot, original"),
        ("snapkv:budget_tokens=32", "snapkv: budget_tokens=32 must be at least 36"),
        (
            "quest:budget_tokens=32",
            "quest: budget_tokens=32 must hold the last page and the 2 that sink_tokens=4 can lie on",
        ),
        ("lococo:sink_tokens=257", "lococo: sink_tokens=257 exceeds the half of memory_tokens=512"),
        ("landmark:sink_tokens=300", "landmark: top_k=5 must be at least 6"),
        ("locret:sink_tokens=6001", "locret: sink_tokens=6001 must fit budget_tokens=6000"),
        ("snapkv:kernel_tokens=4", "snapkv: kernel_tokens=4 must be odd"),
        ("snapkv:pooling=mean", "snapkv: pooling='mean' must be one of average, max"),
        ("quest:budget_tokens=100", "quest: budget_tokens=100 is not a multiple of page_tokens=16; use 96 or 112"),
        ("quest:budget_tokens=5", "quest: budget_tokens=5 is not a multiple of page_tokens=16; use 16"),
        (
            "shadowkv:budget_tokens=100",
            "shadowkv: budget_tokens=100 is not a multiple of chunk_tokens=8; use 96 or 104",
        ),
        ("shadowkv:outlier_chunks=-1", "shadowkv: outlier_chunks=-1 must be at least 0"),
        ("infllm:top_k=64", "infllm: cache_blocks=32 is below top_k=64, .*use cache_blocks=64 or more"),
        (
            "infllm:representative_tokens=200",
            "infllm: representative_tokens=200 exceeds block_tokens=128; use 128 or f",
        ),
        (
            "infllm:block_tokens=100",
            "infllm: execution_tokens=512 is not a multiple of block_tokens=100; use 500 or 600",
        ),
        ("squeezed-attention:keep=0", "squeezed-attention: keep=0.0 must be above 0 and at most 1"),
        ("squeezed-attention:levels=3", "squeezed-attention: levels=3 must be 1 or 2"),
        ("squeezed-attention:tier=nvme", "squeezed-attention: tier='nvme' must be one of hbm, ddr"),
        ("squeezed-attention:budget_tokens=0", "squeezed-attention: budget_tokens=0 must be at least 1"),
        (
            "squeezed-attention:levels=2,coarse_share=0.05",
            "squeezed-attention: coarse_share=0.05 must be below centroid_share=0.05",
        ),
        ("retrieval-attention:index=tree", "retrieval-attention: index='tree' must be one of graph, ivf, flat"),
        ("retrieval-attention:scanned=1.5", "retrieval-attention: scanned=1.5 must be above 0 and at most 1"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_policy(text)


def test_a_parameter_of_the_wrong_type_is_refused() -> None:
    wrong: Any = 2.5
    with pytest.raises(ValueError, match=r"shadowkv: rank=2\.5 is not a whole number"):
        ShadowKV(rank=wrong)
    with pytest.raises(ValueError, match="squeezed-attention: keep=True must be above 0"):
        SqueezedAttention(keep=True)


OUTSIDE = """
from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Optional

from policies import Full


@dataclass(frozen=True, slots=True, kw_only=True)
class Lazy(Full):
    name: ClassVar[str] = "lazy"

    every: int
    share: float = 0.5
    limit: Optional[int] = 7
    eager: bool = False
    note: str = field(default_factory=str)
"""


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> type[Policy]:
    """A policy from a module outside the project, with annotations that are strings."""
    module = ModuleType("my_policies")
    monkeypatch.setitem(sys.modules, "my_policies", module)
    exec(compile(OUTSIDE, "my_policies.py", "exec"), module.__dict__)  # noqa: S102
    cls: type[Policy] = module.Lazy  # type: ignore[attr-defined]
    return cls


def test_a_policy_may_come_from_outside(outside: type[Policy]) -> None:
    lazy = parse_policy("my_policies:Lazy:every=2k,limit=none,eager=true,note=b")
    assert lazy == outside(every=2000, limit=None, eager=True, note="b")  # type: ignore[call-arg]
    assert describe(lazy) == "my_policies:Lazy:every=2000,limit=None,eager=True,note=b"
    assert parse_policy(describe(lazy)) == lazy
    with pytest.raises(ValueError, match="policy 'my_policies:Lazy' needs every"):
        parse_policy("my_policies:Lazy")
    with pytest.raises(ValueError, match="eager='maybe' must be true or false"):
        parse_policy("my_policies:Lazy:every=1,eager=maybe")


def test_no_text_says_a_composition_within_a_part() -> None:
    layers = ByLayer(parts=((0, 1, Full()),), otherwise=Quest())
    heads = ByHeads(parts=((2, Full()), (6, Quest())))
    for policy, inner in (
        (ByContext(below_tokens=10, short=layers, long=Full()), "by-layer"),
        (ByContext(below_tokens=10, short=Full(), long=heads), "by-heads"),
        (ByLayer(parts=((0, 1, heads),), otherwise=Full()), "by-heads"),
        (ByLayer(parts=((0, 5, Full()),), otherwise=layers), "by-layer"),
    ):
        with pytest.raises(ValueError, match=f"no text describes {inner} within a part of another composition"):
            describe(policy)


def test_names_come_from_the_caller() -> None:
    with pytest.raises(ValueError, match="unknown policy 'full'; none is known"):
        parse("full", {})
    assert parse("dense", {"dense": Full}) == Full()
    assert list(POLICIES) == [
        *("full", "offload-all", "sink-window", "snapkv", "quest", "infllm"),
        *("squeezed-attention", "shadowkv", "retrieval-attention"),
        *("retroinfer", "locret", "lazyllm", "xattention", "hip", "lococo", "landmark"),
    ]
