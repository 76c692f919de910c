"""Sessions in closed loop: a request comes its think time after what it waited for has ended."""

from dataclasses import replace

import numpy as np
import pytest
from scenarios import SMALL, TOKEN_BYTES, with_room
from simulated import setup, trace

import traces
from kvsim.results.summary import summarize
from kvsim.run.simulate import simulate
from traces.sessions import followers

FIDELITIES = ("step", "op")


def flat(value, name=""):
    """The figures of nested mappings by their path."""
    if not isinstance(value, dict):
        return {name: value} if isinstance(value, int | float) else {}
    return {path: figure for key, inner in value.items() for path, figure in flat(inner, f"{name}.{key}").items()}


def sessions_trace(seed: int, n: int = 40):
    """Requests of five sessions, some of which overlap, and of none."""
    rng = np.random.default_rng(seed)
    return trace(
        np.sort(rng.uniform(0, 20, n)),
        rng.integers(100, 4000, n),
        rng.integers(1, 60, n),
        session=rng.integers(-1, 5, n),
        think_s=np.where(rng.random(n) < 0.2, np.nan, rng.exponential(3, n)),
    )


def loads(given):
    """What each request's arrival follows from, by the results."""
    tr, result = given
    found, columns = followers(tr), result.requests
    led = found.leader >= 0
    leader = found.leader[led]
    left_s = np.where(columns["status"] == "rejected", np.nan, columns["finish_s"])
    since_s = np.where(found.after_end[led], left_s[leader], columns["arrival_s"][leader])
    return led, since_s + found.delay_s[led]


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("options", [{}, {"gpus": 4, "router": "least-loaded"}, {"scheduler": "fair"}])
def test_requests_follow_their_leaders(fidelity, options):
    tr = sessions_trace(1)
    result = simulate(tr, setup(model=SMALL, sessions="closed", fidelity=fidelity, max_num_seqs=3, **options))
    led, expected_s = loads((tr, result))
    assert (result.requests["status"] == "finished").all()
    np.testing.assert_array_equal(result.requests["arrival_s"][led], expected_s)
    np.testing.assert_array_equal(result.requests["arrival_s"][~led], tr.arrival_s[~led])


def test_fidelities_agree_on_a_lone_replica():
    columns = [simulate(sessions_trace(2), setup(model=SMALL, sessions="closed", fidelity=f)) for f in FIDELITIES]
    step, op = (result.requests["finish_s"] for result in columns)
    np.testing.assert_allclose(step, op, rtol=1e-6)


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_a_rejected_request_is_answered_at_once(fidelity):
    """The second prompt is larger than the memory: the third comes its think time after the second came."""
    tr = trace([0.0, 10.0, 20.0], [100, 5000, 100], 5, session=[0, 0, 0], think_s=[np.nan, 2.0, 3.0])
    s = with_room(setup(model=SMALL, sessions="closed", fidelity=fidelity), 1000 * TOKEN_BYTES, 0)
    columns = simulate(tr, s).requests
    assert columns["status"].tolist() == ["finished", "rejected", "finished"]
    assert columns["arrival_s"][1] == columns["finish_s"][0] + 2.0
    assert columns["arrival_s"][2] == columns["arrival_s"][1] + 3.0


def test_a_slow_service_is_asked_less():
    """Ten clients without think time ask as fast as they are answered: never more than ten requests at a time."""
    n, clients = 200, 10
    tr = trace(
        np.arange(n) * 1e-3,
        3000,
        40,
        session=np.arange(n) % clients,
        think_s=np.where(np.arange(n) < clients, np.nan, 0),
    )
    queues = {}
    for mode in ("open", "closed"):
        series = simulate(tr, setup(model=SMALL, sessions=mode, max_num_seqs=4)).series
        queues[mode] = int((series["running"] + series["waiting"]).max())
    assert queues["closed"] <= clients < queues["open"]


def test_coding_agents_with_sub_agents_and_think_times():
    """The bundled sessions behind a prefix cache: all are served, and reuse as much as when recorded."""
    tr = traces.load("agentic-coding", limit=300)
    options = {"gpus": 2, "prefix_cache_hbm_bytes": 80 * 10**9, "prefix_cache_ddr_bytes": 800 * 10**9}
    recorded, closed = (simulate(tr, setup(sessions=mode, **options)) for mode in ("open", "closed"))
    led, expected_s = loads((tr, closed))
    assert led.sum() > 250
    np.testing.assert_array_equal(closed.requests["arrival_s"][led], expected_s)
    assert (closed.requests["status"] == "finished").all()
    hits = [sum(tier["hit_blocks"] for tier in result.cache.values()) for result in (recorded, closed)]
    assert hits[1] >= 0.95 * hits[0] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sessions": "close"}, r"sessions 'close'.*did you mean 'closed'"),
        (
            {"sessions": "closed", "prefix_cache_eviction": "belady", "prefix_cache_ddr_bytes": 10**9},
            "belady knows what comes next",
        ),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        setup(**options)


def test_a_trace_without_sessions():
    with pytest.raises(ValueError, match="'test' has no sessions; replay it with sessions=open"):
        simulate(replace(trace([0.0], 10, 5)), setup(sessions="closed"))


def test_results_do_not_depend_on_the_order_of_rows():
    """The same requests as a trace in the order in which they came give the same figures."""
    rng = np.random.default_rng(4)
    tr = trace(
        np.sort(rng.uniform(0, 5, 80)),
        rng.integers(100, 4000, 80),
        rng.integers(1, 60, 80),
        session=np.arange(80) % 8,
        think_s=np.where(np.arange(80) < 8, np.nan, rng.exponential(1, 80)),
        tenant=np.arange(80) % 2,
        tenants=("a", "b"),
    )
    options = {"model": SMALL, "max_num_seqs": 4, "scheduler": "fair"}
    closed = simulate(tr, setup(sessions="closed", **options))
    order = np.argsort(closed.requests["arrival_s"], kind="stable")
    assert (order != np.arange(80)).any()
    columns = {name: getattr(tr, name)[order] for name in ("prompt_tokens", "output_tokens", "session", "tenant")}
    recorded = trace(closed.requests["arrival_s"][order], **columns, tenants=tr.tenants)
    got, expected = (
        summarize(replace(result, repeats=(), inputs={**result.inputs, "seed": 0}))
        for result in (closed, simulate(recorded, setup(**options)))
    )
    for name in ("makespan_s", "ttft_s", "e2e_s", "tenants", "fairness", "uncertainty"):
        assert flat(got[name]) == pytest.approx(flat(expected[name]), rel=1e-9)
