"""Pipelines in `simulate`: against `explain --pp`'s closed forms, a single stage, and volumes and memory by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from simulated import GPU, HOST, MODEL, random_trace, setup, trace

from kvsim.__main__ import main
from kvsim.explain.pipeline import Pipelined, pipeline_s
from kvsim.models import load_model
from kvsim.results.causes import spent_s
from kvsim.run.simulate import simulate
from kvsim.scenario.stages import held_shares, stage_layers
from policies import Full, Step, parse_policy, resolve
from policies.plan import Tier, stored_bytes

ROW = 4096 * 2  # bytes of a token's activations
FOUR = Pipelined(MODEL, GPU, HOST, pp=4)


def lone(prompt, output, policy="full", **options):
    return simulate(trace([0.0], prompt, output), setup(policy, **options))


def latencies_s(result):
    """TTFT, and the time that the tokens after it take."""
    first_s, finish_s = result.requests["first_token_s"][0], result.requests["finish_s"][0]
    return first_s, finish_s - first_s


@pytest.mark.parametrize(("batch", "tp"), [(1, 1), (8, 1), (6, 2), (21, 1)])
def test_a_steady_batch_takes_what_explain_says(batch, tp):
    """The third token of equal sequences, at the context that its step leaves; also of unequal micro-batches."""
    s = setup(gpus=4 * tp, pp=4, tp=tp, max_num_batched_tokens=batch * 2000)
    second, third = (simulate(trace([0.0] * batch, 2000, outputs), s).requests["finish_s"] for outputs in (2, 3))
    np.testing.assert_allclose(third - second, Pipelined(MODEL, GPU, HOST, pp=4, tp=tp).tpot_s(2002, batch), rtol=1e-9)


def test_sequences_that_begin_together_fill_the_stages_first():
    """The second token of four: one of them through all stages, then the other three on the slowest, the last."""
    s = setup(gpus=4, pp=4, max_num_batched_tokens=8000)
    result = simulate(trace([0.0] * 4, 2000, 2), s)
    stages = [FOUR._decode_s(stage, 2001, 1) for stage in range(4)]
    filled_s = sum(stages) + sum(FOUR.send_s(1)) + 3 * max(stages)
    np.testing.assert_allclose(result.requests["finish_s"] - result.requests["first_token_s"], filled_s, rtol=1e-9)


def test_a_prompt_fills_and_drains_the_stages_as_explain_says():
    whole_s, _ = latencies_s(lone(8000, 1, gpus=4, pp=4, max_num_batched_tokens=8000))
    assert whole_s == pytest.approx(FOUR.costs(8000, 4).prefill_s, rel=1e-9)
    # Chunks follow one another through the stages, each in four micro-batches.
    chunked_s, _ = latencies_s(lone(8000, 1, gpus=4, pp=4, max_num_batched_tokens=2000))
    assert chunked_s == pytest.approx(FOUR.costs(8000, 16).prefill_s, rel=1e-9)


def test_prompts_follow_one_another_without_bubbles():
    """Twelve of them, one an iteration: as many micro-batches as if they were chunks, filled and drained once."""
    result = simulate(trace([0.0] * 12, 4000, 1), setup(gpus=4, pp=4, max_num_batched_tokens=4000))
    chunks = [[FOUR._chunk_s(stage, 4000, 1000 * i, 1000) for stage in range(4)] for i in range(4)]
    assert result.makespan_s == pytest.approx(pipeline_s(chunks * 12, FOUR.send_s(1000)), rel=1e-9)


def test_sequences_circulate_beside_a_prompt():
    """Eight decode, and a prompt comes at eight tokens an iteration: these take about what decode steps take.

    Were the stages to drain between iterations, they would take (4 + 4 - 1) / 4 times as long.
    """
    s = setup(gpus=4, pp=4, max_num_batched_tokens=16)
    result = simulate(trace([0.0] * 8 + [60.0], [200] * 8 + [400], [20_000] * 8 + [1]), s)
    iterations = (400 - 8) / 8
    round_s = (result.requests["first_token_s"][8] - 60.0) / iterations
    assert round_s == pytest.approx(FOUR.tpot_s(9000, 8), rel=0.15)


@pytest.mark.parametrize("policy", ["full", "sink-window", "quest", "snapkv"])
def test_a_lone_request_pays_all_stages_and_the_hops(policy):
    """Nothing overlaps: the time of one GPU and a hop of NVLink before three of four stages; the same weights."""
    one, four = (lone(60, 20, policy, gpus=pp, pp=pp) for pp in (1, 4))
    hops_s = [sum(FOUR.send_s(tokens)) for tokens in (60, 1)]
    for alone_s, piped_s, sent_s in zip(latencies_s(one), latencies_s(four), (hops_s[0], 19 * hops_s[1]), strict=True):
        assert piped_s == pytest.approx(alone_s + sent_s, rel=1e-9)
    for cause in ("weights", "plans"):
        assert four.traffic["hbm->sm"][cause] == one.traffic["hbm->sm"][cause]


@pytest.mark.parametrize("policy", ["full", "shadowkv", "offload-all", "infllm", "full@layers=0-9+quest"])
def test_bytes_of_all_stages_are_those_of_one_and_activations(policy):
    """Of decode steps: a prompt's micro-batches read what the ones before them left once more."""
    moved = {}
    for pp in (1, 4):
        options = {"gpus": pp, "pp": pp, "max_num_batched_tokens": 45_000}
        runs = [simulate(trace([0.0] * 5, 9000, output), setup(policy, **options)) for output in (30, 1)]
        moved[pp] = {
            link: runs[0].traffic[link]["plans"] - runs[1].traffic[link]["plans"]
            for link in ("hbm->sm", "ddr->hbm", "hbm->ddr", "ddr->cpu")
        }
        sent = runs[0].traffic["gpu->gpu"].get("activations")
    assert moved[4] == moved[1]
    assert sum(moved[1].values()) > 0
    assert sent == 3 * ROW * 5 * (9000 + 29)


