"""What docs/limits.md says is not modelled, seen in what is predicted: whoever models it finds the sentence here."""

from dataclasses import replace

import pytest
from cached_prompts import prompts
from simulated import GPU, HOST, MODEL, setup, trace

from kvsim.run.simulate import simulate

GIB = 1 << 30


def test_a_sequence_holds_its_tokens_and_no_blocks():
    """One prompt of 1,001 tokens and three tokens out: 1,003 rows of keys and values, and no page of 16 beyond."""
    result = simulate(trace([0.0], 1001, 3), setup("full"))
    row_bytes = 2 * 8 * 128 * 2 * MODEL.n_layers
    assert result.memory["gpu0.hbm"]["peak_bytes"] == MODEL.weight_bytes + 1003 * row_bytes


def test_thread_blocks_are_not_charged_in_waves():
    """The number of SMs, by which blocks would come in waves, changes nothing where rates stay."""
    times = [
        simulate(trace([0.0], 9000, 20), setup("full", gpu=replace(GPU, sms=sms))).requests["finish_s"][0]
        for sms in (GPU.sms, 2 * GPU.sms)
    ]
    assert times[0] == times[1]


def test_copies_take_none_of_the_bandwidth_of_hbm():
    """Over a link without limits, decoding from DDR reads from HBM what decoding in HBM does, and takes as long.

    Each step brings 8,000 tokens' rows into HBM. Beside weights of 16 GB and the same rows read once, their writing
    would make a step 6 % longer.
    """
    gpu = replace(GPU, rates=replace(GPU.rates, pcie_h2d_Bps=1e18, pcie_d2h_Bps=1e18, pcie_latency_s=0.0, launch_s=0.0))
    host = replace(HOST, ddr_Bps=1e18, switch_Bps=1e18)
    results = [
        simulate(trace([0.0], 8000, 40), setup(policy, gpu=gpu, host=host)) for policy in ("full", "offload-all")
    ]
    decode_s = [float(r.requests["finish_s"][0] - r.requests["first_token_s"][0]) for r in results]
    assert results[1].traffic["ddr->hbm"]["plans"] > 39 * 8000 * 131072
    assert decode_s[1] == pytest.approx(decode_s[0], rel=0.02)


def test_nobody_waits_for_what_is_written_to_a_cache():
    """Prompts that find nothing have their first token when they would have it without a cache, which is written."""
    requests = prompts([range(500), range(1000, 1500)])
    without, cached = (
        simulate(requests, setup("full", **options)) for options in ({}, {"prefix_cache_ddr_bytes": GIB})
    )
    assert cached.requests["first_token_s"].tolist() == without.requests["first_token_s"].tolist()
    assert cached.traffic["hbm->ddr"]["prefix"] > 0


def test_no_head_is_copied_from_one_replica_to_another():
    """The second of equal prompts goes to the other replica, whose cache in HBM is empty, and computes all of it."""
    requests = prompts([range(100), range(100), range(100)])
    result = simulate(requests, setup("full", gpus=2, prefix_cache_hbm_bytes=8 * GIB))
    assert result.requests["replica"].tolist() == [0, 1, 0]
    cached = result.requests["cached_tokens"].tolist()
    assert cached[:2] == [0, 0]
    assert cached[2] > 0


def test_lazyllm_is_charged_the_products_of_all_tokens():
    """Its deeper layers compute 64 % of the tokens; the first token comes no sooner than the products of all allow."""
    n, gpu = 8000, replace(GPU, rates=replace(GPU.rates, launch_s=0.0))
    result = simulate(trace([0.0], n, 1), setup("lazyllm", gpu=gpu, max_num_batched_tokens=n))
    layers = sum(x.qkv_params + x.out_params + x.mlp_active_params for x in MODEL.layers)
    assert result.requests["first_token_s"][0] > 2 * n * layers / gpu.rates.flops("bf16")


def test_layers_that_predict_several_tokens_take_no_memory():
    with_them = replace(MODEL, predictor_params=MODEL.params)
    peaks = [
        simulate(trace([0.0], 100, 2), setup("full", model=model)).memory["gpu0.hbm"]["peak_bytes"]
        for model in (MODEL, with_them)
    ]
    assert peaks[0] == peaks[1]


def test_sessions_are_not_swapped_to_drives():
    """Where DDR is full the oldest state is dropped, though the host has drives."""
    requests = trace([0.0, 10.0, 20.0], 30_000, 2, session=[0, 1, 2])
    result = simulate(requests, setup("full", session_kv="swap", host_memory_utilization=0.004))
    assert HOST.nvme_bytes > 0
    assert not any("nvme" in link for link in result.traffic)
    assert result.session_kv["evicted"] + result.session_kv["dropped"] > 0
