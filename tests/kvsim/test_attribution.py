"""Shares of latency against closed forms, against a machine without what they blame, and across fidelities."""

from dataclasses import replace

import numpy as np
import pytest
from scenarios import squeezed
from simulated import GPU, HOST, MODEL, random_trace, setup, trace

from kvsim.hardware.machine import Machine
from kvsim.iteration.busy import BY_COMPUTE, WORK
from kvsim.iteration.clock import Clock
from kvsim.results.causes import CAUSES, spent_s
from kvsim.results.summary import summarize
from kvsim.run.simulate import simulate

INSIDE = CAUSES[2:]


def spent(requests, phase="e2e", of=0):
    """Seconds by cause of one request."""
    return {cause: seconds[of] for cause, seconds in spent_s(requests, phase).items()}


def only(**seconds):
    """These causes, and nothing for the others."""
    return dict.fromkeys(CAUSES, 0.0) | seconds


def test_a_lone_request_by_hand():
    """Every pass over weights and cache, every FLOP and every launch of one prompt and two decode steps."""
    prompt, rates, kv_row, q_row = 1000, GPU.rates, 2 * 8 * 128 * 2, 32 * 128 * 2
    matmul_flops, layers = dict(rates.matmul_flops)["bf16"], MODEL.n_layers
    params = sum(x.qkv_params + x.out_params + x.mlp_params for x in MODEL.layers)
    weights_s = 2 * (params + MODEL.head_params) / rates.hbm_Bps  # bf16
    launches_s = (layers * (3 + 1 + 4 + 1 + 1) + 2) * rates.launch_s  # QKV, out, MLP, append, attend; the head's two
    pairs_flops = 2 * 32 * (128 + 128)  # of a query and a key, all heads: the score and the value
    prefill = only(
        compute=2 * (params * prompt + MODEL.head_params) / matmul_flops
        + layers * prompt * (prompt + 1) // 2 * pairs_flops / rates.attention_flops,  # attention is bound by FLOPs
        hbm=weights_s + layers * prompt * 2 * kv_row / rates.elementwise_Bps,
        overhead=launches_s,
    )
    decode = only(
        compute=2 * 2 * (params + MODEL.head_params) / matmul_flops,
        hbm=2 * (weights_s + layers * 2 * kv_row / rates.elementwise_Bps)
        + layers * sum((prompt + g) * kv_row + 2 * q_row for g in (1, 2)) / rates.hbm_Bps,  # by bytes here
        overhead=2 * launches_s,
    )
    for fidelity in ("step", "op"):
        r = simulate(trace([0.0], prompt, 3), setup("full", fidelity=fidelity)).requests
        assert spent(r, "ttft") == pytest.approx(prefill, rel=1e-9, abs=1e-15)
        assert spent(r, "decode") == pytest.approx(decode, rel=1e-9, abs=1e-15)


INSTANT = {"pcie_h2d_Bps": 1e30, "pcie_d2h_Bps": 1e30, "pcie_latency_s": 0.0, "nvlink_Bps": 1e30}
INSTANT |= {"nvlink_latency_s": 0.0, "sync_s": 0.0}


@pytest.mark.parametrize(
    ("policy", "blamed", "options"),
    [
        ("offload-all", {"pcie"}, {}),
        ("infllm", {"pcie"}, {}),
        ("retrieval-attention", {"cpu"}, {}),
        ("full", {"nvlink"}, {"tp": 2, "gpus": 2}),
        ("quest", set(), {}),
    ],
)
def test_what_is_blamed_beside_the_sms_is_what_its_absence_saves(policy, blamed, options):
    """With instant links and processors a request takes what the SMs had: so the rest was the others' fault."""
    s = setup(policy, max_num_batched_tokens=4096, **options)
    curve = ((1, 1e30),)
    host = replace(HOST, ddr_Bps=1e30, switch_Bps=1e30, cpu_flops=1e30, random_curve=curve)
    instant = replace(s, gpu=replace(GPU, rates=replace(GPU.rates, gather_curve=curve, gather_sm_share=0.0, **INSTANT)))
    requests = trace([0.0], 60_000, 40)
    before, after = (simulate(requests, x).requests for x in (s, replace(instant, host=host)))
    whole, kept = spent(before), spent(after)
    for cause in ("compute", "hbm"):
        assert kept[cause] == pytest.approx(whole[cause], rel=1e-9)
    beside = {"pcie", "nvlink", "cpu"}
    assert sum(kept[cause] for cause in beside) < 1e-9
    saved_s = before["finish_s"][0] - after["finish_s"][0]
    blame_s = sum(whole[cause] for cause in beside) + whole["overhead"] - kept["overhead"]  # waits of the host
    assert saved_s == pytest.approx(blame_s, rel=1e-7, abs=1e-12)
    decode = spent(before, "decode")
    assert {cause for cause in beside if decode[cause] == max(decode[other] for other in beside) > 0} == blamed
    assert (saved_s > 0) == bool(blamed)


