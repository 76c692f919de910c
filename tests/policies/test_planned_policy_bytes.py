"""Bytes and FLOPs, by hand, of the policies that are planned and not executed, and where each is exact.

Llama-3.1-8B: 32 layers, 32 query heads over 8 KV heads of 128 in bf16: a key or a value of all KV heads has 2,048
bytes, a token 4,096 per layer, and a query-key pair costs 16,384 FLOPs. Llama-2-7B has 32 KV heads: 16,384 bytes.
"""

from collections import Counter
from collections.abc import Callable

import pytest

from kvsim.models import load_model
from kvsim.plans.plan_tree import plan_text
from policies import LayerPlan, ModelShape, Reuse, Step, parse_policy, plan_layer, reuse_of
from policies.plan import Compute, Rows, Tier, flops, moved_bytes, stored_bytes

LLAMA = load_model("llama-3.1-8b")
MHA = load_model("llama-2-7b")
GIB = 2**30
CONTEXT = 131_072
KEY, KV, PAIR = 2048, 4096, 16384
UP, DOWN = (Tier.DDR, Tier.HBM), (Tier.HBM, Tier.DDR)


def whole(prompt_tokens: int) -> Step:
    return Step(prompt_tokens=prompt_tokens, past_tokens=0, new_tokens=prompt_tokens)


def planned(text: str, step: Step, model: ModelShape = LLAMA, layer: int = 5) -> LayerPlan:
    return plan_layer(parse_policy(text), model, step, layer)


def expected(plan: LayerPlan) -> dict[str, int]:
    return {count.name: count.expected() for count in plan.counts}


def moved(plan: LayerPlan, **totals: int) -> Counter[tuple[Tier, Tier]]:
    return moved_bytes(plan.ops, plan.buffers, expected(plan) | totals)


def work(plan: LayerPlan, *names: str, **totals: int) -> int:
    return flops(tuple(op for op in plan.ops if op.name in names), expected(plan) | totals)


def held(plan: LayerPlan, *names: str) -> int:
    return sum(buffer.nbytes for buffer in plan.buffers if buffer.name in names)


def stored(text: str, step: Step) -> Counter[Tier]:
    return stored_bytes([planned(text, step, layer=layer).buffers for layer in range(32)])


def rows_of(plan: LayerPlan, name: str) -> Rows:
    op = next(op for op in plan.ops if op.name == name)
    assert isinstance(op, Compute)
    return op.rows


# Locret


def by_hand(pairs_of: Callable[[int], int], first: int, last: int) -> int:
    """The query-key pairs of tokens first..last - 1, token by token."""
    return sum(pairs_of(position) for position in range(first, last))


