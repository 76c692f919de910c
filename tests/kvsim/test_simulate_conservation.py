"""What every simulation must conserve: tokens, bytes, time."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from simulated import MODEL, random_trace, setup, trace

from kvsim.results.summary import summarize
from kvsim.run.simulate import simulate
from policies import POLICIES, Step, parse_policy, plan_layer
from policies.plan import moved_bytes

ALL = [*POLICIES, "squeezed-attention:levels=2,tier=ddr", "quest:per=query_head", "full@layers=0-3+shadowkv"]


@pytest.mark.parametrize("policy", ALL)
def test_copied_bytes_are_those_of_the_plans(policy):
    """With one chunk per prompt, PCIe bytes are the sum over requests, steps and layers of the plans' copies."""
    requests = random_trace(1, 6, prompts=(2000, 12000), outputs=(1, 9))
    result = simulate(requests, setup(policy, max_num_batched_tokens=1 << 17, max_num_seqs=64, gpus=1))
    expected: Counter[str] = Counter()
    for prompt, output in zip(requests.prompt_tokens.tolist(), requests.output_tokens.tolist(), strict=True):
        steps = [Step(prompt_tokens=prompt, past_tokens=0, new_tokens=prompt)]
        steps += [Step.decoding(prompt, g) for g in range(1, output)]
        for step in steps:
            for layer in range(MODEL.n_layers):
                plan = plan_layer(parse_policy(policy), MODEL, step, layer)
                totals = {c.name: c.expected() for c in plan.counts}
                for (src, dst), nbytes in moved_bytes(plan.ops, plan.buffers, totals).items():
                    expected[f"{src}->{dst}"] += nbytes
    for link in ("ddr->hbm", "hbm->ddr"):
        assert result.traffic[link] == {
            "plans": expected[link],
            "weights": 0,
            "swaps": 0,
            "prefix": 0,
            "collectives": 0,
            "handoff": 0,
        }


def test_hbm_reads_of_the_dense_cache_by_hand():
    """One request, three tokens out: every pass over the cache, append, query and output row, and the weights."""
    prompt, kv_row, q_row = 1000, 2 * 8 * 128 * 2, 32 * 128 * 2
    result = simulate(trace([0.0], prompt, 3), setup("full"))
    prefill = (
        prompt * (2 * kv_row + 2 * q_row) + prompt * kv_row
    )  # append reads and writes, q and out, one pass over KV
    decode = sum((2 * kv_row + 2 * q_row) + (prompt + g) * kv_row for g in (1, 2))
    assert result.traffic["hbm->sm"]["plans"] == MODEL.n_layers * (prefill + decode)
    layers = sum(x.qkv_params + x.out_params + x.mlp_params for x in MODEL.layers)
    assert result.traffic["hbm->sm"]["weights"] == 3 * 2 * (layers + MODEL.head_params)  # bf16, three iterations


@pytest.mark.parametrize("policy", ["full", "shadowkv", "offload-all"])
@pytest.mark.parametrize("fidelity", ["step", "op"])
def test_tokens_in_are_tokens_out(policy, fidelity):
    requests = random_trace(2)
    result = simulate(requests, setup(policy, fidelity=fidelity, gpus=2, max_num_batched_tokens=4096))
    assert (result.requests["status"] == "finished").all()
    gaps, tokens = result.token_gaps
    assert tokens.sum() == (requests.output_tokens - 1).sum()
    # The gaps of a request add up to the time from its first token to its last.
    assert np.dot(gaps, tokens) == pytest.approx(
        (result.requests["finish_s"] - result.requests["first_token_s"]).sum(), rel=1e-9
    )
    assert summarize(result)["tokens"]["output"] == requests.output_tokens.sum()


@pytest.mark.parametrize("policy", ALL)
def test_everything_allocated_is_freed(policy):
    """After the last request only the weights remain."""
    result = simulate(random_trace(3), setup(policy, max_num_batched_tokens=4096))
    assert result.series["hbm_bytes"][-1] == MODEL.weight_bytes
    assert result.series["ddr_bytes"][-1] == 0
    assert result.series["running"][-1] == result.series["waiting"][-1] == 0


@pytest.mark.parametrize("fidelity", ["step", "op"])
def test_memory_over_time_by_hand(fidelity):
    """The prompt is reserved while it is processed; each decode step then holds a token more; nothing stays."""
    prompt, output, idle_s = 8000, 41, 5.0
    s = setup("full", max_num_batched_tokens=2000, fidelity=fidelity)
    result = simulate(trace([1.0, 1.0 + idle_s], [prompt, 1], [output, 1]), s)
    r, node = result.requests, result.memory["gpu0.hbm"]
    assert node["peak_bytes"] == MODEL.weight_bytes + (prompt + output - 1) * 131072
    prefill_s, decode_s = r["first_token_s"][0] - 1.0, r["finish_s"][0] - r["first_token_s"][0]
    # Steps hold prompt + 1 to prompt + output - 1 tokens and take the same time but for what a token adds, below 1e-4.
    held_s = prompt * prefill_s + (prompt + output / 2) * decode_s + 1 * (r["finish_s"][1] - r["arrival_s"][1])
    mean_bytes = MODEL.weight_bytes + 131072 * held_s / result.makespan_s
    assert node["mean_bytes"] - MODEL.weight_bytes == pytest.approx(mean_bytes - MODEL.weight_bytes, rel=1e-4)


