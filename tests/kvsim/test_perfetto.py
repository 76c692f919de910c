"""The Chrome trace against the table of requests."""

import json

import numpy as np
import pytest
from simulated import random_trace, setup, trace

from kvsim.perfetto import WINDOW_REQUESTS, perfetto_trace
from kvsim.simulate import simulate


def slices(document):
    """{(request, phase): (start, end) in seconds}."""
    found = {}
    for event in document["traceEvents"]:
        if event["ph"] in "be":
            found.setdefault((event["id"], event["name"]), []).append(event["ts"] / 1e6)
    return {key: tuple(ends) for key, ends in found.items()}


def test_slices_are_the_phases_of_each_request():
    result = simulate(random_trace(1, 8), setup("full", gpus=2, max_num_batched_tokens=4096))
    columns, found = result.requests, slices(json.loads(json.dumps(perfetto_trace(result))))
    assert len(found) == 3 * 8
    for i in range(8):
        times = [columns[name][i] for name in ("arrival_s", "admitted_s", "first_token_s", "finish_s")]
        for phase, begin, end in zip(("queued", "prefill", "decode"), times, times[1:], strict=False):
            assert found[i, phase] == pytest.approx((begin, end))


def test_a_rejected_request_has_no_slice_and_counters_are_the_series():
    result = simulate(trace([0.0, 0.0], [1000, 900_000], 3), setup("full"))
    document = perfetto_trace(result)
    assert {request for request, _ in slices(document)} == {0}
    counted = [e["args"]["hbm_bytes"] for e in document["traceEvents"] if e["ph"] == "C" and e["name"] == "hbm_bytes"]
    inside = result.series["time_s"] <= result.requests["finish_s"][0]
    assert counted == result.series["hbm_bytes"][inside].tolist()


def test_only_a_window_of_a_long_trace_is_shown():
    n = WINDOW_REQUESTS + 50
    result = simulate(trace(np.arange(n) * 0.5, 64, 1), setup("full"))
    document = perfetto_trace(result)
    assert document["otherData"] == {"requests_shown": WINDOW_REQUESTS, "requests": n}
    assert len({request for request, _ in slices(document)}) == WINDOW_REQUESTS
