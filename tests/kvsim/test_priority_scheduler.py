"""Priorities: the urgent are served as if they were alone, and nothing keeps them from it."""

import numpy as np
import pytest
from scenarios import SMALL, TOKEN_BYTES, with_room
from simulated import setup, trace
from tenants import alone, mixed

from kvsim.run.simulate import simulate
from kvsim.scenario.tenants import Tenant
from traces import Trace


def flood(every_s: float, urgent: int) -> Trace:
    """Far more of `low` than can be served, and now and then a request of `urgent`."""
    low = 120
    arrival_s = np.concatenate([np.linspace(0, 1, low), every_s * (1 + np.arange(urgent))])
    order = np.argsort(arrival_s, kind="stable")
    prompts = np.concatenate([np.full(low, 6000), np.full(urgent, 7000)])
    outputs = np.concatenate([np.full(low, 300), np.full(urgent, 40)])
    tenant = np.concatenate([np.zeros(low, int), np.ones(urgent, int)])
    return trace(arrival_s[order], prompts[order], outputs[order], tenant=tenant[order], tenants=("low", "urgent"))


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
@pytest.mark.parametrize("tight", ["slots", "memory"])
def test_an_urgent_tenant_is_served_as_if_it_were_alone(preemption: str, tight: str) -> None:
    options = {"preemption": preemption, "max_num_batched_tokens": 2048}
    options |= {"max_num_seqs": 4} if tight == "slots" else {"kv_cache_tokens": 70_000}
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
