"""What holds whoever is next: books that balance, quotas, equal terms, pinned tenants, both fidelities."""

import numpy as np
import pytest
from simulated import setup, trace
from tenants import TIMES, alone, mixed, same, turns

from kvsim.results.summary import summarize
from kvsim.run.simulate import simulate
from kvsim.scenario.choices import SCHEDULERS
from kvsim.scenario.tenants import Tenant
from traces import Trace

TIGHT = {"kv_cache_tokens": 13_388, "max_num_batched_tokens": 1024}


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
    told = summarize(results[0])["preemptions"]
    assert told["count"] == told["by_swap"] + told["by_recomputation"] == results[0].requests["preemptions"].sum()
    assert bool(told["recomputed_tokens"]) == bool(told["by_recomputation"]) == (preemption == "recompute")
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
    done = engine.cluster.requests
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
    options = {"scheduler": scheduler, "tenants": tenants, "max_num_seqs": 6, **TIGHT, "kv_cache_tokens": 14_366}
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
    both = simulate(requests, setup(policy, gpus=gpus, router=router, tenants=tenants))
    together, itl_s = both.requests, {name: own["itl_s"] for name, own in summarize(both)["tenants"].items()}
    for code in (0, 1):
        rows = requests.tenant == code
        lone = simulate(alone(requests, code), setup(policy, gpus=half, router=router))
        by_itself, gaps = lone.requests, summarize(lone)["itl_s"]
        own = {name: column[rows] for name, column in together.items()}
        assert np.array_equal(own["replica"] - code * half, by_itself["replica"])
        exact = [name for name in own if name not in ("request", "tenant", "replica", "session", "status")]
        assert same(own, by_itself, names=exact)
        mean_s, lone_mean_s = itl_s["ab"[code]].pop("mean"), gaps.pop("mean")
        assert itl_s["ab"[code]] == gaps
        assert mean_s == pytest.approx(lone_mean_s, rel=1e-12)  # summed in another order
