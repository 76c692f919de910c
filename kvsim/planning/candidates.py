"""What may be bought: GPUs, policies, how a replica is split and what it caches; and what cannot serve, and why."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from kvsim.hardware.catalogue import load_gpu, load_host
from kvsim.planning.prices import Price, Prices
from kvsim.plans.derive import PlanTable
from kvsim.plans.guessing import guesser_of
from kvsim.scenario.scenario_file import Scenario, default_host
from kvsim.scenario.setup import Setup
from kvsim.scenario.speculation import speculation
from kvsim.text.units import format_bytes
from policies import Reuse, parse_policy, reuse_of
from traces import Trace

_CACHES = ("prefix_cache_hbm", "prefix_cache_ddr", "prefix_cache_nvme", "prefix_cache_remote")
_CACHE_ROUTER = "kv-aware"
Line = tuple[str, str, tuple[str, ...]]
"""What is compared with each other: a GPU, a policy and what it caches, whatever the split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Fleets that differ in the number of replicas alone: a GPU, a policy, the split of a replica and what it caches.

    `setup` is that of one replica. Where prompts and decoding are apart, `prefill_share` of the replicas process
    prompts. `options` are what the planner chose besides, as flags of `kvsim simulate`.
    """

    gpu: str  # as it was asked for
    policy: str
    setup: Setup
    price: Price
    options: tuple[str, ...] = ()
    prefill_share: float | None = None

    @property
    def gpus_each(self) -> int:
        """GPUs of a replica."""
        return self.setup.tp * self.setup.pp

    @property
    def fewest(self) -> int:
        """Replicas below which there is no such fleet."""
        return 1 if self.prefill_share is None else 2

    def prefill_replicas(self, replicas: int) -> int:
        """How many of so many replicas process prompts alone."""
        if self.prefill_share is None:
            return 0
        return min(replicas - 1, max(1, round(self.prefill_share * replicas)))

    def fleet(self, replicas: int, prompts: int | None = None) -> Setup:
        """So many replicas, `prompts` of which process prompts alone (None: their share).

        Raises ValueError where no host or network holds them.
        """
        prefill_gpus = (self.prefill_replicas(replicas) if prompts is None else prompts) * self.gpus_each
        return replace(self.setup, gpus=replicas * self.gpus_each, prefill_gpus=prefill_gpus)

    def usd_per_hour(self, replicas: int) -> float:
        """What so many replicas cost."""
        return self.price.usd_per_hour * self.gpus_each * replicas

    @property
    def line(self) -> Line:
        """Its line."""
        return self.gpu, self.policy, self.options


class Misfit(NamedTuple):
    """A candidate that cannot serve the trace at all, and why."""

    gpu: str
    policy: str
    tp: int
    pp: int
    options: tuple[str, ...]
    reason: str


class Candidates(NamedTuple):
    """What could be bought, and what could not serve at all."""

    families: list[Family]
    misfits: list[Misfit]


def candidates(
    asked: Scenario, gpus: Sequence[str], prices: Prices, trace: Trace, classes: Mapping[str, Any]
) -> Candidates:
    """Every GPU with every policy in every split that holds the model and the trace's longest request.

    `classes` are the bounds of SLO classes. Raises ValueError for unknown names and for a GPU without a price.
    """
    model = asked.load_model()
    guessed = speculation(model, asked.speculate, asked.acceptance, asked.tree, asked.draft, asked.draft_share)
    longest = int(np.argmax(trace.prompt_tokens + trace.output_tokens))
    lengths = int(trace.prompt_tokens[longest]), int(trace.output_tokens[longest])
    fixed = asked.setup["gpus"] if "gpus" in asked.given else None
    families: list[Family] = []
    misfits: list[Misfit] = []
    cards = [(text, load_gpu(text)) for text in gpus]
    priced = {text: prices.of(gpu.name) for text, gpu in cards}
    for text, gpu in cards:
        host = load_host(asked.host if asked.host is not None else default_host(gpu.name))
        own = {**asked.setup, "slo_classes": classes}
        for policy in asked.policy:
            base = dict(own, model=model, policy=parse_policy(policy), gpu=gpu, host=host, speculation=guessed)
            for options, changes in _variants(asked, base, trace):
                found: list[Family | Misfit] = []
                for tp, pp in _splits(asked, host.gpus_max):
                    split = {"gpus": tp * pp, "tp": tp, "pp": pp, "prefill_gpus": 0}
                    one = _fitting(text, policy, {**base, **changes, **split}, options, priced[text], lengths, fixed)
                    found.append(one)
                    if pp > 1 and isinstance(one, Family):
                        break  # stages are for what no single one holds: the fewest will do
                    if pp == 1 and tp == host.gpus_max and any(isinstance(each, Family) for each in found):
                        break
                families += [one for one in found if isinstance(one, Family)]
                misfits += [one for one in found if isinstance(one, Misfit)]
    return Candidates(families, misfits)


def _splits(asked: Scenario, gpus_max: int) -> Iterator[tuple[int, int]]:
    """TP by powers of two up to a host; then stages of whole hosts, which are left out where one host is enough."""
    tps = [1 << i for i in range(gpus_max.bit_length()) if 1 << i <= gpus_max]
    if "tp" in asked.given:
        tps = [asked.setup["tp"]]
    if "pp" in asked.given:
        yield from ((tp, asked.setup["pp"]) for tp in tps)
        return
    yield from ((tp, 1) for tp in tps)
    if "tp" not in asked.given:
        yield from ((tps[-1], pp) for pp in (2, 4, 8))


def _variants(
    asked: Scenario, base: Mapping[str, Any], trace: Trace
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """As asked for; and with prefixes cached in half of the host's DDR where blocks are known and nobody said how."""
    yield (), {}
    if set(_CACHES) & asked.given or not trace.block_tokens or base["session_kv"] != "recompute":
        return
    if reuse_of(base["policy"]) is not Reuse.BLOCKS:
        return
    size_bytes = base["host"].ddr_bytes // 2
    if size_bytes > base["host"].ddr_bytes * base["host_memory_utilization"] * 0.75:
        return
    changes = {"prefix_cache_ddr_bytes": size_bytes}
    flags = ["--prefix-cache-ddr", format_bytes(size_bytes).replace(" ", "")]
    if "router" not in asked.given:
        changes["router"] = _CACHE_ROUTER
        flags += ["--router", _CACHE_ROUTER]
    yield tuple(flags), changes


