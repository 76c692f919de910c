"""How the result of a random scenario must change when the scenario is changed."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios import POLICIES, SMALL, faster, scenarios, squeezes, with_room
from simulated import GPU, HOST, setup, trace

from kvsim.plans.guessing import guesser_of
from kvsim.results.causes import spent_s
from kvsim.run.simulate import simulate
from kvsim.scenario.choices import CACHE_ROUTERS
from kvsim.scenario.speculation import Speculation
from policies import leaves
from traces import Trace

EVENTS = ("admitted_s", "first_token_s", "finish_s")
SCHEDULING = st.fixed_dictionaries(
    {
        "scheduler": st.sampled_from(["fcfs", "priority", "fair"]),
        "router": st.sampled_from(["round-robin", "least-loaded", "prefix-affinity", "kv-aware"]),
        "draft": st.sampled_from([None, "lookup", "share"]),
    }
)
NEITHER_RATE_NOR_TIME = {"gather_sm_share", "gpus_max", "ddr_bytes", "cpu_cores", "nvme_bytes", "gpus_per_switch"}

RATES_AND_TIMES = sorted(
    {f.name for figures in (GPU.rates, HOST) for f in fields(figures)} - NEITHER_RATE_NOR_TIME - {"name", "sources"}
)


def scheduled(s, scheduler, router, draft):
    """The scenario with these, where they go with it: some routers look into caches, and guesses need their policy."""
    caches = any(s.prefix_cache_bytes.values())
    if router in CACHE_ROUTERS and not caches:
        router = "least-loaded"
    s = replace(s, scheduler=scheduler, router=router)
    if draft is not None and all(leaf.verifies for leaf in leaves(s.policy)):
        model = None if draft == "lookup" or caches or s.prefill_gpus else s.model
        method = "lookup" if model is None else "draft"
        guesses = Speculation(
            guesses=2, acceptance=(0.6, 0.5), candidates=2, method=method, draft=model, draft_share=0.25
        )
        guessing = replace(s, speculation=guesses)
        taken = guessing.reserve_bytes[0] - s.reserve_bytes[0] + guesser_of(guessing).weight_bytes
        larger = replace(s.gpu, memory_bytes=s.gpu.memory_bytes + math.ceil(taken / s.gpu_memory_utilization))
        s = replace(guessing, gpu=larger)
    return s


@settings(max_examples=25)
@given(scenarios() | squeezes(), SCHEDULING)
def test_in_a_world_twice_as_fast_everything_takes_half_as_long(scenario, scheduling):
    """Every rate and every rate of arrival doubled, every fixed time halved: powers of two, so to the last digits."""
    requests, s = scenario
    s = scheduled(s, **scheduling)
    slow = simulate(requests, s)
    gpu = replace(s.gpu, rates=faster(s.gpu.rates, 2.0))
    fast = simulate(requests.scaled_rate(2.0), replace(s, gpu=gpu, host=faster(s.host, 2.0)))
    for name in EVENTS:
        assert fast.requests[name] == pytest.approx(slow.requests[name] / 2, rel=1e-9, abs=0, nan_ok=True)
    for cause, seconds in spent_s(fast.requests, "e2e").items():
        assert seconds == pytest.approx(spent_s(slow.requests, "e2e")[cause] / 2, rel=1e-9, abs=1e-13, nan_ok=True)
    assert fast.series["time_s"] == pytest.approx(slow.series["time_s"] / 2, rel=1e-9, abs=0)
    for name in ("hbm_bytes", "ddr_bytes", "running", "waiting"):
        assert (fast.series[name] == slow.series[name]).all()
    assert (fast.traffic, fast.cache, fast.swaps) == (slow.traffic, slow.cache, slow.swaps)


def test_every_figure_of_the_hardware_is_a_rate_or_a_time_or_known_to_be_neither():
    """So that the test above cannot miss a new one."""
    for figures in (GPU.rates, HOST):
        fast = faster(figures, 2.0)
        same = {f.name for f in fields(figures) if getattr(fast, f.name) == getattr(figures, f.name)}
        assert same - {"name", "sources"} <= NEITHER_RATE_NOR_TIME


@settings(max_examples=40)
@given(
    policy=st.sampled_from(POLICIES),
    figure=st.sampled_from(RATES_AND_TIMES),
    factor=st.floats(1, 8),
    requests=st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 20), st.floats(0, 0.1)), min_size=1, max_size=4),
    options=st.fixed_dictionaries(
        {
            "max_num_batched_tokens": st.sampled_from([100, 8192]),
            "tp": st.sampled_from([1, 2]),
            "prefix_cache_ddr_bytes": st.sampled_from([0, 1 << 30]),
        }
    ),
)
def test_no_faster_part_slows_a_serial_schedule(policy, figure, factor, requests, options):
    """One request at a time: each one ends no later, and so does the whole."""
    prompts, outputs, gaps = zip(*requests, strict=True)
    blocks = {"block_tokens": 64, "block_ids": [i for n in prompts for i in range(n // 64)]}
    serial = trace(np.cumsum(gaps), prompts, outputs, **blocks, block_counts=[n // 64 for n in prompts])
    s = setup(policy, model=SMALL, max_num_seqs=1, gpus=options["tp"], **options)
    if hasattr(GPU.rates, figure):
        better = replace(s, gpu=replace(GPU, rates=faster(GPU.rates, factor, figure)))
    else:
        better = replace(s, host=faster(HOST, factor, figure))
    before, after = (simulate(serial, x) for x in (s, better))
    for name in ("first_token_s", "finish_s"):
        assert (after.requests[name] <= before.requests[name] * (1 + 1e-9)).all()
    assert after.makespan_s <= before.makespan_s * (1 + 1e-9)


@settings(max_examples=15)
@given(scenarios(caches=False))
def test_a_window_that_covers_everything_is_the_dense_cache(scenario):
    """In times, bytes and memory, with keys rotated where they were; `slot` rotates them anew at every step."""
    requests, s = scenario
    full, window = (
        simulate(requests, replace(s, policy=setup(policy).policy))
        for policy in ("full", "sink-window:positions=original,window_tokens=100000")
    )
    for name in EVENTS:
        assert window.requests[name] == pytest.approx(full.requests[name], rel=1e-12, nan_ok=True)
    assert window.requests["status"].tolist() == full.requests["status"].tolist()
    assert (window.traffic, window.swaps) == (full.traffic, full.swaps)
    assert (window.series["hbm_bytes"] == full.series["hbm_bytes"]).all()


@settings(max_examples=20)
@given(scenarios(caches=False) | squeezes(), st.sampled_from([1.0, 1.3, 2.0, 50.0]), st.integers(0, 10**6))
def test_more_memory_never_lowers_the_number_of_finished_requests(scenario, factor, more_bytes):
    requests, s = scenario
    taken = s.rank.weight_bytes + s.reserve_bytes[0] + s.prefix_cache_hbm_bytes // (s.replicas_per_host * s.tp)
    hbm_bytes, ddr_bytes = s.gpu.memory_bytes - taken, s.capacity()[1]
    larger = with_room(s, int(factor * hbm_bytes) + more_bytes, ddr_bytes)
    before, after = (simulate(requests, x).requests["status"] == "finished" for x in (s, larger))
    assert (after >= before).all()  # of each request: none that finished is rejected now


def head_of(requests, n):
    """The trace's first `n` requests."""
    counts = np.diff(requests.block_offsets)[:n] if requests.block_tokens else None
    return Trace.from_columns(
        name="head",
        arrival_s=requests.arrival_s[:n],
        prompt_tokens=requests.prompt_tokens[:n],
        output_tokens=requests.output_tokens[:n],
        block_tokens=requests.block_tokens,
        block_ids=requests.block_ids[: requests.block_offsets[n]] if requests.block_tokens else (),
        block_counts=counts,
    )


