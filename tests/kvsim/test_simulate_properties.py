"""What must hold of any small scenario: memory tight or ample, one replica or several, any chunk, cache and policy."""

from dataclasses import replace

import numpy as np
import pytest
from cached_prompts import Cache, paths_of, prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios import BLOCK, SMALL, TOKEN_BYTES, scenarios, squeezes, with_room
from simulated import setup, trace

from kvsim.results.causes import spent_s
from kvsim.run.simulate import simulate
from kvsim.scenario.choices import SCHEDULERS
from kvsim.scenario.tenants import Tenant

TERMS = st.builds(
    Tenant,
    weight=st.sampled_from([0.5, 1.0, 3.0]),
    priority=st.integers(-1, 1),
    quota=st.sampled_from([0.4, 0.9, 1.0]),
)


def bounded(requests, s):
    """The result; fails when the simulation does not come to an end."""
    rounds = iter(range(200))

    def progress(_):
        assert next(rounds, None) is not None, "a million events and no end"

    return simulate(requests, s, progress)


def check_times(r, in_order=True):
    """Every request ends, in the order of causes; each replica admits in the order of arrival, if asked."""
    done = r["status"] == "finished"
    assert (done | (r["status"] == "rejected")).all()
    assert (r["arrival_s"] <= r["admitted_s"])[done].all()
    assert (r["admitted_s"] < r["first_token_s"])[done].all()
    assert (r["first_token_s"] <= r["finish_s"])[done].all()
    assert ((r["first_token_s"] == r["finish_s"]) == (r["output_tokens"] == 1))[done].all()
    for replica in np.unique(r["replica"]) if in_order else ():
        admitted_s = r["admitted_s"][r["replica"] == replica]
        assert (np.diff(admitted_s[~np.isnan(admitted_s)]) >= 0).all()


def check_tokens(result):
    """Each output token after a request's first has one gap, and a request's gaps fill the time between the two."""
    r = result.requests
    done, started = r["status"] == "finished", ~np.isnan(r["first_token_s"])
    gaps_s, tokens = result.token_gaps
    assert (gaps_s[tokens > 0] > 0).all()
    if (done == started).all():  # a request that outgrew the memory has emitted some of its tokens
        assert tokens.sum() == (r["output_tokens"] - 1)[done].sum()
        between_s = (r["finish_s"] - r["first_token_s"])[done].sum()
        assert np.dot(gaps_s, tokens) == pytest.approx(between_s, rel=1e-6, abs=1e-12)


def check_memory(result, s):
    """Never above capacity, and nothing but weights and cached prefixes at the end."""
    series = result.series
    assert series["hbm_bytes"].max() <= s.tp * (s.gpu.memory_bytes - s.reserve_bytes[0])
    for node in result.memory.values():
        assert 0 <= node["mean_bytes"] <= node["peak_bytes"] * (1 + 1e-12)
        assert node["peak_bytes"] <= node["capacity_bytes"]
    for replica in range(s.replicas):
        own = {name: column[series["replica"] == replica] for name, column in series.items()}
        assert (np.diff(own["time_s"]) >= 0).all()
        assert own["running"][-1] == own["waiting"][-1] == 0
        cached = own["hbm_bytes"][-1] - s.tp * s.rank.weight_bytes
        assert 0 <= cached <= s.prefix_cache_hbm_bytes // s.replicas_per_host
        assert 0 <= own["ddr_bytes"][-1] <= s.prefix_cache_ddr_bytes


def check_caches(result):
    """A request reuses all tokens of the blocks that it hit, but one when they are its whole prompt."""
    r = result.requests
    assert (r["cached_tokens"] < r["prompt_tokens"]).all()
    whole = (r["cached_tokens"] == r["prompt_tokens"] - 1) & (r["prompt_tokens"] % BLOCK == 0)
    hit_blocks = sum(tier["hit_blocks"] for tier in result.cache.values())
    assert r["cached_tokens"].sum() + whole.sum() == BLOCK * hit_blocks


def check_traffic(result, returns=True):
    """Links carry the sum of their causes; what was swapped out came back, unless it made way for the urgent."""
    for link, causes in result.traffic.items():
        assert result.links[link]["bytes"] == sum(causes.values())
        assert (result.links[link]["bytes"] > 0) == (result.links[link]["busy_s"] > 0)
    out, back = (result.traffic[link]["swaps"] for link in ("hbm->ddr", "ddr->hbm"))
    assert result.swaps["bytes"] == out + back
    assert out == back if returns else out >= back


def check_attribution(result):
    """Causes add up to every latency, and none takes less than nothing, nor more before the first token than in all."""
    r = result.requests
    done = r["status"] == "finished"
    for phase, begin, end in (("e2e", "arrival_s", "finish_s"), ("ttft", "arrival_s", "first_token_s")):
        parts = np.stack([*spent_s(r, phase).values()])[:, done]
        assert parts.sum(axis=0) == pytest.approx((r[end] - r[begin])[done], rel=1e-12)
        assert (parts >= -1e-9).all()
    assert (np.stack([*spent_s(r, "decode").values()])[:, done] >= -1e-9).all()


