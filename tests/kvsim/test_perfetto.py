"""The Chrome trace against the tables of requests and links, and one fidelity's operations against the other's."""

import json
from itertools import pairwise

import numpy as np
import pytest
from scenarios import squeezed
from simulated import MODEL, random_trace, setup, trace

from kvsim.iteration import timeline
from kvsim.results.perfetto import LANES, MOST_REQUESTS, perfetto_trace
from kvsim.run.simulate import simulate

LONG = (0.0, 1e6)
TOKEN_BYTES = 131072  # Llama-3.1-8B, bf16
WEIGHT_BYTES = setup().rank.weight_bytes


def checked(result):
    """The events of a trace that is well formed: in order, balanced, named, without overlaps, and plain JSON."""
    document = json.loads(json.dumps(perfetto_trace(result), allow_nan=False))
    events = document["traceEvents"]
    timed = [event for event in events if event["ph"] != "M"]
    assert {event["ph"] for event in timed} <= set("beXC")
    times = [event["ts"] for event in timed]
    assert times == sorted(times)
    assert not times or times[0] >= 0
    processes = {event["pid"] for event in events if event.get("name") == "process_name"}
    threads = {(event["pid"], event["tid"]) for event in events if event.get("name") == "thread_name"}
    assert {event["pid"] for event in timed} == processes
    open_slices, homes, busy_until = {}, {}, {}
    for event in timed:
        if event["ph"] in "be":
            key = event["cat"], event["id"]
            assert homes.setdefault(key, event["pid"]) == event["pid"]
            stack = open_slices.setdefault(key, [])
            if event["ph"] == "b":
                stack.append(event["name"])
            else:
                assert stack.pop() == event["name"]
        elif event["ph"] == "X":
            lane = event["pid"], event["tid"]
            assert lane in threads
            assert event["dur"] >= 0
            assert event["ts"] >= busy_until.get(lane, 0)
            busy_until[lane] = (event["ts"] + event["dur"]) * (1 - 1e-12)
        else:
            assert all(isinstance(value, int) for value in event["args"].values())
    assert not any(open_slices.values())
    return document


def slices(document):
    """{(request, phase): [(start, end), ...] in seconds}."""
    found, begun = {}, {}
    for event in document["traceEvents"]:
        key = event.get("id"), event["name"]
        if event["ph"] == "b":
            begun[key] = event["ts"] / 1e6
        elif event["ph"] == "e":
            found.setdefault(key, []).append((begun.pop(key), event["ts"] / 1e6))
    return found


def operations(result, lane=None):
    """(lane, operation, layer, begin, end) of what was recorded, in order."""
    columns = result.operations
    rows = zip(*(columns[name].tolist() for name in ("lane", "operation", "layer", "begin_s", "end_s")), strict=True)
    return sorted((row for row in rows if lane in (None, row[0])), key=lambda row: (row[0], row[3]))


def test_slices_are_the_phases_of_each_request():
    result = simulate(random_trace(1, 8), setup("full", gpus=2, max_num_batched_tokens=4096))
    columns, found = result.requests, slices(checked(result))
    assert len(found) == 4 * 8
    for i in range(8):
        times = [columns[name][i] for name in ("arrival_s", "admitted_s", "first_token_s", "finish_s")]
        for phase, ends in zip(("queued", "prefill", "decode"), pairwise(times), strict=True):
            assert found[i, phase] == [pytest.approx(ends)]
        assert found[i, f"request {i}"] == [pytest.approx((times[0], times[-1]))]


def test_a_rejected_request_has_no_slice_and_counters_are_the_series():
    result = simulate(trace([0.0, 0.0], [1000, 900_000], 3), setup("full"))
    document = checked(result)
    assert {request for request, _ in slices(document)} == {0}
    counted = [e["args"]["hbm_bytes"] for e in document["traceEvents"] if e["ph"] == "C" and e["name"] == "hbm_bytes"]
    inside = result.series["time_s"] <= result.requests["finish_s"][0]
    assert counted == result.series["hbm_bytes"][inside].tolist()


def test_a_window_between_two_notes_begins_with_what_is_there():
    """While one request decodes its cache grows evenly: by a token a step."""
    result = simulate(trace([0.0], 4000, 200), setup("full", perfetto=(0.5, 0.6)))
    series, first_s, finish_s = result.series, *(result.requests[x][0] for x in ("first_token_s", "finish_s"))
    assert first_s < 0.5
    assert finish_s > 0.6
    counted = {e["name"]: (e["ts"], e["args"]) for e in checked(result)["traceEvents"] if e["ph"] == "C"}
    at, held = counted["hbm_bytes"]
    grown = (0.5 - first_s) / (finish_s - first_s) * (series["hbm_bytes"].max() - 4000 * TOKEN_BYTES - WEIGHT_BYTES)
    assert at == 0.5e6
    assert held["hbm_bytes"] == pytest.approx(WEIGHT_BYTES + 4000 * TOKEN_BYTES + grown, abs=2 * TOKEN_BYTES)
    assert (counted["running"][1], counted["waiting"][1]) == ({"running": 1}, {"waiting": 0})