@settings(max_examples=30)
@given(scenarios(most=12), SCHEDULING, st.floats(0.2, 0.9))
def test_what_happens_knows_nothing_of_what_will_arrive(scenario, scheduling, share):
    """Without the last requests everything before their arrival is the same, unless evictions know the future."""
    requests, s = scenario
    if s.prefix_cache_eviction == "belady":
        s = replace(s, prefix_cache_eviction="lru")
    s = scheduled(s, **scheduling)
    n = max(1, int(share * len(requests)))
    whole, head = (simulate(given_trace, s).requests for given_trace in (requests, head_of(requests, n)))
    until_s = requests.arrival_s[n] if n < len(requests) else np.inf
    for name in EVENTS:
        before = whole[name][:n] < until_s
        assert (before == (head[name] < until_s)).all()
        assert head[name][before] == pytest.approx(whole[name][:n][before], rel=1e-12)
    over = whole["finish_s"][:n] < until_s
    for name in ("replica", "cached_tokens", "preemptions", "output_tokens", "status"):
        assert (head[name] == whole[name][:n])[over].all()
    for cause, seconds in spent_s(head, "e2e").items():
        assert seconds[over] == pytest.approx(spent_s(whole, "e2e")[cause][:n][over], rel=1e-9, abs=1e-12)
