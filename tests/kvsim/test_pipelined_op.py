"""Pipelines in the op fidelity: by hand where stages share a link, where none does as the step fidelity has them."""

from dataclasses import replace

import numpy as np
import pytest
from simulated import GPU, HOST, MODEL, random_trace, setup, trace

from kvsim.run.simulate import simulate

EIGHT = replace(MODEL, name="eight-layers", layers=MODEL.layers[:8])
MANY = {
    "one by one": random_trace(1, 12, span_s=0.5, prompts=(500, 6000), outputs=(5, 20)),
    "at once": trace([0.0] * 8, 3000, 8),
    "a prompt beside decoding": trace([0.0] * 5 + [0.11], [200] * 5 + [9000], [60] * 5 + [4]),
}


def both(requests, s):
    return [simulate(requests, replace(s, fidelity=fidelity)) for fidelity in ("step", "op")]


@pytest.mark.parametrize("requests", MANY.values(), ids=MANY)
@pytest.mark.parametrize(("pp", "tp"), [(2, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("policy", ["full", "quest"])
def test_where_nothing_is_shared_both_fidelities_take_the_same_times(policy, pp, tp, requests):
    """Micro-batches follow one another alike: also where the next iteration sets out and somebody comes after all."""
    step, op = both(requests, setup(policy, model=EIGHT, gpus=pp * tp, pp=pp, tp=tp, max_num_batched_tokens=4096))
    for since, to in (("admitted_s", "first_token_s"), ("first_token_s", "finish_s")):
        latencies_s = (result.requests[to] - result.requests[since] for result in (op, step))
        np.testing.assert_allclose(*latencies_s, rtol=4e-3)
    assert op.makespan_s == pytest.approx(step.makespan_s, rel=1e-3)


@pytest.mark.parametrize("policy", ["full", "offload-all", "shadowkv", "retrieval-attention"])
def test_both_fidelities_move_the_same_bytes(policy):
    """Of requests that come together, so that iterations are of the same ones however long they take."""
    step, op = both(trace([0.0] * 6, 3000, 8), setup(policy, model=EIGHT, gpus=4, pp=4, max_num_batched_tokens=18_000))
    assert op.traffic == step.traffic
    assert op.traffic["gpu->gpu"]["activations"] == 3 * 2 * 4096 * 6 * (3000 + 7)


@pytest.mark.parametrize("per_switch", [1, 2])
def test_stages_load_their_parts_beside_each_other_by_hand(per_switch):
    """A cached prefix of 4,096 tokens: half of its bytes for each of two stages, on one switch or on two."""
    blocks = {"block_tokens": 16, "block_ids": [*range(256), *range(256)], "block_counts": [256, 256]}
    requests = trace([0.0, 50.0], [4096, 4097], 2, **blocks)
    host = replace(HOST, gpus_per_switch=per_switch, switch_Bps=GPU.rates.pcie_h2d_Bps)
    s = setup(model=EIGHT, host=host, gpus=2, pp=2, fidelity="op", prefix_cache_ddr_bytes=1 << 34)
    result = simulate(requests, s)
    (cached,) = result.requests["cached_tokens"][1:]
    nbytes = int(cached) * EIGHT.kv_bytes_per_token
    assert cached > 4000
    expected_s = GPU.rates.pcie_latency_s + nbytes / 2 * per_switch / GPU.rates.pcie_h2d_Bps
    assert result.requests["prefix_s"][1] == pytest.approx(expected_s, rel=1e-9)


def test_stages_on_two_hosts_send_over_the_network():
    """Two requests that do not overlap: each hop of a lone micro-batch takes its bytes over the adapter's share."""
    host = replace(HOST, gpus_max=2, nic_Bps=2e9)
    step, op = both(trace([0.0, 9.0], 60, 20), setup(model=EIGHT, gpus=4, pp=4, host=host))
    np.testing.assert_allclose(op.requests["finish_s"], step.requests["finish_s"], rtol=1e-9)
    assert op.traffic["nic"]["activations"] == 2 * (60 + 19) * 2 * 4096


def test_copies_of_two_stages_take_turns_on_their_switch():
    """Four sequences whose keys and values are all in DDR: a token takes as long as the switch needs for all bytes."""
    host = replace(HOST, gpus_per_switch=2, switch_Bps=5e9)
    for result in both(trace([0.0] * 4, 4000, 24), setup("offload-all", model=EIGHT, host=host, gpus=2, pp=2)):
        token_s = (result.requests["finish_s"] - result.requests["first_token_s"]) / 23
        nbytes = 4 * 4012 * EIGHT.kv_bytes_per_token
        assert token_s == pytest.approx([nbytes / 5e9] * 4, rel=0.03)
