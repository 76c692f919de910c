"""Statistics of a trace: sizes, rate, burstiness, and how much of its prompts a prefix cache can hit."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from traces.schema import Codes, Ints, Trace, TraceError


def info(trace: Trace, lru_capacities: Sequence[int] = ()) -> dict[str, Any]:
    """The statistics that `kvsim trace info` prints; a figure that the trace cannot give is None.

    Token sums are int; percentiles are nearest rank; `rate_rps` is requests / span; the inter-arrival CV is standard
    deviation / mean. `lru_capacities` are in blocks and key `lru_hit_ratio` and `prefix_lru_hit_ratio`.
    """
    gaps_s = np.diff(trace.arrival_s)
    span_s = float(trace.arrival_s[-1] - trace.arrival_s[0])
    prompts = np.bincount(trace.tenant, weights=trace.prompt_tokens, minlength=len(trace.tenants))
    outputs = np.bincount(trace.tenant, weights=trace.output_tokens, minlength=len(trace.tenants))
    requests = np.bincount(trace.tenant, minlength=len(trace.tenants))
    return {
        "name": trace.name,
        "requests": len(trace),
        "sessions": int(np.unique(trace.session[trace.session >= 0]).size),
        "span_s": span_s,
        "rate_rps": len(trace) / span_s if span_s else None,
        "interarrival_cv": float(gaps_s.std() / gaps_s.mean()) if span_s else None,
        "prompt_tokens": int(trace.prompt_tokens.sum()),
        "output_tokens": int(trace.output_tokens.sum()),
        "prompt_percentiles": percentiles(trace.prompt_tokens),
        "output_percentiles": percentiles(trace.output_tokens),
        "block_tokens": trace.block_tokens,
        "prompt_blocks": len(trace.block_ids),
        "distinct_blocks": _distinct(trace.block_ids),
        "infinite_cache_hit_ratio": infinite_cache_hit_ratio(trace),
        "lru_hit_ratio": {str(capacity): lru_hit_ratio(trace, capacity) for capacity in lru_capacities},
        "prefix_lru_hit_ratio": {str(capacity): prefix_lru_hit_ratio(trace, capacity) for capacity in lru_capacities},
        "tenants": {
            name: {"requests": int(n), "prompt_tokens": int(prompt), "output_tokens": int(output)}
            for name, n, prompt, output in zip(trace.tenants, requests, prompts, outputs, strict=True)
        },
        "skipped_rows": trace.skipped_rows,
        "notes": list(trace.notes),
    }


def percentiles(tokens: Ints) -> dict[str, int]:
    """p50, p90, p99 and max by nearest rank: the smallest value with at least that share at or below it."""
    ordered = np.sort(tokens)
    ranks = {f"p{p}": math.ceil(p * len(ordered) / 100) - 1 for p in (50, 90, 99)}
    return {name: int(ordered[rank]) for name, rank in ranks.items()} | {"max": int(ordered[-1])}


def infinite_cache_hit_ratio(trace: Trace) -> float | None:
    """Share of the prompt blocks that some earlier access already touched; None for a trace without block ids."""
    accesses = len(trace.block_ids)
    return 1 - _distinct(trace.block_ids) / accesses if accesses else None


def lru_hit_ratio(trace: Trace, capacity_blocks: int) -> float | None:
    """Share of the prompt blocks found in an LRU cache of so many blocks; None for a trace without block ids.

    Every id of a prompt in order is one access, also behind a block that is missing: how caches of blocks are compared
    (Mooncake, FAST 2025, table 1), not how engines look a prefix up.
    """
    if not _has_blocks(trace, capacity_blocks):
        return None
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for prompt in range(len(trace)):  # all ids at once, as Python integers, would take eight times the memory
        for block in trace.blocks(prompt).tolist():
            if block in cache:
                hits += 1
                cache.move_to_end(block)
            else:
                cache[block] = None
                if len(cache) > capacity_blocks:
                    cache.popitem(last=False)
    return hits / len(trace.block_ids)


def prefix_lru_hit_ratio(trace: Trace, capacity_blocks: int) -> float | None:
    """Share of the prompt blocks that a prefix cache of so many blocks hits; None for a trace without block ids.

    One cache serves one prompt after the other as engines and `kvsim simulate` do: a hit ends at the first block that
    is missing, and a prompt's head ranks above what continues it, so that chains are given up from their tails.
    """
    if not _has_blocks(trace, capacity_blocks):
        return None
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for prompt in range(len(trace)):
        chain = trace.blocks(prompt).tolist()
        for block in chain:
            if block not in cache:
                break
            hits += 1
        tail_first = chain[:capacity_blocks][::-1]  # of what fits at all
        missing = [block for block in tail_first if block not in cache]
        for block in tail_first:  # lest they make room for their own tail
            if block in cache:
                cache.move_to_end(block)
        for block in missing:
            if block not in cache:
                if len(cache) >= capacity_blocks:
                    cache.popitem(last=False)
                cache[block] = None
        if missing:
            for block in tail_first:
                if block in cache:
                    cache.move_to_end(block)
    return hits / len(trace.block_ids)


def _has_blocks(trace: Trace, capacity_blocks: int) -> bool:
    if capacity_blocks < 1:
        raise TraceError(f"LRU capacity_blocks={capacity_blocks}: must be at least 1 block")
    return len(trace.block_ids) > 0


def _distinct(ids: Codes) -> int:
    if not len(ids) or ids.max() > 16 * len(ids):
        return int(np.unique(ids).size)
    seen = np.zeros(ids.max() + 1, np.bool_)  # linear, where np.unique sorts: 94 million ids in 0.2 s
    seen[ids] = True
    return int(np.count_nonzero(seen))