def test_preemption_by_hand():
    """200 iterations fill 1,000 tokens with two sequences; then one is away until the other has ended."""
    requests, s = squeezed("step", "swap")
    result = simulate(requests, s)
    r, steps = result.requests, (1000 - 2 * 300) // 2
    first, second = (spent(r, of=i) for i in (0, 1))
    assert r["preemptions"].tolist() == [0, 1]
    out_bytes, back_bytes = (result.traffic[link]["swaps"] for link in ("hbm->ddr", "ddr->hbm"))
    assert out_bytes == back_bytes == (300 + steps + 1) * 2 * 2 * 8 * 128 * 3  # with the token it feeds next
    out_s, back_s = (s.machine().transfer_s(out_bytes, to_hbm=to_hbm) for to_hbm in (False, True))
    assert first["swap"] == pytest.approx(out_s, rel=1e-9)  # its next iteration waits for the other's swap
    # The second leaves after `steps` tokens each, when the first has 400 - 1 - steps to go; its own return is a wait.
    assert second["swap"] == pytest.approx(r["finish_s"][0] - left_s(result) + back_s, rel=1e-9)
    assert spent(r, "ttft", 1)["swap"] == 0


@pytest.mark.parametrize("fidelity", ["step", "op"])
def test_what_preemption_costs_stands_in_the_summary(fidelity):
    """The second of two sequences leaves after 200 tokens of output: by swap, or for 300 + 200 tokens computed anew."""
    for preemption, by_swap, anew in (("swap", 1, 0), ("recompute", 0, 1)):
        summary = summarize(simulate(*squeezed(fidelity, preemption)))
        expected = {"count": 1, "by_swap": by_swap, "by_recomputation": anew, "recomputed_tokens": anew * (300 + 200)}
        assert summary["preemptions"] == expected
        assert summary["swaps"]["count"] == 2 * by_swap  # out and back


def left_s(result):
    """When the only preempted request left its batch: the first time that a sequence waits."""
    series = result.series
    return series["time_s"][np.flatnonzero((series["waiting"] == 1) & (series["running"] == 1))[0]]


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_runs_in_closed_form_are_attributed_as_their_steps_are(preemption):
    """The op fidelity takes every iteration by itself: whatever a run is charged with, it must agree."""
    step, op = (simulate(*squeezed(fidelity, preemption)).requests for fidelity in ("step", "op"))
    for phase in ("e2e", "ttft"):
        for i in (0, 1):
            assert spent(step, phase, i) == pytest.approx(spent(op, phase, i), rel=1e-6, abs=1e-9)
    assert (step["swap_s"][1] > 0.1 * (step["finish_s"] - step["arrival_s"])[1]).all()


@pytest.mark.parametrize("policy", ["full", "shadowkv", "offload-all", "infllm", "retrieval-attention"])
def test_both_fidelities_blame_the_same_on_a_lone_replica(policy):
    requests = random_trace(8, 6)
    step, op = (
        simulate(requests, setup(policy, max_num_batched_tokens=4096, fidelity=f)).requests for f in ("step", "op")
    )
    for phase in ("e2e", "ttft"):
        for cause, seconds in spent_s(step, phase).items():
            assert seconds == pytest.approx(spent_s(op, phase)[cause], rel=1e-5, abs=1e-7)


def test_what_competition_takes_longer_is_blamed_on_what_is_shared():
    """Two GPUs stream their caches at once through a switch for one: PCIe is to blame, and for nothing else."""
    host = replace(HOST, switch_Bps=GPU.rates.pcie_h2d_Bps, gpus_per_switch=2)
    s = setup("offload-all", host=host, gpus=2, max_num_batched_tokens=1 << 14, fidelity="op")
    requests = trace([0.0, 0.0], 12000, 5)
    alone = spent(simulate(trace([0.0], 12000, 5), replace(s, gpus=1)).requests, "decode")
    both = simulate(requests, s).requests
    for i in (0, 1):
        own = spent(both, "decode", i)
        assert own["pcie"] > 1.8 * alone["pcie"]
        rest = {cause: seconds for cause, seconds in own.items() if cause != "pcie"}
        assert rest == pytest.approx({cause: alone[cause] for cause in rest}, rel=1e-9, abs=1e-12)


def test_a_queue_and_a_prefix_by_hand():
    """The second waits for the first to end; the third for blocks that come up from DDR, alone on its replica."""
    block, n = 64, 40
    columns = {"block_tokens": block, "block_ids": [*range(n)] * 3, "block_counts": [n] * 3}
    s = setup("full", max_num_seqs=1, prefix_cache_ddr_bytes=1 << 36)
    result = simulate(trace([0.0, 0.0, 1000.0], n * block, 5, **columns), s)
    r = result.requests
    assert spent(r, of=1)["queue"] == r["finish_s"][0]
    loaded = result.traffic["ddr->hbm"]["prefix"] // 2
    up_s = s.machine().transfer_s(loaded, to_hbm=True)
    assert spent(r, "ttft", 2)["prefix"] == spent(r, of=2)["prefix"] == pytest.approx(up_s, rel=1e-9)
    assert [spent(r, of=i)["prefix"] for i in (0, 1)] == pytest.approx([0.0, up_s], rel=1e-9)


def test_a_request_that_never_ran_was_not_spent_on():
    r = simulate(trace([0.0, 0.0], [1000, 900_000], 3), setup("full")).requests
    assert r["status"].tolist() == ["finished", "rejected"]
    for cause in INSIDE:
        assert np.isnan([r[f"{cause}_s"][1], r[f"ttft_{cause}_s"][1]]).all()


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_the_busy_arithmetic_of_layers_is_what_is_left_of_their_time(dtype):
    """Of a dense model's own layers: their time less weights and launches, at the rate of the weights' type."""
    model = replace(MODEL, weight_dtype=dtype)
    clock = Clock(model, Machine(gpu=GPU, host=HOST))
    busy_s = clock.own_layers(4096).record["busy_s"]
    assert busy_s[WORK] == pytest.approx(busy_s[BY_COMPUTE], rel=1e-5)