def test_memory_is_that_of_the_tightest_stage():
    """70B on four GPUs: 20 layers a stage; the last also has the head."""
    model = load_model("llama-3.1-70b")
    s = setup(model=model, gpus=4, pp=4)
    taken = zip(s.stages.ranks, s.reserve_bytes, strict=True)
    rooms = [int((GPU.device_bytes or 0) * 0.9) - rank.weight_bytes - reserve for rank, reserve in taken]
    assert [len(own) for own in s.stages.layers] == [20] * 4
    assert s.capacity()[0] == pytest.approx(4 * min(rooms), rel=1e-12)
    result = simulate(random_trace(3, 10), s)
    assert (result.requests["status"] == "finished").all()
    peaks = [result.memory[f"gpu{i}.hbm"]["peak_bytes"] for i in range(4)]
    stored = [peak - rank.weight_bytes for peak, rank in zip(peaks, s.stages.ranks, strict=True)]
    assert min(stored) == max(stored) > 0
    with pytest.raises(ValueError, match=r"does not fit: one of 1 x h100-sxm .* raise --tp, --pp or that share"):
        setup(model=model).capacity()


@hypothesis_settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(1, 300_000),
    case=st.sampled_from([("gemma-3-12b", "full"), ("jamba-1.5-mini", "quest"), ("llama-3.1-8b", "shadowkv")]),
)
def test_no_stage_holds_more_than_its_share(tokens, case):
    name, text = case
    model, policy = load_model(name), parse_policy(text)
    layers = tuple(stage_layers(model, 3))
    step = Step.decoding(tokens, 1)
    buffers = [resolve(policy, model, step, i).buffers(model, step, i) for i in range(model.n_layers)]
    for tier in (Tier.HBM, Tier.DDR):
        whole = stored_bytes(buffers)[tier]
        for share, own in zip(held_shares(policy, model, layers, tier), layers, strict=True):
            assert stored_bytes(buffers[own.start : own.stop])[tier] <= whole * share * 1.02


