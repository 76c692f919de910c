"""What may turn out otherwise than a plan assumes, as another fleet or another trace to simulate."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvsim.hardware.slower_link import slower_host, slower_link
from kvsim.planning.candidates import Family
from kvsim.scenario.setup import Setup
from policies import Step, plan_layers
from traces import Trace, TraceError

HITS, LINK, PROMPTS, PRICE = 0.4, 0.5, 2, 1.5
_SEED = 0  # of which requests keep their prefix


class Change(NamedTuple):
    """Something that turns out otherwise: its name, how it was made, and what to simulate or why there is nothing."""

    name: str
    made_by: str
    family: Family
    trace: Trace
    why_not: str | None = None


def changes(family: Family, trace: Trace) -> Iterator[Change]:
    """Those that are simulated, each on its own."""
    yield _hits(family, trace)
    setup = family.setup
    slower = replace(setup, gpu=slower_link(setup.gpu, LINK), host=slower_host(setup.host, LINK))
    made_by = "PCIe to host memory, its switches and the network adapters at half their rates; NVLink as it is"
    yield Change("link half as fast", made_by, replace(family, setup=slower), trace)
    yield _longer(family, trace)


def _hits(family: Family, trace: Trace) -> Change:
    """What is cached of a policy's choices is found 40 % of the time; of prefixes 40 % of what the trace repeats."""
    setup, made_by, name = family.setup, [], "hit rate 40 %"
    misses = _misses(setup, int(trace.prompt_tokens.max()))
    if misses:
        counts = {**setup.counts, **dict.fromkeys(misses, 1 - HITS)}
        family = replace(family, setup=replace(setup, counts=counts))
        made_by.append(f"of what a step chooses 40 % is in HBM ({', '.join(f'{one}={1 - HITS:g}' for one in misses)})")
    if any(setup.prefix_cache_bytes.values()):
        trace, kept = forgetful(trace)
        name = name if misses else "40 % of the prefix hits"
        made_by.append(
            f"{100 * (1 - kept):.0f} % of the requests share no prefix: of the blocks that recur 40 % still do"
        )
    why_not = None if made_by else "nothing of this plan is cached: no hit rate changes it"
    return Change(name, "; ".join(made_by), family, trace, why_not)


def _misses(setup: Setup, prompt_tokens: int) -> list[str]:
    """The counts of what a decode step does not find in its cache."""
    plans = plan_layers(setup.policy, setup.rank, Step.decoding(prompt_tokens, 1))
    names = dict.fromkeys(count.name for plan in plans for count in plan.counts)
    return [name for name in names if name.rpartition(".")[2] == "miss"]


def forgetful(trace: Trace, share: float = HITS) -> tuple[Trace, float]:
    """The trace where `share` of its repeated blocks are left, and the share of requests that keep their ids.

    The others get ids that nobody else has. Who keeps them is drawn; how many is what leaves that share.
    """
    chances = np.random.default_rng(_SEED).random(len(trace))
    blocks = np.diff(trace.block_offsets)
    of_block = np.repeat(chances, blocks)
    wanted = share * _repeated(trace.block_ids)
    order = np.sort(chances)
    low, high = 0, len(order)  # so many requests keep their ids: too few, enough
    while high - low > 1:
        middle = (low + high) // 2
        few = _repeated(trace.block_ids[of_block <= order[middle - 1]]) < wanted
        low, high = (middle, high) if few else (low, middle)
    anew = of_block > order[high - 1] if wanted else np.zeros(len(of_block), np.bool_)
    ids = trace.block_ids.astype(np.int64)
    fresh = int(ids.max(initial=-1)) + 1
    ids[anew] = fresh + np.arange(int(anew.sum()))
    _, ids = np.unique(ids, return_inverse=True)
    return replace(trace, block_ids=ids.astype(trace.block_ids.dtype)), float((chances <= order[high - 1]).mean())


def _repeated(ids: NDArray[np.int32]) -> int:
    """Blocks that a cache without end would find: an id names a block with all before it."""
    return len(ids) - len(np.unique(ids))


def _longer(family: Family, trace: Trace) -> Change:
    """Prompts twice as long, which share as large a part as before."""
    made_by = "every prompt, and every block that prompts share, is twice as long; outputs as they are"
    name = "prompts twice as long"
    try:
        longer = replace(trace, prompt_tokens=trace.prompt_tokens * PROMPTS, block_tokens=trace.block_tokens * PROMPTS)
    except TraceError as error:
        return Change(name, made_by, family, trace, str(error))
    return Change(name, made_by, family, longer)