@pytest.mark.parametrize("fidelity", ["step", "op"])
def test_a_prompt_of_one_output_token_leaves_nothing_behind(fidelity):
    result = simulate(trace([0.5], 3000, 1), setup("full", fidelity=fidelity))
    assert result.series["hbm_bytes"][-1] == MODEL.weight_bytes
    assert result.series["running"][-1] == 0


@pytest.mark.parametrize("policy", ["full", "offload-all", "shadowkv", "retrieval-attention", "infllm"])
def test_no_link_above_its_bandwidth(policy):
    s = setup(policy, gpus=4, max_num_batched_tokens=4096)
    result = simulate(random_trace(4, 40, outputs=(1, 60)), s)
    rates, ranks = s.gpu.rates, s.gpus
    peak = {
        "hbm->sm": rates.hbm_Bps * ranks,
        "ddr->hbm": rates.pcie_h2d_Bps * ranks,
        "hbm->ddr": rates.pcie_d2h_Bps * ranks,
        "ddr->cpu": max(s.host.ddr_Bps, s.host.random_Bps(1 << 30)),
    }
    for link, most in peak.items():
        assert result.links[link]["bytes"] <= most * result.makespan_s
        assert 0 <= result.links[link]["utilization"] <= 1 + 1e-9


def test_the_same_inputs_give_the_same_bytes():
    s, requests = setup("shadowkv", gpus=2, max_num_batched_tokens=2048), random_trace(5, 30)
    first, second = simulate(requests, s), simulate(requests, s)
    for name, column in first.requests.items():
        assert column.tobytes() == second.requests[name].tobytes() if column.dtype != object else True
    assert first.series["time_s"].tobytes() == second.series["time_s"].tobytes()
    assert (first.traffic, first.links, first.memory) == (second.traffic, second.links, second.memory)


def test_links_are_the_sum_of_their_causes():
    s = setup("full", tp=2, gpus=2, max_num_batched_tokens=2048)
    result = simulate(random_trace(6), s)
    for link, causes in result.traffic.items():
        assert result.links[link]["bytes"] == sum(causes.values())
    # A ring all-reduce sends 2 (tp-1)/tp of the hidden states from each rank, twice a layer, for every token computed.
    requests = result.requests
    tokens = requests["prompt_tokens"].sum() + (requests["output_tokens"] - 1).sum()
    exact = 2 * MODEL.n_layers * tokens * MODEL.hidden_dim * 2 * 2 * (2 - 1) / 2 * 2
    assert result.traffic["gpu->gpu"]["collectives"] == exact


def test_tensor_parallel_ranks_hold_the_whole_cache_between_them():
    requests = trace([0.0], 20000, 2)
    one = simulate(requests, setup("full", max_num_batched_tokens=1 << 16))
    two = simulate(requests, setup("full", max_num_batched_tokens=1 << 16, tp=2, gpus=2))
    held = [
        r.series["hbm_bytes"].max() - ranks * s.rank.weight_bytes
        for r, s, ranks in ((one, setup("full"), 1), (two, setup("full", tp=2, gpus=2), 2))
    ]
    assert held[0] == held[1] == 20001 * 131072


def test_swapped_sessions_come_back_and_finish():
    """Too little HBM for four growing sequences: the last ones leave for DDR and return; every byte goes both ways."""
    requests = trace([0.0, 0.0, 0.0, 0.0], 8000, 400)
    weights = MODEL.weight_bytes
    room = 4 * 8100 * 131072  # a hundred output tokens each
    base = setup("full", max_num_batched_tokens=8000, max_num_seqs=8)
    tight = replace(base, kv_cache_memory_bytes=room)
    result = simulate(requests, tight)
    assert (result.requests["status"] == "finished").all()
    assert result.swaps["count"] >= 2
    assert result.swaps["count"] % 2 == 0
    assert result.traffic["hbm->ddr"]["swaps"] == result.traffic["ddr->hbm"]["swaps"] == result.swaps["bytes"] // 2
    assert result.memory["gpu0.hbm"]["peak_bytes"] <= weights + room
    assert result.requests["preemptions"].sum() == result.swaps["count"] // 2
    recomputed = simulate(requests, replace(tight, preemption="recompute"))
    assert (recomputed.requests["status"] == "finished").all()
    assert recomputed.swaps["count"] == 0
    assert recomputed.requests["preemptions"].sum() > 0
    for r in (result, recomputed):
        assert r.token_gaps[1].sum() == 4 * 399
    assert result.makespan_s > simulate(requests, base).makespan_s


def test_a_request_that_can_never_fit_is_rejected_and_the_others_go_on():
    base = setup("full")
    result = simulate(trace([0.0, 0.0, 0.1], [1000, 900_000, 1000], 5), base)
    assert result.requests["status"].tolist() == ["finished", "rejected", "finished"]
    assert summarize(result)["requests"] == {"submitted": 3, "finished": 2, "rejected": 1, "timed_out": 0}