def _fitting(
    gpu: str,
    policy: str,
    given: Mapping[str, Any],
    options: tuple[str, ...],
    price: Price,
    lengths: tuple[int, int],
    fixed_gpus: int | None,
) -> Family | Misfit:
    """The family where a replica holds the model and the longest request; otherwise why not."""
    try:
        if fixed_gpus is not None and fixed_gpus % given["gpus"]:
            raise ValueError(f"gpus={fixed_gpus} is not a multiple of the {given['gpus']} GPUs of a replica (tp x pp)")
        setup = Setup(**given)
        _check_longest(setup, *lengths)
    except ValueError as error:
        return Misfit(gpu, policy, given["tp"], given["pp"], options, str(error))
    return Family(gpu=gpu, policy=policy, setup=setup, price=price, options=options)


def _check_longest(setup: Setup, prompt_tokens: int, output_tokens: int) -> None:
    """Raise ValueError where the state of a request does not fit at its last token."""
    capacity = setup.capacity()
    table = PlanTable(setup.policy, setup.rank, setup.machine(), setup.counts, guesser_of(setup))
    stored = table.decode(prompt_tokens, max(1, output_tokens - 1)).start[-len(capacity) :].tolist()
    for tier, need, room in zip(("HBM", "DDR", "NVMe"), stored, capacity, strict=True):
        if need > room:
            raise ValueError(
                f"the longest request, {prompt_tokens:,} + {output_tokens:,} tokens, needs {format_bytes(need)} of "
                f"{tier} for its state beside the weights, and a GPU has {format_bytes(room)}; raise --tp"
            )
