"""The Trace class: its rules, its slices, its order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from traces import Trace, TraceError
from traces.schema import expand_runs


def small(**changes):
    columns = {
        "name": "small",
        "arrival_s": [0.0, 1.0, 4.0],
        "prompt_tokens": [10, 20, 9],
        "output_tokens": [1, 2, 3],
        "tenant": [0, 1, 0],
        "tenants": ("a", "b"),
        "session": [5, -1, 5],
        "think_s": [np.nan, np.nan, 2.5],
        "block_tokens": 8,
        "block_ids": [1, 2, 1, 3, 1],
        "block_counts": [2, 2, 1],
    }
    return Trace.from_columns(**(columns | changes))


def test_blocks_head_and_length():
    trace = small()
    assert len(trace) == 3
    assert [trace.blocks(i).tolist() for i in range(3)] == [[1, 2], [1, 3], [1]]
    head = trace.head(2)
    assert len(head) == 2
    assert head.blocks(1).tolist() == [1, 3]
    assert len(head.block_ids) == 4
    assert len(trace.head(99)) == 3


def test_rate_scaling_divides_arrivals_and_keeps_think_times():
    trace = small().scaled_rate(4)
    assert trace.arrival_s.tolist() == [0.0, 0.25, 1.0]
    assert trace.think_s[2] == 2.5


@pytest.mark.parametrize("factor", [0, -1, float("nan"), float("inf")])
def test_rate_scaling_refuses_what_is_no_rate(factor):
    with pytest.raises(TraceError, match="must be a finite number above 0"):
        small().scaled_rate(factor)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arrival_s": [0, 1, np.inf]}, r"small:2: arrival_s=inf: must be finite"),
        ({"arrival_s": [-1, 1, 2]}, r"small:0: arrival_s=-1.0: must be finite and not negative"),
        ({"prompt_tokens": [10, 0, 9]}, r"small:1: prompt_tokens=0: must be a whole number from 1 to 10,000,000"),
        ({"output_tokens": [1, 2, 0]}, r"small:2: output_tokens=0: must be a whole number from 1 to 10,000,000"),
        ({"output_tokens": [1, 2]}, r"output_tokens has 2 entries; arrival_s has 3"),
        ({"tenant": [0, 2, 0]}, r"small:1: tenant=2: must index the 2 tenants"),
        ({"tenants": ("a", "a")}, r"names must differ"),
        ({"session": [0, -2, 0]}, r"session=-2"),
        ({"think_s": [-1, 0, 0]}, r"think_s=-1.0"),
        ({"block_tokens": 0}, r"block_tokens=0: must say how many tokens"),
        ({"block_counts": [2, 1, 2]}, r"small:1: prompt_tokens=20: must have one id for each 8-token block"),
        ({"block_counts": [2, 2, 2]}, r"block_offsets must be 4 entries from 0 to 5"),
        ({"block_ids": [1, 2, 1, -3, 1]}, r"block_ids=-3: must not be negative"),
        ({"block_ids": [1, 2, 1, 2**31, 1]}, r"block_ids=2147483648: must fit 32 bits"),
    ],
)
def test_every_rule_has_its_message(changes, message):
    with pytest.raises(TraceError, match=message):
        small(**changes)


def test_empty_traces_are_refused():
    with pytest.raises(TraceError, match="empty trace"):
        Trace.from_columns(name="none", arrival_s=[], prompt_tokens=[], output_tokens=[])
    with pytest.raises(TraceError, match="n=0 requests"):
        small().head(0)


@given(st.lists(st.tuples(st.integers(0, 5), st.lists(st.integers(0, 99), min_size=1, max_size=4)), min_size=1))
def test_unsorted_requests_are_sorted_stably_with_their_blocks(rows):
    trace = Trace.from_columns(
        name="t",
        arrival_s=[arrival for arrival, _ in rows],
        prompt_tokens=[len(ids) for _, ids in rows],
        output_tokens=[1] * len(rows),
        block_tokens=1,
        block_ids=[block for _, ids in rows for block in ids],
        block_counts=[len(ids) for _, ids in rows],
    )
    expected = sorted(rows, key=lambda row: row[0])  # Python's sort is stable
    assert trace.arrival_s.tolist() == [arrival for arrival, _ in expected]
    assert [trace.blocks(i).tolist() for i in range(len(trace))] == [ids for _, ids in expected]
    assert bool(trace.notes) == (rows != expected)


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 6))))
def test_expanded_runs_are_the_ranges_in_order(runs):
    flat = expand_runs(np.array([s for s, _ in runs], np.int32), np.array([n for _, n in runs], np.int32))
    assert flat.tolist() == [i for start, n in runs for i in range(start, start + n)]
