"""What the op fidelity moves beside iterations: alone as in closed form, together at max-min shares of a link."""

from dataclasses import replace

import numpy as np
import pytest
from simulated import GPU, HOST, MODEL, random_trace, setup, trace

from kvsim.hardware.machine import Machine
from kvsim.iteration.clock import Clock
from kvsim.results.summary import summarize
from kvsim.run.simulate import simulate

TOKEN_BYTES = 131072  # Llama-3.1-8B, bf16
HEAD_S = Clock(MODEL, Machine(gpu=GPU, host=HOST)).head_s(1)
BLOCK = 512
SLOW_SWITCH = replace(HOST, switch_Bps=10e9, gpus_per_switch=4)


def cached(arrivals, prompts, heads):
    """Prompts of whole blocks whose first ones are those of `heads`, the rest each prompt's own."""
    requests = trace(arrivals, prompts, 2)
    ids, fresh = [], 10_000
    for prompt, head in zip(prompts, heads, strict=True):
        own = prompt // BLOCK - len(head)
        ids += [*head, *range(fresh, fresh + own)]
        fresh += own
    offsets = np.concatenate([[0], np.cumsum([prompt // BLOCK for prompt in prompts])])
    return replace(requests, block_tokens=BLOCK, block_ids=np.array(ids, np.int32), block_offsets=offsets)


def loads(gpus, host, fidelity):
    """Each of `gpus` replicas has computed a head of 8 blocks, then all load theirs from DDR at once: `prefix_s`."""
    heads = [list(range(100 * gpu, 100 * gpu + 8)) for gpu in range(gpus)]
    requests = cached([0.0] * gpus + [50.0] * gpus, [8 * BLOCK] * gpus + [9 * BLOCK] * gpus, heads * 2)
    options = {"gpus": gpus, "host": host, "prefix_cache_ddr_bytes": 100 << 30, "router": "round-robin"}
    return simulate(requests, setup(fidelity=fidelity, **options)).requests["prefix_s"][gpus:]


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_equal_loads_share_a_switch_evenly(gpus):
    """Eight blocks each over a switch of 10 GB/s: n loads take n times as long; step sees those that began before."""
    latency_s, one_s = GPU.rates.pcie_latency_s, 8 * BLOCK * TOKEN_BYTES / 10e9
    assert loads(gpus, SLOW_SWITCH, "op") == pytest.approx(latency_s + gpus * one_s, rel=1e-6)
    assert loads(gpus, SLOW_SWITCH, "step") == pytest.approx(
        [latency_s + (i + 1) * one_s for i in range(gpus)], rel=1e-6
    )


def test_a_load_competes_with_the_copies_of_another_gpu():
    """Two GPUs on a switch, one of which streams half of its layers from DDR: the other's load takes twice as long.

    The rest of a step, in which nothing is fetched, is short beside the copies: a fifth at most.
    """
    head = list(range(8))
    requests = cached([0.0, 40.0, 50.0], [8 * BLOCK, 64 * BLOCK, 9 * BLOCK], [head, [], head])
    requests = replace(requests, output_tokens=np.array([2, 400, 2], np.int64))
    options = {"gpus": 2, "host": SLOW_SWITCH, "prefix_cache_ddr_bytes": 100 << 30, "router": "least-loaded"}
    result = simulate(requests, setup("full@layers=0-15+offload-all", fidelity="op", **options)).requests
    assert result["replica"][1] != result["replica"][2]
    assert result["first_token_s"][1] < 50 < result["finish_s"][1]
    alone_s = 8 * BLOCK * TOKEN_BYTES / 2 / 10e9  # half of the layers are in HBM
    assert 1.8 * alone_s < result["prefix_s"][2] <= 2 * alone_s + GPU.rates.pcie_latency_s


def handed(senders, nic_Bps, fidelity="op"):
    """A prompt on each of `senders` GPUs of a host, all sent to another host at once: how late they are there."""
    host = replace(HOST, gpus_max=senders, gpus_per_switch=senders, nic_Bps=nic_Bps, nic_latency_s=0.0)
    options = {"gpus": 2 * senders, "prefill_gpus": senders, "host": host, "max_num_batched_tokens": 1 << 15}
    requests = simulate(trace([0.0] * senders, 20_000, 3), setup(fidelity=fidelity, **options)).requests
    assert sorted(requests["replica"].tolist()) == list(range(senders, 2 * senders))
    return requests["handoff_s"], requests["first_token_s"]


@pytest.mark.parametrize("senders", [1, 2, 4])
def test_states_of_several_gpus_share_the_adapters_evenly(senders):
    """From the end of the first layer on n states leave through one adapter, at its rate all together."""
    late_s, prefill_s = handed(senders, 2e9)
    all_s = senders * 20_000 * TOKEN_BYTES / 2e9
    first_s = (prefill_s - HEAD_S) / MODEL.n_layers
    assert late_s == pytest.approx(all_s - (prefill_s - first_s), rel=1e-6)


def test_a_window_shows_what_moves_beside_iterations():
    """Loads and stores of prefixes by the time that their bytes take alone, states of prompts by their layers."""
    requests = cached([0.0, 50.0], [8 * BLOCK, 9 * BLOCK], [list(range(8))] * 2)
    seen = {"perfetto": (0.0, 100.0), "fidelity": "op"}
    shown = simulate(requests, setup(prefix_cache_ddr_bytes=100 << 30, **seen)).operations
    took_s = {
        lane: (shown["end_s"] - shown["begin_s"])[shown["lane"] == lane].tolist()
        for lane in ("load", "store", "handoff")
    }
    rates, block_bytes = GPU.rates, BLOCK * TOKEN_BYTES
    up_Bps, down_Bps = (min(rate, HOST.switch_Bps) for rate in (rates.pcie_h2d_Bps, rates.pcie_d2h_Bps))
    assert took_s["load"] == pytest.approx([rates.pcie_latency_s + 8 * block_bytes / up_Bps])
    assert took_s["store"] == pytest.approx(
        [rates.pcie_latency_s + blocks * block_bytes / down_Bps for blocks in (8, 1)]
    )
    assert took_s["handoff"] == []
    shown = simulate(
        trace([0.0], 6000, 2), setup(gpus=2, prefill_gpus=1, max_num_batched_tokens=8192, **seen)
    ).operations
    sent = shown["lane"] == "handoff"
    assert sent.sum() == MODEL.n_layers
    assert set(shown["replica"][sent]) == {0}
    all_s = (shown["end_s"] - shown["begin_s"])[sent].sum()
    assert all_s == pytest.approx(6000 * TOKEN_BYTES / rates.nvlink_Bps, rel=1e-6)


def test_all_reduces_over_pcie_compete_with_offloaded_caches():
    """Without NVLink the ranks' all-reduces take the links that the cache streams over; with it they do not."""
    requests, host = random_trace(3, 4, span_s=1.0, outputs=(4, 8)), replace(HOST, gpus_per_switch=1)
    late = {}
    for nvlink_Bps in (0.0, 400e9):
        gpu = replace(GPU, rates=replace(GPU.rates, nvlink_Bps=nvlink_Bps))
        options = {"gpu": gpu, "host": host, "tp": 2, "gpus": 2}
        step, op = (simulate(requests, setup("offload-all", fidelity=f, **options)) for f in ("step", "op"))
        assert step.traffic == op.traffic
        late[nvlink_Bps] = op.makespan_s / step.makespan_s - 1
    assert late[400e9] == pytest.approx(0, abs=1e-6)
    assert 1e-4 < late[0.0] < 0.1


def test_swaps_take_what_their_bytes_take():
    """Memory for two of three sequences: what is preempted goes down and up over a lone GPU's PCIe."""
    room_bytes = 1500 * TOKEN_BYTES
    options = {"kv_cache_memory_bytes": room_bytes, "preemption": "swap"}
    step, op = (simulate(trace([0.0] * 3, 400, 200), setup(fidelity=f, **options)) for f in ("step", "op"))
    assert step.traffic == op.traffic
    assert op.traffic["hbm->ddr"]["swaps"] > 0
    assert op.requests["finish_s"] == pytest.approx(step.requests["finish_s"], rel=1e-6)


@pytest.mark.parametrize("seed", [0, 4])
def test_the_gap_between_fidelities_stays_bounded_where_prefixes_are_loaded(seed):
    """Step prices a load at the shares of the moment at which it begins, op as it goes: docs/architecture.md."""
    rng = np.random.default_rng(seed)
    heads = [list(range(10 * int(d), 10 * int(d) + 8)) for d in rng.integers(0, 5, 24)]
    requests = cached(np.sort(rng.uniform(0, 10, 24)), [int(n) * BLOCK for n in rng.integers(9, 40, 24)], heads)
    options = {"gpus": 8, "host": SLOW_SWITCH, "prefix_cache_ddr_bytes": 100 << 30, "max_num_batched_tokens": 1 << 15}
    step, op = (simulate(requests, setup(fidelity=f, **options)) for f in ("step", "op"))
    a, b = summarize(step), summarize(op)
    assert step.traffic == op.traffic
    assert 0.99 < step.makespan_s / op.makespan_s < 1.02
    assert 0.99 < a["ttft_s"]["mean"] / b["ttft_s"]["mean"] < 1.10
    assert 0.99 < a["e2e_s"]["mean"] / b["e2e_s"]["mean"] < 1.10


@pytest.mark.parametrize("seed", [3, 8])
def test_the_gap_between_fidelities_stays_bounded_where_adapters_are_shared(seed):
    """Prompts' state that several GPUs of a host send: in step the adapters serve one after the other, in op all."""
    requests = random_trace(seed, 16, span_s=3.0, prompts=(3000, 20000), outputs=(2, 10))
    host = replace(HOST, gpus_max=4, gpus_per_switch=4, nic_Bps=5e9)
    options = {"gpus": 8, "prefill_gpus": 4, "host": host, "max_num_batched_tokens": 1 << 15}
    step, op = (simulate(requests, setup(fidelity=f, **options)) for f in ("step", "op"))
    assert step.traffic == op.traffic
    assert 0.99 < step.makespan_s / op.makespan_s < 1.05
    assert 0.75 < summarize(step)["e2e_s"]["mean"] / summarize(op)["e2e_s"]["mean"] < 1.02