def check(result, s):
    """All of the above."""
    check_times(result.requests)
    check_tokens(result)
    check_memory(result, s)
    check_caches(result)
    check_traffic(result)
    check_attribution(result)


@settings(max_examples=60)
@given(scenarios())
def test_any_scenario(scenario):
    requests, s = scenario
    check(bounded(requests, s), s)


@settings(max_examples=40)
@given(scenarios() | squeezes(), st.sampled_from(SCHEDULERS), st.dictionaries(st.sampled_from("abc"), TERMS), st.data())
def test_any_scenario_with_tenants(scenario, scheduler, terms, data):
    """The same whoever schedules, but for the order of admission; and no tenant holds more than its quota."""
    requests, s = scenario
    n = len(requests)
    tenant = np.array(data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)), np.int32)
    s = replace(s, scheduler=scheduler, tenants=terms)
    result = bounded(replace(requests, tenant=tenant, tenants=("a", "b", "c")), s)
    check_times(result.requests, in_order=False)
    check_tokens(result)
    check_memory(result, s)
    check_caches(result)
    check_traffic(result, returns=scheduler != "priority")
    check_attribution(result)
    for name, peak_bytes in result.tenancy.kv_peak_bytes.items():
        assert peak_bytes <= result.tenancy.of(name).quota * s.tp * s.capacity()[0]


@settings(max_examples=40)
@given(squeezes())
def test_memory_that_outputs_outgrow(squeeze):
    requests, s = squeeze
    result = bounded(requests, s)
    check(result, s)
    assert (result.requests["status"] == "finished").all()


@settings(max_examples=15)
@given(squeezes(), st.integers(40, 200), st.integers(50, 250))
def test_equal_requests_finish_in_the_order_of_arrival(squeeze, prompt, output):
    """Whoever came last makes room, and whoever came first returns first; all prompts fit one iteration."""
    requests, s = squeeze
    alike = trace(requests.arrival_s, prompt, output)
    s = replace(s, max_num_batched_tokens=8192, prefix_cache_hbm_bytes=0)
    r = bounded(alike, with_room(s, int(2.3 * (prompt + output)) * TOKEN_BYTES, 10**12)).requests
    assert (r["status"] == "finished").all()
    assert (np.diff(r["finish_s"]) >= 0).all()
    assert r["preemptions"][0] == 0


@settings(max_examples=20)
@given(scenarios(caches=False, most=5))
def test_nothing_is_faster_than_alone(scenario):
    requests, s = scenario
    s = replace(s, fidelity="step")
    r = simulate(requests, s).requests
    for i in np.flatnonzero(r["status"] == "finished"):
        alone = simulate(trace([0.0], requests.prompt_tokens[i : i + 1], requests.output_tokens[i : i + 1]), s).requests
        for name in ("first_token_s", "finish_s"):
            assert r[name][i] - r["arrival_s"][i] >= alone[name][0] * (1 - 1e-9)


@given(
    requests=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=1, max_size=25),
    room=st.integers(0, 12),
)
def test_lru_hits_what_a_stack_of_all_blocks_says(requests, room):
    """Mattson's stack: after a request its blocks are on top, the head first; a tier of C holds the C on top.

    So a larger tier hits all that a smaller one does. A block's id names its whole path, as in any trace.
    """
    chains = paths_of(requests)
    cache = Cache(prompts(chains, BLOCK), hbm=room)
    stack: list[int] = []
    for index, blocks in enumerate(chains):
        expected = next((i for i, block in enumerate(blocks) if block not in stack[:room]), len(blocks))
        assert cache.serve(index)[0] == expected
        stack = blocks + [block for block in stack if block not in blocks]


@settings(max_examples=15)
@given(scenarios(caches=False), scenarios(caches=False))
def test_tenants_on_replicas_of_their_own_do_not_meet(mine, theirs):
    """Alternating requests on two replicas are two runs on one: with the cache in HBM they share nothing."""
    n = min(len(mine[0]), len(theirs[0]))
    arrival_s = mine[0].arrival_s[:n]
    prompts, outputs = (
        np.ravel([getattr(t, name)[:n] for t in (mine[0], theirs[0])], order="F")
        for name in ("prompt_tokens", "output_tokens")
    )
    s = replace(setup("full", model=SMALL, gpus=2, max_num_batched_tokens=100), fidelity=mine[1].fidelity)
    both = simulate(trace(np.repeat(arrival_s, 2), prompts, outputs), s).requests
    for tenant in (0, 1):
        alone = simulate(trace(arrival_s, prompts[tenant::2], outputs[tenant::2]), replace(s, gpus=1)).requests
        for name in ("admitted_s", "first_token_s", "finish_s"):
            assert both[name][tenant::2] == pytest.approx(alone[name], rel=1e-12)
