"""The Virtual Token Counter against its paper: whose request is next, and how far service can drift apart."""

import numpy as np
import pytest
from simulated import setup, trace
from tenants import mixed, turns

from kvsim.engine.testing import WAITING
from kvsim.run.simulate import simulate
from kvsim.scenario.tenants import Tenant
from traces import Trace


def algorithm_2(requests: Trace, weights: list[float], slots: int, w_p: float, w_q: float) -> list[int]:
    """The order of admission by arXiv:2401.00588's Algorithm 2, where all requests are there from the beginning."""
    counters = [0.0] * len(weights)
    queues = [[i for i in range(len(requests)) if requests.tenant[i] == t] for t in range(len(weights))]
    running: dict[int, int] = {}  # request -> tokens still to come
    order = []
    while any(queues) or running:
        while any(queues) and len(running) < slots:
            tenant = min((t for t in range(len(weights)) if queues[t]), key=lambda t: (counters[t], queues[t][0]))
            request = queues[tenant].pop(0)
            counters[tenant] += w_p * int(requests.prompt_tokens[request]) / weights[tenant]
            running[request] = int(requests.output_tokens[request])
            order.append(request)
        for request in running:
            counters[requests.tenant[request]] += w_q / weights[requests.tenant[request]]
        running = {request: left - 1 for request, left in running.items() if left > 1}
    return order


@pytest.mark.parametrize(("seed", "slots", "w_q"), [(0, 1, 2.0), (1, 3, 2.0), (2, 8, 2.0), (3, 4, 0.5), (4, 5, 16.0)])
def test_fair_admits_in_the_order_of_the_papers_algorithm(seed: int, slots: int, w_q: float) -> None:
    """Prompts take one iteration, and a run of decode steps is one event: its counters must be those of each step."""
    requests, weights = mixed(seed, 80, 3), [1.0, 2.0, 0.5]  # powers of 2: sums of quotients are quotients of sums
    terms = {name: Tenant(weight=weight) for name, weight in zip("abc", weights, strict=True)}
    options = {"scheduler": "fair", "tenants": terms, "max_num_seqs": slots, "output_token_weight": w_q}
    times = simulate(requests, setup("full", **options)).requests
    # Requests admitted at one boundary have one time; within it the oracle's order must not be contradicted.
    admitted_s = times["admitted_s"][algorithm_2(requests, weights, slots, 1.0, w_q)]
    assert np.all(np.diff(admitted_s) >= 0)
    first_come = simulate(requests, setup("full", **{**options, "scheduler": "fcfs"})).requests["admitted_s"]
    assert np.any(np.diff(first_come[algorithm_2(requests, weights, slots, 1.0, w_q)]) < 0)


def widest(requests: Trace, scheduler: str, slots: int) -> float:
    """The largest difference of two tenants' service over any interval in which both of them are backlogged."""
    terms = {"a": Tenant(quota=0.99)}  # never reached; `fcfs` tells tenants apart for the sake of quotas alone
    ahead = []
    for engine in turns(requests, {"scheduler": scheduler, "tenants": terms, "max_num_seqs": slots}):
        a, b = engine.cluster.tenants[0]
        if engine.cluster.world["arrived"] == len(requests):
            if not (a["length"][WAITING] and b["length"][WAITING]):
                break
            ahead.append(sum((x["prompt_tokens"] + 2 * x["output_tokens"]) * sign for x, sign in ((a, 1), (b, -1))))
    assert len(ahead) > 100
    return float(max(ahead) - min(ahead))


def test_service_of_backlogged_tenants_stays_within_the_papers_bound() -> None:
    """arXiv:2401.00588, Theorem 4.4: at most 2 max(w_p L, w_q M) apart, L the longest prompt, M tokens in a batch."""
    slots = 6
    requests = mixed(7, 400, 2, prompts=(20, 400), outputs=(2, 80))
    order = np.argsort(requests.tenant, kind="stable")  # all of `a` have come before the first of `b`
    columns = {name: getattr(requests, name)[order] for name in ("prompt_tokens", "output_tokens", "tenant")}
    requests = trace(np.zeros(400), **columns, tenants=("a", "b"))
    longest = int((requests.prompt_tokens + requests.output_tokens).max())
    bound = 2 * max(int(requests.prompt_tokens.max()), 2 * slots * longest)
    assert widest(requests, "fair", slots) <= bound
    assert widest(requests, "fcfs", slots) > 3 * bound


