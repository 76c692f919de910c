"""Statistics against hand-made cases and a brute-force LRU."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from traces import Trace, TraceError
from traces.stats import infinite_cache_hit_ratio, info, lru_hit_ratio, percentiles


def of_blocks(ids):
    return Trace.from_columns(
        name="t",
        arrival_s=[0.0],
        prompt_tokens=[len(ids)],
        output_tokens=[1],
        block_tokens=1,
        block_ids=ids,
        block_counts=[len(ids)],
    )


@given(st.lists(st.integers(0, 8), min_size=1, max_size=60), st.integers(1, 10))
def test_lru_equals_the_stack_distance_definition(ids, capacity):
    # A reuse hits when fewer than `capacity` distinct other blocks were touched since the last use.
    hits = 0
    for i, block in enumerate(ids):
        if block in ids[:i]:
            last = i - 1 - ids[:i][::-1].index(block)
            hits += len(set(ids[last + 1 : i])) < capacity
    assert lru_hit_ratio(of_blocks(ids), capacity) == hits / len(ids)


@given(st.lists(st.sampled_from([0, 1, 2, 2**31 - 1]), min_size=1))
def test_infinite_cache_misses_each_block_once(ids):
    assert infinite_cache_hit_ratio(of_blocks(ids)) == 1 - len(set(ids)) / len(ids)


def test_percentiles_are_nearest_rank():
    assert percentiles(np.arange(1, 101)) == {"p50": 50, "p90": 90, "p99": 99, "max": 100}
    assert percentiles(np.array([7])) == {"p50": 7, "p90": 7, "p99": 7, "max": 7}
    assert percentiles(np.array([4, 1, 3, 2])) == {"p50": 2, "p90": 4, "p99": 4, "max": 4}


def test_info_of_a_hand_made_trace():
    trace = Trace.from_columns(
        name="t",
        arrival_s=[1, 2, 5],
        prompt_tokens=[16, 32, 16],
        output_tokens=[1, 2, 3],
        tenant=[0, 1, 0],
        tenants=("a", "b"),
        session=[0, 4, 0],
        block_tokens=16,
        block_ids=[0, 0, 1, 2],
        block_counts=[1, 2, 1],
    )
    found = info(trace, (1, 2))
    assert found["span_s"] == 4
    assert found["rate_rps"] == 0.75
    assert found["interarrival_cv"] == 0.5  # gaps 1 and 3: standard deviation 1, mean 2
    assert found["prompt_tokens"] == 64
    assert found["output_tokens"] == 6
    assert found["sessions"] == 2
    assert found["infinite_cache_hit_ratio"] == 0.25
    assert found["lru_hit_ratio"] == {"1": 0.25, "2": 0.25}
    assert found["tenants"] == {
        "a": {"requests": 2, "prompt_tokens": 32, "output_tokens": 4},
        "b": {"requests": 1, "prompt_tokens": 32, "output_tokens": 2},
    }


def test_what_cannot_be_known_is_none():
    trace = Trace.from_columns(name="t", arrival_s=[3.0], prompt_tokens=[8], output_tokens=[1])
    found = info(trace, (4,))
    assert [found[key] for key in ("rate_rps", "interarrival_cv", "infinite_cache_hit_ratio")] == [None] * 3
    assert found["lru_hit_ratio"] == found["prefix_lru_hit_ratio"] == {"4": None}


def test_lru_capacity_must_hold_a_block():
    with pytest.raises(TraceError, match="capacity_blocks=0: must be at least 1"):
        lru_hit_ratio(of_blocks([1]), 0)
