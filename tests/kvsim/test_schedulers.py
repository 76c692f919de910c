"""Whose request is next: the Virtual Token Counter against its paper, priorities, quotas, pinned tenants."""

from collections.abc import Iterator

import numpy as np
import pytest
from scenarios import SMALL, TOKEN_BYTES, with_room
from simulated import setup, trace

from kvsim.engine.engine import Engine
from kvsim.engine.state import WAITING, Records
from kvsim.results import summarize
from kvsim.setup import SCHEDULERS
from kvsim.simulate import _Cluster, simulate
from kvsim.tenants import Tenant
from traces import Trace

TIMES = ("admitted_s", "first_token_s", "finish_s")


def mixed(seed: int, n: int, tenants: int, *, span_s: float = 0.0, prompts=(50, 500), outputs=(1, 60)) -> Trace:
    """Requests of several tenants, random in everything; all of them at once when the span is 0."""
    rng = np.random.default_rng(seed)
    return trace(
        np.sort(rng.uniform(0, span_s, n)),
        rng.integers(*prompts, n),
        rng.integers(*outputs, n),
        tenant=rng.integers(0, tenants, n),
        tenants=tuple("abcdef"[:tenants]),
    )


def turns(requests: Trace, options: dict) -> Iterator[Engine]:
    """The engine after each turn of its replicas."""
    cluster = _Cluster(requests, setup("full", **options))
    while cluster.engine.play(1):
        yield cluster.engine


def same(one: dict, two: dict, names=TIMES) -> bool:
    return all(np.array_equal(one[name], two[name], equal_nan=True) for name in names)


# -- fair ------------------------------------------------------------------------------------------------------------


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
    options = {"scheduler": "fair", "gpu_memory_utilization": 0.22, "output_token_weight": 20.0}
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


# -- priority --------------------------------------------------------------------------------------------------------


def flood(every_s: float, urgent: int) -> Trace:
    """Far more of `low` than can be served, and now and then a request of `urgent`."""
    low = 120
    arrival_s = np.concatenate([np.linspace(0, 1, low), every_s * (1 + np.arange(urgent))])
    order = np.argsort(arrival_s, kind="stable")
    prompts = np.concatenate([np.full(low, 6000), np.full(urgent, 7000)])
    outputs = np.concatenate([np.full(low, 300), np.full(urgent, 40)])
    tenant = np.concatenate([np.zeros(low, int), np.ones(urgent, int)])
    return trace(arrival_s[order], prompts[order], outputs[order], tenant=tenant[order], tenants=("low", "urgent"))


def alone(requests: Trace, code: int) -> Trace:
    rows = requests.tenant == code
    return trace(requests.arrival_s[rows], requests.prompt_tokens[rows], requests.output_tokens[rows])


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
@pytest.mark.parametrize("tight", ["slots", "memory"])
def test_an_urgent_tenant_is_served_as_if_it_were_alone(preemption: str, tight: str) -> None:
    options = {"preemption": preemption, "max_num_batched_tokens": 2048}
    options |= {"max_num_seqs": 4} if tight == "slots" else {"gpu_memory_utilization": 0.3}
    requests = flood(1.7, 6)
    mine = requests.tenant == 1
    base = simulate(alone(requests, 1), setup("full", **options)).requests
    base_s = base["first_token_s"] - base["arrival_s"]
    found = {}
    for scheduler in ("fcfs", "priority"):
        s = setup("full", scheduler=scheduler, tenants={"urgent": Tenant(priority=1)}, **options)
        result = simulate(requests, s)
        assert np.all(result.requests["status"] == "finished")
        found[scheduler] = (result.requests["first_token_s"] - result.requests["arrival_s"])[mine]
        if scheduler == "priority":
            assert result.requests["preemptions"][~mine].sum() > 0
            assert result.requests["preemptions"][mine].sum() == 0
            assert bool(result.swaps["count"]) == (preemption == "swap")
    # What is left: the end of an iteration under way (at most a whole chunk of a prompt), a swap before the next one,
    # and decode steps of others beside its own prompt. An iteration of 2,048 tokens takes some 0.05 s here.
    assert np.all(found["priority"] >= base_s - 1e-9)
    assert np.all(found["priority"] <= base_s + 0.2)
    assert found["fcfs"].mean() > 20 * found["priority"].mean()


def test_with_one_sequence_at_a_time_an_urgent_request_waits_for_an_iteration_only() -> None:
    """Preemptive priority: from then on it takes exactly what it takes alone, to its last token."""
    requests = flood(1.7, 6)
    mine = requests.tenant == 1
    options = {"preemption": "recompute", "max_num_seqs": 1, "max_num_batched_tokens": 8192}
    base = simulate(alone(requests, 1), setup("full", **options)).requests
    tenants = {"low": Tenant(priority=-3)}
    times = simulate(requests, setup("full", scheduler="priority", tenants=tenants, **options)).requests
    waited_s = (times["admitted_s"] - times["arrival_s"])[mine]
    longest_s = float(
        base["finish_s"][0] - base["admitted_s"][0]
    )  # a prompt of 6,000 is one iteration, as one of 7,000
    assert np.all((waited_s >= 0) & (waited_s < longest_s))
    took_s = (times["finish_s"] - times["admitted_s"])[mine]
    assert took_s == pytest.approx(base["finish_s"] - base["admitted_s"], rel=1e-9)