def test_a_tenant_that_comes_back_has_saved_up_nothing() -> None:
    """`b` is idle while `a` is served for long; then both flood. From its return on they get the same."""
    n = 60
    arrival_s = np.concatenate([np.zeros(n), np.full(2 * n, 1000.0)])
    tenant = np.concatenate([np.zeros(n, int), np.arange(2 * n) % 2])
    requests = trace(arrival_s, 300, 30, tenant=tenant, tenants=("a", "b"))
    result = simulate(requests, setup("full", scheduler="fair", max_num_seqs=4)).requests
    late = result["admitted_s"][n:]
    halves = [np.sort(late[x::2]) for x in (0, 1)]
    # Had `b` its savings, it would have all of its requests served before the second of `a`.
    assert np.all(halves[0][1:] <= [*halves[1][2:], np.inf])
    assert np.all(halves[1][1:] <= [*halves[0][2:], np.inf])


@pytest.mark.parametrize("fidelity", ["step", "op"])
def test_the_turn_passes_in_the_midst_of_a_run_of_decode_steps(fidelity: str) -> None:
    """`a` decodes, and its next prompt is too large to run beside that; `b` has a small one, but more service so far.

    At the first token of `a` its counter is 1000 + 20, that of `b` 1500 + 20; each step adds 20 to the first: it is
    above the second after 26.
    """
    options = {"scheduler": "fair", "kv_cache_tokens": 15_000, "output_token_weight": 20.0}
    large = setup("full", **options).capacity()[0] // 131072 - 600
    requests = trace(np.zeros(4), [1000, 1500, large, 100], [60, 1, 2, 2], tenant=[0, 1, 0, 1], tenants=("a", "b"))
    times = simulate(requests, setup("full", fidelity=fidelity, **options)).requests
    alone = simulate(trace([0.0], 1000, 1 + 26), setup("full", **options)).requests
    steps_s = alone["finish_s"][0] - alone["first_token_s"][0]
    assert times["admitted_s"][3] - times["first_token_s"][0] == pytest.approx(steps_s, rel=1e-9)
    assert times["admitted_s"][2] == times["finish_s"][0]


@pytest.mark.parametrize("fidelity", ["step", "op"])
@pytest.mark.parametrize(("steps", "third"), [(9, "b"), (10, "a")])
def test_who_arrives_in_the_midst_of_a_run_is_lifted_to_the_counters_of_then(
    fidelity: str, steps: int, third: str
) -> None:
    """One sequence at a time. `b` arrives when `a` has 1000 + 20 (1 + steps); each of its requests adds 90 + 20 x 10.

    At the end of its first request `a` has 1000 + 20 x 40. After two requests `b` has as much, and came later, if it
    arrived after 10 steps; it is 20 short of that if it arrived after 9.
    """
    options = {"scheduler": "fair", "max_num_seqs": 1, "output_token_weight": 20.0}
    ends_s = [
        simulate(trace([0.0], 1000, 1 + n), setup("full", **options)).requests["finish_s"][0]
        for n in (steps, steps + 1)
    ]
    arrival_s = [0.0, 0.0, *[sum(ends_s) / 2] * 3]
    requests = trace(
        arrival_s, [1000, 1000, 90, 90, 90], [40, 40, 10, 10, 10], tenant=[0, 0, 1, 1, 1], tenants=("a", "b")
    )
    admitted_s = simulate(requests, setup("full", fidelity=fidelity, **options)).requests["admitted_s"]
    order = np.argsort(admitted_s, kind="stable").tolist()
    assert order == [0, 2, 3, *([4, 1] if third == "b" else [1, 4])]
