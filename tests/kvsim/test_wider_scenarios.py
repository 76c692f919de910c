"""Random small scenarios with sessions, prompts on GPUs of their own, stages, guesses and timeouts: what must hold."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios import ENGINES, SMALL, TOKEN_BYTES, faster, with_room
from simulated import HOST, setup, trace

from kvsim.results.causes import spent_s
from kvsim.run.simulate import simulate
from kvsim.scenario.choices import SCHEDULERS, SESSION_KVS
from kvsim.scenario.speculation import Speculation
from kvsim.scenario.tenants import Tenant

PLAIN = ("full", "offload-all")  # these go with all that follows
OTHERS = ("quest:budget_tokens=256", "shadowkv:budget_tokens=256", "sink-window:window_tokens=200")
GUESSES = Speculation(guesses=2, acceptance=(0.6, 0.5), candidates=2, method="lookup", draft=None, draft_share=0.25)
TIMEOUTS_S = st.none() | st.sampled_from([0.002, 0.01, 0.05])


@st.composite
def conversations(draw):
    """Turns of three sessions, most of which go on from the one before, and requests of none."""
    n = draw(st.integers(2, 12))
    columns = (st.integers(-1, 2), st.integers(1, 1200), st.integers(1, 59), st.floats(0, 0.05) | st.just(0.0))
    sessions, prompts, outputs, gaps = (draw(st.lists(values, min_size=n, max_size=n)) for values in columns)
    thoughts, said = [np.nan] * n, {}
    for i in range(n):
        if sessions[i] in said and sessions[i] >= 0:
            thoughts[i] = draw(st.just(np.nan) | st.floats(0, 0.05))
            if draw(st.integers(0, 4)):
                prompts[i] = said[sessions[i]] + draw(st.integers(1, 299))
        said[sessions[i]] = prompts[i] + outputs[i]
    tenant = draw(st.lists(st.integers(0, 1), min_size=n, max_size=n))
    named = {"session": sessions, "think_s": thoughts, "tenant": tenant, "tenants": ("a", "b")}
    return trace(np.cumsum(gaps), prompts, outputs, **named)


@st.composite
def wider(draw):
    """Conversations, and a cluster with one of what other random scenarios leave out."""
    requests, tp = draw(conversations()), draw(st.sampled_from([1, 2]))
    kind = draw(st.sampled_from(["sessions", "apart", "stages", "guesses"]))
    options, replicas = {**draw(ENGINES), "timeout_s": draw(TIMEOUTS_S)}, draw(st.sampled_from([1, 2]))
    if kind == "apart":
        host = replace(HOST, gpus_max=draw(st.sampled_from([2, 8])) * tp, gpus_per_switch=1)
        options |= {"host": host, "gpus": 4 * tp, "prefill_gpus": draw(st.integers(1, 3)) * tp}
    else:
        options |= {"gpus": tp * replicas, "scheduler": draw(st.sampled_from(SCHEDULERS))}
        options["tenants"] = {"a": Tenant(priority=1, weight=2.0, quota=draw(st.sampled_from([0.4, 1.0])))}
    if kind == "sessions" and (requests.session >= 0).any():
        options["session_kv"] = draw(st.sampled_from(SESSION_KVS))
        options["sessions"] = draw(st.sampled_from(["open", "closed"]))
    if kind == "stages":
        stages = draw(st.sampled_from([2, 3]))
        options |= {"pp": stages, "gpus": tp * replicas * stages, "fidelity": "step"}
    if kind == "guesses":
        options["speculation"] = GUESSES
    s = setup(draw(st.sampled_from(PLAIN if kind == "guesses" else PLAIN + OTHERS)), model=SMALL, tp=tp, **options)
    if kind == "stages":
        return requests, s
    largest = int((requests.prompt_tokens.max() + requests.output_tokens.max()) * TOKEN_BYTES // tp)
    hbm, ddr = (int(largest * draw(st.sampled_from([1.1, 2, 100]))) for _ in range(2))
    return requests, with_room(s, hbm, ddr)


@settings(max_examples=60)
@given(wider())
def test_twice_as_fast_is_half_as_long_and_everybody_ends(scenario):
    """Rates doubled, fixed times, gaps, thoughts and patience halved: powers of two, so all is the same but time."""
    requests, s = scenario
    slow = simulate(requests, s)
    quick = replace(requests.scaled_rate(2.0), think_s=requests.think_s / 2)
    gpu, timeout_s = replace(s.gpu, rates=faster(s.gpu.rates, 2.0)), s.timeout_s and s.timeout_s / 2
    fast = simulate(quick, replace(s, gpu=gpu, host=faster(s.host, 2.0), timeout_s=timeout_s))
    r = slow.requests
    assert np.isin(r["status"], ("finished", "rejected", "timed_out")).all()
    assert r["status"].tolist() == fast.requests["status"].tolist()
    for name in ("arrival_s", "admitted_s", "first_token_s", "finish_s"):
        assert fast.requests[name] == pytest.approx(r[name] / 2, rel=1e-9, abs=0, nan_ok=True)
    assert (fast.traffic, fast.swaps, fast.session_kv) == (slow.traffic, slow.swaps, slow.session_kv)
    check_books(slow)


def check_books(result):
    """Causes add up to latencies, links to their causes; nothing holds or carries more than it can."""
    r, done = result.requests, result.requests["status"] == "finished"
    for phase, begin, end in (("e2e", "arrival_s", "finish_s"), ("ttft", "arrival_s", "first_token_s")):
        parts = np.stack([*spent_s(r, phase).values()])[:, done]
        assert parts.sum(axis=0) == pytest.approx((r[end] - r[begin])[done], rel=1e-11)
        assert (parts >= -1e-9).all()
    for link, causes in result.traffic.items():
        figures = result.links[link]
        assert figures["bytes"] == sum(causes.values())
        assert (figures["bytes"] > 0) == (figures["busy_s"] > 0)
        assert figures["utilization"] <= 1 + 1e-9
    for node in result.memory.values():
        assert 0 <= node["mean_bytes"] <= node["peak_bytes"] * (1 + 1e-12)
        assert node["peak_bytes"] <= node["capacity_bytes"]