def test_a_long_prompt_under_way_lends_its_tokens_to_an_urgent_one() -> None:
    """Of 20 iterations of 2,048 tokens, an urgent prompt of 2,000 takes nearly all of the next one."""
    requests = trace([0.0, 0.3], [40_960, 2000], [1, 1], tenant=[0, 1], tenants=("low", "urgent"))
    options = {"max_num_batched_tokens": 2048}
    base = [simulate(alone(requests, code), setup("full", **options)).requests for code in (0, 1)]
    result = simulate(requests, setup("full", scheduler="priority", tenants={"low": Tenant(priority=-1)}, **options))
    times = result.requests
    longest_s = (base[0]["first_token_s"][0] - base[0]["arrival_s"][0]) / 20 * 1.5  # the last chunk attends to more
    assert times["preemptions"].sum() == 0
    assert 0 <= times["admitted_s"][1] - 0.3 <= longest_s
    assert times["first_token_s"][1] - times["admitted_s"][1] <= longest_s
    # No work is lost: the long prompt ends later by about the time of the urgent one alone.
    later_s = times["finish_s"][0] - base[0]["finish_s"][0]
    assert later_s == pytest.approx(base[1]["first_token_s"][0] - 0.3, rel=0.3)


@pytest.mark.parametrize("ddr_tokens", [1650, 1790])
def test_what_is_swapped_out_does_not_keep_the_urgent_from_running(ddr_tokens: int) -> None:
    """Keys and values lie in DDR: swapping the first request out frees none of that, and the second needs it."""
    tenants = {"urgent": Tenant(priority=1)}
    s = setup("offload-all", model=SMALL, scheduler="priority", preemption="swap", tenants=tenants)
    requests = trace([0.0, 0.05], 900, [300, 50], tenant=[0, 1], tenants=("low", "urgent"))
    result = simulate(requests, with_room(s, 1 << 40, ddr_tokens * TOKEN_BYTES))
    times = result.requests
    assert times["status"].tolist() == ["finished", "finished"]
    assert result.swaps["count"] == 1  # out, and then it is computed anew
    assert times["admitted_s"][1] < 0.052
    assert times["finish_s"][1] < times["finish_s"][0]
    assert result.token_gaps[1].sum() == 299 + 49


def test_among_equals_the_first_comes_first_and_the_urgent_before_them() -> None:
    requests = mixed(3, 40, 3)
    tenants = {"b": Tenant(priority=2), "c": Tenant(priority=1)}
    s = setup("full", scheduler="priority", tenants=tenants, max_num_seqs=1)
    admitted_s = simulate(requests, s).requests["admitted_s"]
    ranked = [i for code in (1, 2, 0) for i in np.flatnonzero(requests.tenant == code)]
    assert np.all(np.diff(admitted_s[ranked]) > 0)


# -- all of them -----------------------------------------------------------------------------------------------------

TIGHT = {"gpu_memory_utilization": 0.21, "max_num_batched_tokens": 1024}


def tight(seed: int, tenants: int) -> Trace:
    """More than a small memory can hold at a time: sequences are preempted."""
    return mixed(seed, 40, tenants, span_s=3.0, prompts=(200, 3000), outputs=(1, 400))


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
@pytest.mark.parametrize("scheduler", ["priority", "fair"])
def test_with_one_tenant_every_scheduler_is_first_come_first_served(scheduler: str, preemption: str) -> None:
    requests = tight(1, 1)
    results = [
        simulate(requests, setup("full", scheduler=x, preemption=preemption, **TIGHT)) for x in ("fcfs", scheduler)
    ]
    assert results[0].requests["preemptions"].sum() > 0
    assert same(*(result.requests for result in results), names=(*TIMES, "preemptions", "cached_tokens"))
    assert same(*(result.series for result in results), names=("time_s", "hbm_bytes", "running", "waiting"))


def test_equal_priorities_are_first_come_first_served() -> None:
    requests = tight(2, 3)
    tenants = {"*": Tenant(priority=5)}
    results = [simulate(requests, setup("full", scheduler=x, tenants=tenants, **TIGHT)) for x in ("fcfs", "priority")]
    assert results[0].requests["preemptions"].sum() > 0
    assert same(*(result.requests for result in results), names=(*TIMES, "preemptions"))