def test_shares_of_equal_layers_are_exact():
    layers = tuple(stage_layers(MODEL, 4))
    assert held_shares(Full(), MODEL, layers, Tier.HBM) == (0.25,) * 4
    assert held_shares(Full(), MODEL, layers, Tier.DDR) == (0.0,) * 4
    # Staging that layers share is on every stage.
    assert held_shares(parse_policy("offload-all"), MODEL, layers, Tier.HBM) == (1.0,) * 4
    assert held_shares(parse_policy("offload-all"), MODEL, layers, Tier.DDR) == (0.25,) * 4


def test_stages_on_two_hosts_send_over_the_network():
    host = replace(HOST, gpus_max=2, nic_Bps=2e9)
    near, far = (lone(60, 20, gpus=4, pp=4, host=where) for where in (HOST, host))
    hop_s = {tokens: HOST.nic_latency_s + tokens * ROW / 1e9 for tokens in (60, 1)}
    extra_s = [hop_s[tokens] - FOUR.send_s(tokens)[1] for tokens in (60, 1)]
    for near_s, far_s, more_s in zip(latencies_s(near), latencies_s(far), (extra_s[0], 19 * extra_s[1]), strict=True):
        assert far_s == pytest.approx(near_s + more_s, rel=1e-9)
    assert far.traffic["nic"]["activations"] == (60 + 19) * ROW
    assert far.traffic["gpu->gpu"]["activations"] == 2 * (60 + 19) * ROW
    assert sorted(far.memory) == ["gpu0.hbm", "gpu1.hbm", "gpu2.hbm", "gpu3.hbm", "host0.ddr", "host1.ddr"]


@pytest.mark.parametrize("fidelity", ["step", "op"])
@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_a_crowded_pipeline_loses_nothing(preemption, fidelity):
    """Little memory: sequences are preempted, all finish, and each latency is the sum of its causes."""
    requests = random_trace(5, 14, span_s=2.0, prompts=(3000, 9000), outputs=(300, 900))
    options = {"kv_cache_tokens": 46_779, "preemption": preemption, "max_num_batched_tokens": 4096}
    crowded = setup(gpus=4, pp=2, fidelity=fidelity, **options)
    result = simulate(requests, crowded)
    assert result.requests["preemptions"].sum() > 0
    assert (result.requests["status"] == "finished").all()
    assert sum(tokens for tokens in result.token_gaps[1]) == (requests.output_tokens - 1).sum()
    spent = list(spent_s(result.requests, "e2e").values())
    np.testing.assert_allclose(sum(spent), result.requests["finish_s"] - result.requests["arrival_s"], rtol=1e-6)
    assert min(seconds.min() for seconds in spent) > -1e-9
    assert max(result.busy.values()) < 1


def test_the_command_and_its_errors(capsys, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,500,3\n")
    given = ["simulate", "--trace", str(path), "--model", "llama-3.1-8b", "--gpu", "h100-sxm", "--gpus", "2"]
    assert main([*given, "--pp", "2", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["inputs"]["pp"] == 2
    for options, message in (
        (["--pp", "3"], "gpus=2 is not a multiple of tp=1 x pp=3"),
        (["--pp", "0"], "pp=0 must be at least 1"),
        (
            ["--pp", "2", "--speculate", "3", "--acceptance", "0.5", "--draft-share", "0.1"],
            "pp=2 does not work with a draft model of speculate yet",
        ),
        (["--gpus", "8", "--pp", "2", "--prefill-gpus", "2"], "pp=2 does not work with prefill_gpus yet"),
        (["--pp", "2", "--policy", "squeezed-attention"], "the policy works on all layers at once after a prompt"),
        (["--gpus", "40", "--pp", "40"], "pp=40 must be from 1 to the 32 layers of llama-3.1-8b"),
        (["--gpus", "16", "--pp", "16", "--host", "h200-vm"], "which has no network"),
    ):
        assert main([*given, *options]) == 2, options
        assert message in capsys.readouterr().err