def test_who_timed_out_is_seen_until_then():
    """The second waits in the queue for as long as it can, the first loses patience in its prefill."""
    requests = trace([0.0, 0.01, 30.0], [60_000, 4000, 100], 1)
    result = simulate(requests, setup("full", timeout_s=0.5, max_num_batched_tokens=256, max_num_seqs=1))
    assert result.requests["status"].tolist()[:2] == ["timed_out", "timed_out"]
    found = slices(checked(result))
    assert found[0, "prefill"] == [pytest.approx((0.0, 0.5))]
    assert found[1, "queued"][0][1] == pytest.approx(min(0.51, result.requests["admitted_s"][1]), nan_ok=True)
    assert found[1, "request 1"] == [pytest.approx((0.01, 0.51))]


def test_without_a_window_the_first_requests_are_shown():
    n = MOST_REQUESTS + 50
    document = checked(simulate(trace(np.arange(n) * 0.5, 64, 1), setup("full")))
    assert document["otherData"] == {"requests_shown": MOST_REQUESTS, "requests": n, "window_s": [None, None]}
    assert {request for request, _ in slices(document)} == set(range(MOST_REQUESTS))


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
@pytest.mark.parametrize("fidelity", ["step", "op"])
def test_a_preempted_request_is_seen_to_go_and_to_return(fidelity, preemption):
    requests, s = squeezed(fidelity, preemption, perfetto=LONG)
    result = simulate(requests, s)
    columns, found = result.requests, slices(checked(result))
    (away,) = found[1, "preempted"]
    before, after = found[1, "decode"]
    assert (0, "preempted") not in found
    assert before == pytest.approx((columns["first_token_s"][1], away[0]))
    assert after == pytest.approx((away[1], columns["finish_s"][1]))
    stalls_s = [end_s - begin_s for *_, begin_s, end_s in operations(result, "stall")]
    assert len(stalls_s) == (2 if preemption == "swap" else 0)  # out and back
    returning_s = stalls_s[1] if stalls_s else 0
    assert away[1] - away[0] + returning_s == pytest.approx(columns["swap_s"][1])


@pytest.mark.parametrize("policy", ["full", "offload-all", "shadowkv", "infllm", "retrieval-attention"])
def test_both_fidelities_show_the_same_operations(policy):
    """Op by op on SimPy's clock, or laid out from the plan of a run in closed form that the window cuts into."""
    requests = trace([0.0, 0.05], [9000, 3000], [60, 30])
    options = {"max_num_batched_tokens": 8192}
    alone = simulate(requests, setup(policy, **options)).requests["finish_s"][0]
    window_s = (0.9 * alone, 0.93 * alone)
    step, op = (simulate(requests, setup(policy, fidelity=f, perfetto=window_s, **options)) for f in ("step", "op"))
    checked(step)
    checked(op)
    ours, theirs = operations(step), operations(op)
    assert len(ours) > 100
    assert [row[:3] for row in ours] == [row[:3] for row in theirs]
    assert [row[3:] for row in ours] == [pytest.approx(row[3:], rel=1e-6) for row in theirs]


@pytest.mark.parametrize("policy", ["offload-all", "retrieval-attention"])
def test_lanes_are_busy_for_as_long_as_the_links_say(policy):
    result = simulate(trace([0.0, 0.3], [4000, 9000], 9), setup(policy, perfetto=LONG, max_num_batched_tokens=4096))
    for lane, link in (("h2d", "ddr->hbm"), ("d2h", "hbm->ddr"), ("cpu", "ddr->cpu")):
        shown_s = sum(end_s - begin_s for *_, begin_s, end_s in operations(result, lane))
        assert shown_s == pytest.approx(result.links[link]["busy_s"], rel=1e-6)


def test_a_dense_cache_keeps_the_sms_busy_from_admission_to_the_end():
    """One lane without a gap: per iteration and layer QKV, append, attend, output projection and MLP, then the head."""
    result = simulate(trace([1.0], 3000, 8), setup("full", perfetto=LONG))
    rows = operations(result)
    assert len(rows) == 8 * (5 * MODEL.n_layers + 1)
    assert [name for _, name, *_ in rows[:6]] == ["qkv", "append", "attend", "out", "mlp", "qkv"]
    assert [rows[0][3], rows[-1][4]] == pytest.approx([1.0, result.requests["finish_s"][0]])
    assert all(after[3] == pytest.approx(before[4], rel=1e-9) for before, after in pairwise(rows))
    threads = {e["tid"] for e in checked(result)["traceEvents"] if e["ph"] == "X"}
    assert threads == {[*LANES].index("sm") + 1}


def staged(result):
    """(stage, lane, operation, layer, begin, end) of what was recorded, by stage, lane and time."""
    columns = result.operations
    names = ("stage", "lane", "operation", "layer", "begin_s", "end_s")
    return list(zip(*(columns[name].tolist() for name in names), strict=True))