@pytest.mark.parametrize("seed", range(6))
def test_what_is_taken_is_given_back_and_quotas_hold(seed: int) -> None:
    """In every turn, whoever schedules; and all tokens are served once, whatever was preempted."""
    rng = np.random.default_rng(seed)
    requests = tight(100 + seed, 3)
    terms = {
        name: Tenant(priority=int(rng.integers(0, 3)), quota=float(rng.choice([0.35, 0.6, 1.0]))) for name in "abc"
    }
    options = {"scheduler": SCHEDULERS[seed % 3], "preemption": ("swap", "recompute")[seed // 3], "tenants": terms}
    capacity_bytes = setup("full", **TIGHT).capacity()[0]
    for engine in turns(requests, {**options, **TIGHT}):
        records = engine.cluster.tenants[0]
        quotas = np.array([terms[name].quota * capacity_bytes for name in "abc"])
        assert np.all(records["peak_bytes"] <= quotas)
        assert records["held_bytes"].sum() == engine.cluster.replicas[0]["held_bytes"][0]
        assert records["stored_bytes"].sum() == engine.cluster.replicas[0]["stored_bytes"][0]
    done: Records = engine.cluster.requests
    assert engine.left == len(requests)
    assert not any(records[name].any() for name in ("held_bytes", "stored_bytes", "growth_bytes", "decoding", "length"))
    for code in range(3):
        own = (requests.tenant == code) & ~np.isnan(done["finish_s"])
        lost = done[(requests.tenant == code) & (done["rejected"] > 0)]
        assert records[code]["output_tokens"] == requests.output_tokens[own].sum() or len(lost)
        assert records[code]["prompt_tokens"] == requests.prompt_tokens[own].sum() or len(lost)


def test_a_tenant_over_its_quota_waits_and_nobody_else() -> None:
    """`a` floods, at a quota of two of its requests; `b` is served as if `a` had but these."""
    n = 30
    tenant = np.repeat([0, 1], n)
    requests = trace(np.repeat([0.0, 0.001], n), 2000, 50, tenant=tenant, tenants=("a", "b"))
    token_bytes, capacity_bytes = 131072, setup("full").capacity()[0]
    quota = 2.02 * (2000 + 50) * token_bytes / capacity_bytes  # and the margin of 1 %, as of a whole memory
    result = simulate(requests, setup("full", tenants={"a": Tenant(quota=quota)}))
    times = result.requests
    assert np.all(times["status"] == "finished")
    assert np.all(times["admitted_s"][n:] < np.sort(times["admitted_s"][:n])[4])
    moments = times["admitted_s"][:n]
    at_once = [((moments <= t) & (times["finish_s"][:n] > t)).sum() for t in moments]
    assert max(at_once) == 2
    held = summarize(result)["tenants"]["a"]["kv_peak_bytes"]
    assert 2 * 2000 * token_bytes < held <= quota * capacity_bytes


def test_a_request_that_can_never_fit_its_quota_is_rejected() -> None:
    requests = trace([0.0, 0.0, 0.0], [1000, 5000, 5000], 10, tenant=[0, 0, 1], tenants=("a", "b"))
    quota = 3000 * 131072 / setup("full").capacity()[0]
    for scheduler in SCHEDULERS:
        status = simulate(requests, setup("full", scheduler=scheduler, tenants={"a": Tenant(quota=quota)})).requests[
            "status"
        ]
        assert status.tolist() == ["finished", "rejected", "finished"]


@pytest.mark.parametrize(("seed", "policy"), [(0, "full"), (1, "shadowkv"), (3, "full")])
@pytest.mark.parametrize("scheduler", ["priority", "fair"])
def test_both_fidelities_take_the_same_decisions(seed: int, policy: str, scheduler: str) -> None:
    requests = mixed(seed, 16, 3, span_s=1.0, prompts=(300, 6000), outputs=(1, 40))
    tenants = {"a": Tenant(priority=1, weight=2), "b": Tenant(quota=0.4)}
    options = {"scheduler": scheduler, "tenants": tenants, "max_num_seqs": 6, **TIGHT}
    step, op = (simulate(requests, setup(policy, fidelity=x, **options)).requests for x in ("step", "op"))
    assert step["preemptions"].sum() > 0 or scheduler == "fair"
    assert step["preemptions"].tolist() == op["preemptions"].tolist()
    for name in TIMES:
        assert step[name] == pytest.approx(op[name], rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("router", ["round-robin", "least-loaded"])
@pytest.mark.parametrize(("policy", "gpus"), [("full", 4), ("shadowkv", 16)])
def test_two_tenants_on_separate_halves_are_two_separate_runs(policy: str, gpus: int, router: str) -> None:
    """Bit for bit, on halves of one host where the policy leaves it alone, and on two hosts where it does not."""
    requests = mixed(11, 120, 2, span_s=5.0, prompts=(500, 9000), outputs=(1, 80))
    half = gpus // 2
    tenants = {"a": Tenant(replicas=(0, half - 1)), "b": Tenant(replicas=(half, gpus - 1))}
    together = simulate(requests, setup(policy, gpus=gpus, router=router, tenants=tenants)).requests
    for code in (0, 1):
        rows = requests.tenant == code
        by_itself = simulate(alone(requests, code), setup(policy, gpus=half, router=router)).requests
        own = {name: column[rows] for name, column in together.items()}
        assert np.array_equal(own["replica"] - code * half, by_itself["replica"])
        exact = [name for name in own if name not in ("request", "tenant", "replica", "session", "status")]
        assert same(own, by_itself, names=exact)
