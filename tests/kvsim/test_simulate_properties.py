"""What must hold of any small scenario: memory tight or ample, one replica or several, any chunk, cache and policy."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from simulated import GPU, HOST, MODEL, setup, trace

from kvsim.simulate import simulate
from policies import reuse_of, Reuse

SMALL = replace(MODEL, name="small", layers=MODEL.layers[:3])
TOKEN_BYTES = 2 * 2 * 8 * 128 * 3  # keys and values of 8 heads of 128, bf16, three layers
BLOCK = 64
POLICIES = (
    "full",
    "offload-all",
    "sink-window:window_tokens=200",
    "snapkv:budget_tokens=256",
    "quest:budget_tokens=256",
    "shadowkv:budget_tokens=256",
    "retrieval-attention",
    "infllm",
    "squeezed-attention:tier=ddr,levels=2",
    "full@layers=0-1+offload-all",
    "full@heads=2+sink-window@heads=6",
    "full@below=300+offload-all",
)


@st.composite
def requests(draw, n, squeezed):
    """Columns of a trace; when squeezed, one burst of prompts so short that outputs outgrow the memory."""
    n = draw(st.sampled_from(range(1, n + 1)))
    lengths = (40, 200) if squeezed else (1, 1200)
    columns = (
        st.integers(*lengths) | st.sampled_from([1, BLOCK, 10 * BLOCK]),
        st.integers(1, 250) | st.just(1),
        st.just(0.0) if squeezed else st.floats(0, 0.2) | st.just(0.0),
    )
    return [draw(st.lists(column, min_size=n, max_size=n)) for column in columns]


@st.composite
def scenarios(draw, caches=True, n=8):
    """A trace of a few short requests, and a cluster that may be too small for some of them."""
    squeezed = draw(st.booleans())
    prompts, outputs, gaps = draw(requests(n, squeezed))
    s = setup(
        draw(st.sampled_from(POLICIES)),
        model=SMALL,
        fidelity=draw(st.sampled_from(["step", "op"])),
        tp=draw(st.sampled_from([1, 2])),
        gpus=2 if squeezed else draw(st.sampled_from([2, 4])),
        router=draw(st.sampled_from(["round-robin", "least-loaded"])),
        preemption=draw(st.sampled_from(["swap", "recompute"])),
        max_num_seqs=draw(st.sampled_from([8, 1, 2, 4])),
        max_num_batched_tokens=draw(st.sampled_from([16, 100, 512, 8192])),
        gpu_memory_utilization=1.0,
        host_memory_utilization=1.0,
    )
    columns = {}
    if caches:
        chains = draw(st.lists(st.integers(0, 2), min_size=len(prompts), max_size=len(prompts)))
        counts = [prompt // BLOCK for prompt in prompts]
        ids = [1000 * chain + i for chain, count in zip(chains, counts, strict=True) for i in range(count)]
        columns = {"block_tokens": BLOCK, "block_ids": ids, "block_counts": counts}
        hbm_cache, ddr_cache = (draw(st.sampled_from([0, 3, 10, 1000])) * BLOCK * TOKEN_BYTES for _ in range(2))
        s = replace(s, prefix_cache_hbm_bytes=hbm_cache, prefix_cache_ddr_bytes=ddr_cache)
    largest = max(prompt + output for prompt, output in zip(prompts, outputs, strict=True))
    shares = st.sampled_from([1.0, 1.02, 1.3, 1.6, 2.0, 2.5, 100.0, 0.7])
    hbm, ddr = (int(1 + draw(shares) * largest) * TOKEN_BYTES // s.tp for _ in range(2))
    ranks = s.replicas_per_host * s.tp
    hbm += s.rank.weight_bytes + s.activation_bytes + s.prefix_cache_hbm_bytes // ranks
    gpu, host = replace(GPU, memory_bytes=hbm), replace(HOST, ddr_bytes=s.prefix_cache_ddr_bytes + ddr * ranks)
    return trace(np.cumsum(gaps), prompts, outputs, **columns), replace(s, gpu=gpu, host=host)


def bounded(requests, s):
    """The result; fails when the simulation does not come to an end."""
    rounds = iter(range(200))

    def progress(_):
        assert next(rounds, None) is not None, "a million events and no end"

    return simulate(requests, s, progress)


@settings(max_examples=400)
@given(scenarios())
def test_any_scenario(scenario):
    requests, s = scenario
    result = bounded(requests, s)
    r = result.requests
    done, rejected = r["status"] == "finished", r["status"] == "rejected"
    event(f"rejected {rejected.any()} preempted {(r['preemptions'] > 0).any()} swaps {result.swaps['count'] > 0}")
    assert (done | rejected).all()
    # time
    assert (r["arrival_s"] <= r["admitted_s"])[done].all()
    assert (r["admitted_s"] < r["first_token_s"])[done].all()
    assert (r["first_token_s"] <= r["finish_s"])[done].all()
    assert ((r["first_token_s"] == r["finish_s"]) == (r["output_tokens"] == 1))[done].all()
    for replica in range(s.replicas):
        admitted = r["admitted_s"][r["replica"] == replica]
        assert (np.diff(admitted[~np.isnan(admitted)]) >= 0).all()
    # tokens
    assert (r["cached_tokens"] < r["prompt_tokens"]).all()
    gaps, tokens = result.token_gaps
    started = rejected & ~np.isnan(r["first_token_s"])
    if not started.any():
        assert tokens.sum() == (r["output_tokens"] - 1)[done].sum()
        assert np.dot(gaps, tokens) == pytest.approx(
            (r["finish_s"] - r["first_token_s"])[done].sum(), rel=1e-6, abs=1e-12
        )
    assert gaps[tokens > 0].min(initial=1.0) > 0
    # memory
    weights = s.rank.weight_bytes
    hbm, ddr, _ = s.capacity()
    series = result.series
    assert series["hbm_bytes"].max() <= s.tp * s.gpu.memory_bytes - s.tp * s.activation_bytes
    assert series["ddr_bytes"].max() <= s.host.ddr_bytes
    for replica in range(s.replicas):
        own = series["replica"] == replica
        assert (np.diff(series["time_s"][own]) >= 0).all()
        assert series["running"][own][-1] == series["waiting"][own][-1] == 0
        if not (s.prefix_cache_hbm_bytes or s.prefix_cache_ddr_bytes):
            assert series["hbm_bytes"][own][-1] == s.tp * weights
            assert series["ddr_bytes"][own][-1] == 0
    for node in result.memory.values():
        assert node["mean_bytes"] <= node["peak_bytes"] * (1 + 1e-12)
        assert node["peak_bytes"] <= node["capacity_bytes"]
    # links
    for link, causes in result.traffic.items():
        assert result.links[link]["bytes"] == sum(causes.values())
        assert 0 <= result.links[link]["utilization"]
    assert result.swaps["bytes"] == result.traffic["hbm->ddr"]["swaps"] + result.traffic["ddr->hbm"]["swaps"]


@settings(max_examples=150)
@given(scenarios(caches=False, n=5))
def test_nothing_is_faster_than_alone(scenario):
    requests, s = scenario
    s = replace(s, fidelity="step")
    result = bounded(requests, s)
    r = result.requests
    for i in np.flatnonzero(r["status"] == "finished"):
        alone = simulate(trace([0.0], requests.prompt_tokens[i : i + 1], requests.output_tokens[i : i + 1]), s).requests
        for name in ("first_token_s", "finish_s"):
            assert r[name][i] - r["arrival_s"][i] >= alone[name][0] * (1 - 1e-9) - 1e-12, (name, i)