@pytest.mark.parametrize("tp", [1, 2])
def test_each_stage_of_a_pipeline_has_its_tracks(tp):
    """Of two requests that begin together and decode in two micro-batches: every layer of each, where it stands."""
    options = {"gpus": 2 * tp, "pp": 2, "tp": tp, "perfetto": LONG, "max_num_batched_tokens": 6000}
    found = {}
    for fidelity in ("step", "op"):
        result = simulate(trace([0.0] * 2, 3000, 6), setup("full", fidelity=fidelity, **options))
        document, found[fidelity] = checked(result), staged(result)
        names = {e["args"]["name"] for e in document["traceEvents"] if e["name"] == "thread_name"}
        assert {"stage 0: SMs", "stage 1: PCIe up (host to device)"} <= names
        attended = [row[:4] for row in found[fidelity] if row[2] == "attend"]
        layers = setup("full", **options).stages.layers
        passes = 2 * (1 + 5)  # micro-batches of the prompts and of each decode iteration
        assert sorted(attended) == sorted(
            (stage, "sm", "attend", layer) for stage, own in enumerate(layers) for layer in own for _ in range(passes)
        )
        heads = [row for row in found[fidelity] if row[2] == "head"]
        assert {row[0] for row in heads} == {1}
        assert heads[-1][5] == pytest.approx(result.requests["finish_s"].max(), rel=1e-6)
    step, op = found["step"], found["op"]
    assert [row[:4] for row in step] == [row[:4] for row in op]
    assert [row[4:] for row in step] == [pytest.approx(row[4:], rel=1e-3) for row in op]


def test_what_is_given_up_of_a_pipeline_is_not_shown():
    """A prompt comes while sequences that decode have set out: every layer is shown as often as any other."""
    requests = trace([0.0] * 4 + [0.06], [200] * 4 + [3000], [12] * 4 + [1])
    result = simulate(requests, setup("full", gpus=2, pp=2, fidelity="op", perfetto=LONG))
    checked(result)
    layers = [row[3] for row in staged(result) if row[2] == "attend"]
    assert set(np.bincount(layers)) == {layers.count(0)}


def test_looking_at_a_pipeline_changes_nothing():
    requests = random_trace(5, 30, span_s=2.0, prompts=(200, 4000), outputs=(2, 60))
    options = {"gpus": 8, "pp": 2, "tp": 2, "preemption": "recompute"}
    hidden, shown = (simulate(requests, setup("offload-all", perfetto=window, **options)) for window in (None, LONG))
    for name in ("admitted_s", "first_token_s", "finish_s"):
        assert np.array_equal(hidden.requests[name], shown.requests[name])
    assert hidden.busy == shown.busy


def test_a_window_shows_what_overlaps_it_and_no_more():
    requests = trace([0.0, 0.2, 50.0], 4000, 20)
    result = simulate(requests, setup("full", perfetto=(0.25, 0.3)))
    document = checked(result)
    assert document["otherData"] == {"requests_shown": 2, "requests": 2, "window_s": [0.25, 0.3]}
    assert {request for request, _ in slices(document)} == {0, 1}
    times = [e["ts"] / 1e6 for e in document["traceEvents"] if e["ph"] in "beC"]
    assert 0.25 <= min(times) <= max(times) <= 0.3
    assert all(end_s > 0.25 and begin_s < 0.3 for *_, begin_s, end_s in operations(result))
    whole = next(e for e in document["traceEvents"] if e["name"] == "request 0" and e["ph"] == "b")
    assert whole["args"]["to_s"] == result.requests["finish_s"][0]
    unseen = simulate(requests, setup("full"))
    for name in ("first_token_s", "finish_s"):  # looking changes nothing
        assert result.requests[name].tolist() == unseen.requests[name].tolist()


@pytest.mark.parametrize("fidelity", ["step", "op"])
def test_a_window_with_too_many_operations_is_refused(fidelity, monkeypatch):
    monkeypatch.setattr(timeline, "MOST_OPERATIONS", 500)
    with pytest.raises(ValueError, match=r"perfetto=0-1e\+06: 500 operations, the most that are recorded, end at .* s"):
        simulate(trace([0.0], 1000, 9), setup("full", fidelity=fidelity, perfetto=LONG))


@pytest.mark.parametrize("window_s", [(2.0, 2.0), (3.0, 1.0), (-1.0, 1.0), (0.0, float("inf"))])
def test_a_window_goes_forward(window_s):
    with pytest.raises(ValueError, match="a window goes from one second to a later one"):
        setup("full", perfetto=window_s)


def test_what_is_shown_is_what_would_have_happened_anyway():
    """Replicas that share a host's DDR and PCIe take the same times, to the bit, whether anybody looks or not."""
    requests = random_trace(5, 40, span_s=2.0, prompts=(200, 4000), outputs=(2, 60))
    options = {"gpus": 4, "preemption": "recompute"}
    hidden, shown = (simulate(requests, setup("offload-all", perfetto=window, **options)) for window in (None, LONG))
    for name in ("admitted_s", "first_token_s", "finish_s"):
        assert np.array_equal(hidden.requests[name], shown.requests[name])
    assert hidden.busy == shown.busy