@pytest.mark.parametrize("prompt", [6101, 9316, 20_000, 30_820])
@pytest.mark.parametrize("past", [0, 3000, 6000])
def test_locret_attends_to_budget_and_chunk(prompt: int, past: int) -> None:
    scored = prompt - 100

    def pairs(position: int) -> int:
        if position >= scored:
            return min(scored, 6000) + position - scored + 1
        return min(position // 3072 * 3072, 6000) + position % 3072 + 1

    plan = planned("locret", Step(prompt_tokens=prompt, past_tokens=past, new_tokens=prompt - past))
    assert work(plan, "attend") == PAIR * by_hand(pairs, past, prompt)


def test_locret_keeps_the_budget() -> None:
    # The retaining head: 32 + 8 + 8 heads of 128 to 1,024 to 8 scores.
    params = 48 * 128 * 1024 + 1024 * 8
    prefill = planned("locret", whole(30_820))
    assert work(prefill, "retain") == 30_820 * 2 * params
    assert held(prefill, "retaining_head") == 2 * params
    # 30,720 scored tokens are ten chunks; the first ends within the budget of 6,000: nine evict.
    assert rows_of(prefill, "select").fixed == 8 * 9 * (6000 + 3072)
    step = Step.decoding(30_820, 7)
    plan = planned("locret", step)
    assert held(plan, "keys", "values") == (6000 + 100 + 7) * KV
    assert held(plan, "importance") == (6000 + 100 + 7) * 8 * 2
    assert work(plan, "attend") == PAIR * 6107
    assert stored("locret", step) == {Tier.HBM: 32 * 6107 * (KV + 16)}
    assert moved(plan) == {}


def test_locret_with_room_for_the_prompt_is_dense() -> None:
    for step in (whole(6100), Step.decoding(6100, 3)):
        assert planned("locret", step) == planned("full", step)


# LazyLLM


def test_lazyllm_computes_fewer_tokens_at_depth() -> None:
    kept = {0: 4000, 8: 3000, 16: 2000, 24: 1200}  # 100, 75, 50 and 30 % from each quarter of 32 layers on
    for layer, tokens in kept.items():
        plan = planned("lazyllm", whole(4000), layer=layer)
        assert work(plan, "attend") == PAIR * tokens * (tokens + 1) // 2
        decode = planned("lazyllm", Step.decoding(4000, 1), layer=layer)
        assert work(decode, "attend") == PAIR * (tokens + 1)
    # The share of the prompt's tokens that all layers together compute: 1 + 0.75 + 0.5 + 0.3 over 4.
    assert sum(kept.values()) / (4 * 4000) == pytest.approx(0.64, abs=0.005)
    # Where a quarter begins, the states of what it lacks stay behind: 4,096 values of 2 bytes each.
    lost = {layer: held(planned("lazyllm", Step.decoding(4000, 1), layer=layer), "hidden") for layer in range(32)}
    assert {layer: n for layer, n in lost.items() if n} == {8: 1000 * 8192, 16: 1000 * 8192, 24: 800 * 8192}


def test_lazyllm_revives_what_a_step_wants() -> None:
    plan = planned("lazyllm", Step.decoding(4000, 1), layer=24)
    (count,) = plan.counts
    assert (count.name, count.maximum) == ("revive", 2800)
    layer = LLAMA.layers[24]
    assert work(plan, "revive", revive=5) == 5 * 2 * (layer.qkv_params + layer.out_params + layer.mlp_params)


def test_lazyllm_that_keeps_all_is_dense() -> None:
    for step in (whole(4000), Step(prompt_tokens=4000, past_tokens=1000, new_tokens=500), Step.decoding(4000, 9)):
        lazy, dense = planned("lazyllm:keep_2=1,keep_3=1,keep_4=1", step, layer=30), planned("full", step)
        assert work(lazy, "attend") == work(dense, "attend")
        assert stored_bytes([lazy.buffers]) == stored_bytes([dense.buffers])


# XAttention


@pytest.mark.parametrize("stride", [4, 8, 16])
def test_xattention_scores_at_a_share_of_dense_attention(stride: int) -> None:
    n = CONTEXT
    plan = planned(f"xattention:stride_tokens={stride}", whole(n))
    squares = n // stride
    assert work(plan, "score") == squares * (squares + 1) // 2 * 2 * 32 * stride * 128
    # 1 / (2 * stride) of dense attention: 12.5, 6.25 and 3.1 %.
    assert work(plan, "score") / (PAIR * n * n / 2) == pytest.approx(1 / (2 * stride), rel=1e-3)


def test_xattention_always_computes_sink_and_diagonal() -> None:
    n = 1000  # seven whole blocks of 128 and 104 tokens
    plan = planned("xattention", whole(n))
    diagonal = 7 * 128 * 129 // 2 + 104 * 105 // 2
    first = (n - 128) * 128
    assert work(plan, "attend", kept=0) == PAIR * (diagonal + first)
    # Between them lie whole blocks of 128 x 128 (0 + 0 + 1 + 2 + .. + 5 of the seven) and 6 of 104 x 128.
    between = n * (n + 1) // 2 - diagonal - first
    assert between == (1 + 2 + 3 + 4 + 5) * 128**2 + 6 * 104 * 128
    assert plan.counts[0].maximum == between // 128**2
    assert held(plan, "masses") == 32 * 8 * 8 * 4


def test_xattention_with_every_block_is_dense() -> None:
    n = 128 * 40
    everything = planned("xattention", whole(n))
    most = {count.name: count.heads * count.maximum for count in everything.counts}
    assert work(everything, "attend", **most) == work(planned("full", whole(n)), "attend")
    assert planned("xattention:threshold=1", whole(n)).ops == planned("full", whole(n)).ops
    assert planned("xattention", Step.decoding(n, 4)).ops == planned("full", Step.decoding(n, 4)).ops


# HiP


def test_hip_searches_by_halving() -> None:
    plan = planned("hip", Step.decoding(CONTEXT - 1, 1))
    n = CONTEXT - 256 - 1024
    assert -(-n // 256) == 507
    # Chunks x halvings x 2 keys, for each query head: 507 x 9, 1,024 x 6 and 1,024 x 4 times two.
    assert rows_of(plan, "stage_1").fixed == 32 * 507 * 9 * 2
    assert rows_of(plan, "stage_2").fixed == 32 * 1024 * 6 * 2
    assert rows_of(plan, "stage_3").fixed == 32 * 1024 * 4 * 2
    assert work(plan, "attend") == PAIR * (256 + 2048 + 1024)
    assert held(plan, "keys", "values") == CONTEXT * KV
    assert held(plan, "ids_1", "ids_2", "ids_3") == 32 * (1024 + 1024 + 256) * 4


def test_hip_refreshes_its_stages_every_32_16_and_8_steps() -> None:
    due = {
        t: tuple(op.name[-1] for op in planned("hip", Step.decoding(20_000, t)).ops if op.name.startswith("stage"))
        for t in range(1, 66)
    }
    assert {t: stages for t, stages in due.items() if stages} == {
        **dict.fromkeys((1, 33, 65), ("1", "2", "3")),
        **dict.fromkeys((17, 49), ("2", "3")),
        **dict.fromkeys((9, 25, 41, 57), ("3",)),
    }


def test_hip_reads_what_any_head_of_a_group_chose() -> None:
    near, chosen = 1280, 2048
    plan = planned("hip", Step.decoding(20_000, 2))
    reads = next(op for op in plan.ops if op.name == "attend").reads  # type: ignore[union-attr]
    keys = next(access for access in reads if access.buffer == "keys")
    assert keys.rows.at({"added": 0}) == 8 * (near + chosen)
    assert keys.rows.at({"added": 3}) == 8 * (near + chosen) + 3 * 8
    assert planned("hip", Step.decoding(20_000, 2), MHA).counts == ()


def test_hip_that_chooses_all_candidates_is_dense() -> None:
    text = "hip:top_k=32768,tokens_3=32768"  # sinks, window and 32,768 cover 34,048 tokens
    for step in (whole(34_048), Step.decoding(34_048, 1)):
        assert planned(text, step) == planned("full", step)
    step = whole(34_049)
    missing = work(planned("full", step), "attend") - work(planned(text, step), "attend")
    assert missing == PAIR  # of the last query, one pair


# LoCoCo


@pytest.mark.parametrize("text", ["lococo", "lococo:memory_tokens=128,chunk_tokens=100,buffer_tokens=8"])
@pytest.mark.parametrize("prompt", [530, 1024, 1025, 5000])
def test_lococo_is_a_cache_that_merges_when_it_is_full(text: str, prompt: int) -> None:
    policy = parse_policy(text)
    memory, chunk = policy.memory_tokens, policy.chunk_tokens  # type: ignore[attr-defined]
    full = memory + policy.buffer_tokens  # type: ignore[attr-defined]
    cached, pairs, merges = 0, 0, 0
    for first in range(0, prompt, chunk):
        if cached > full:
            cached, merges = memory, merges + 1
        new = min(chunk, prompt - first)
        pairs += new * cached + new * (new + 1) // 2
        cached += new
    plan = planned(text, whole(prompt))
    assert work(plan, "attend") == PAIR * pairs
    half, others = memory // 2, memory + chunk - memory // 2
    # For each other token and slot: a kernel of 21 over keys and values of 128, and mixing both.
    per_merge = 8 * others * half * 256 * 2 * (21 + 1)
    assert work(plan, "merge") == merges * per_merge
    for generated in range(1, 60):
        length, merged = cached, cached > full
        cached = (memory if merged else cached) + 1
        step = planned(text, Step.decoding(prompt, generated))
        assert work(step, "attend") == PAIR * cached, generated
        assert work(step, "merge") == (8 * (length - half) * half * 256 * 44 if merged else 0), generated


def test_lococo_holds_slots_buffer_and_chunk() -> None:
    plan = planned("lococo", Step.decoding(CONTEXT, 1))
    assert held(plan, "keys", "values") == (512 + 16 + 512) * KV
    assert held(plan, "kernels") == 2 * (256 * (256 * 21 + 1) + 1)
    for step in (whole(528), Step.decoding(528, 2)):  # never merged
        assert planned("lococo", step) == planned("full", step)


# Landmark


def test_landmark_decode() -> None:
    step = Step.decoding(10_020, 11)  # 10,030 tokens before it: 200 closed blocks and 30 tokens, and its own
    plan = planned("landmark", step, MHA)
    key, token = 32 * 128 * 2, 2 * 32 * 128 * 2
    assert held(plan, "landmarks") == 200 * key
    assert held(plan, "blocks") == 200 * 51 * token
    assert held(plan, "local") == 31 * token
    assert work(plan, "score") == 2 * 32 * 128 * 200
    assert work(plan, "attend_near") == 4 * 32 * 128 * 31
    assert work(plan, "attend") == 4 * 32 * 128 * 5 * 51
    # Each of 32 heads has its own 5 blocks of 51 keys and values.
    assert moved(plan) == {UP: 32 * 5 * 51 * 2 * 128 * 2, DOWN: 32 * 5 * 8}


def test_landmark_closes_a_block_every_50_tokens() -> None:
    closing = [
        t for t in range(1, 160) if "close" in [op.name for op in planned("landmark", Step.decoding(1000, t)).ops]
    ]
    assert closing == [50, 100, 150]
    due = planned("landmark", Step.decoding(1000, 50))
    assert moved(due)[DOWN] == 51 * KV + 32 * 5 * 8


def test_landmark_of_a_group_fetches_the_union() -> None:
    (count,) = planned("landmark", Step.decoding(10_000, 1)).counts
    assert (count.heads, count.minimum, count.maximum) == (8, 5, 20)
    (count,) = planned("landmark", Step.decoding(10_000, 1), MHA).counts
    assert (count.minimum, count.maximum, count.expected()) == (5, 5, 32 * 5)


@pytest.mark.parametrize("past", [0, 250, 777])
def test_landmark_prompt_in_windows(past: int) -> None:
    prompt = 2030
    plan = planned("landmark", Step(prompt_tokens=prompt, past_tokens=past, new_tokens=prompt - past), MHA)
    near = by_hand(lambda p: p % 250 + 1, past, prompt)
    assert work(plan, "attend_near") == 16384 * near
    assert work(plan, "attend") == 16384 * by_hand(lambda p: 51 * min(5, p // 250 * 5), past, prompt)
    assert rows_of(plan, "score").fixed == by_hand(lambda p: p // 250 * 5, past, prompt)
    windows = range(past // 250, 9)  # the last one is that of tokens 2,000 to 2,029
    assert expected(plan)["fetched"] == 32 * sum(min(5, window * 5) for window in windows)


def test_landmark_that_looks_up_every_block_sees_every_token_and_landmark() -> None:
    step = Step.decoding(1000, 1)
    plan = planned("landmark:top_k=20", step, MHA)
    assert work(plan, "attend_near", "attend") == 16384 * (1001 + 20)


# All of them


def test_what_must_be_trained_is_said() -> None:
    trained = {name for name in ("locret", "lococo", "landmark") if parse_policy(name).trained}
    assert trained == {"locret", "lococo", "landmark"}
    for name in ("retroinfer", "lazyllm", "xattention", "hip", "full"):
        assert not parse_policy(name).trained
    text = plan_text(parse_policy("locret"), LLAMA, Step.decoding(20_000, 1), 0)
    assert "source: Locret, Huang et al. 2024, arXiv:2410.01805" in text
    assert "needs training: retaining heads" in text


def test_what_a_prefix_cache_may_keep() -> None:
    kept = {name: reuse_of(parse_policy(name)) for name in ("retroinfer", "locret", "lazyllm", "xattention", "hip")}
    assert kept == {
        "retroinfer": Reuse.PREFIX,
        "locret": Reuse.PREFIX,
        "lazyllm": Reuse.NOTHING,  # the last token decides what is computed
        "xattention": Reuse.BLOCKS,
        "hip": Reuse.BLOCKS,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("retroinfer:update_tokens=1000", "update_tokens=1000 is not a multiple of cluster_tokens=16; use 992 or 1008"),
        ("retroinfer:estimation=0.99", "estimation=0.99 must be from 0 to 1 - retrieval, which is 0.982"),
        (
            "locret:budget_tokens=1000",
            "stabilizer_tokens=2500 must fit chunk_tokens=3072 and, .* budget_tokens=1000; use 996 or",
        ),
        ("lazyllm:keep_4=0.6", "keep_2=0.75, keep_3=0.5, keep_4=0.6 must not grow with depth"),
        ("xattention:threshold=0", "threshold=0.0 must be above 0 and at most 1"),
        ("xattention:stride_tokens=24", "block_tokens=128 is not a multiple of stride_tokens=24"),
        ("hip:tokens_2=4096", "tokens_2=4096, tokens_3=8192, top_k=2048 must not grow"),
        ("hip:refresh_1=20", "refresh_1=20 is not a multiple of refresh_2=16"),
        ("lococo:chunk_tokens=600", "chunk_tokens=600 exceeds memory_tokens [+] buffer_tokens"),
        ("lococo:memory_tokens=511", "memory_tokens=511 must be even"),
        ("lococo:buffer_tokens=512", "chunk_tokens=512 must be at least 513"),
        ("landmark:window_tokens=80", "window_tokens=80 is not a multiple of block_tokens=50; use 50 or 100"),
    ],
)
def test_bad_parameters_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_policy(text)
