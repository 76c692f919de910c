"""Policies' operations at a serving engine's prices, and that both fidelities agree on them."""

from dataclasses import replace

import numpy as np
import pytest
from simulated import HOST, MODEL, random_trace, setup

from kvsim.hardware.catalogue import load_gpu
from kvsim.hardware.machine import D2H, H2D, NVLINK, SM, Cost, Machine
from kvsim.iteration.clock import Clock, Load
from kvsim.models import load_model
from kvsim.plans.derive import OpShape, PlanTable
from kvsim.plans.guessing import Guesser
from kvsim.run.simulate import simulate
from kvsim.scenario.speculation import Speculation
from policies import parse_policy

H100 = load_gpu("h100-sxm")
FIT = H100.kernels.prices.fits.transfers


def ops(policy: str, prompt_tokens: int, *, decode: bool = False, gpu: str = "h100-sxm") -> dict[str, OpShape]:
    """Operations of a policy's first layer that it handles, and those at a prompt's end, by name."""
    table = PlanTable(parse_policy(policy), MODEL, Machine(gpu=load_gpu(gpu), host=HOST), {})
    if decode:
        structure = table.decode(prompt_tokens, 1).piece.structure
    else:
        structure, _ = table.prefill(prompt_tokens, 0, prompt_tokens)
    return {op.name: op for op in structure.ops}


def test_clustering_multiplies_in_tf32_and_decomposition_in_fp32() -> None:
    flop_s = {
        gpu: ops("squeezed-attention", 30_000, gpu=gpu)["cluster"].cost.work_s for gpu in ("h100-sxm", "h100-sxm@eager")
    }
    assert 1 / flop_s["h100-sxm"] == pytest.approx(95e12, rel=0.05)  # TF32 with the argmax
    assert flop_s["h100-sxm@eager"] == 1 / load_gpu("h100-sxm@eager").rates.product_flops("fp32")
    graph = ops("retrieval-attention:index=graph", 30_000)["build"]
    assert graph.cost.work_s == flop_s["h100-sxm"]
    svd = ops("shadowkv", 30_000)["decompose"]
    assert svd.cost.work_s == flop_s["h100-sxm@eager"]


def test_a_clustering_takes_what_its_products_take() -> None:
    """8 heads x 100K keys x 5K centroids, one iteration, took 10.8 ms on an H200 (driver 580, torch 2.11)."""
    line = Machine(gpu=load_gpu("h200-sxm"), host=HOST).operations.nearest
    flops = 8 * 100_000 * 5000 * 2 * 128
    assert line.start_s + flops * line.work_s == pytest.approx(10.8e-3, rel=0.05)


def test_batched_copies_pay_for_each_descriptor_and_gathers_for_each_far_row() -> None:
    operations = Machine(gpu=H100, host=HOST).operations
    start_s, byte_s = operations.copy(2048, rows_apart=True, to_hbm=True)
    assert start_s == pytest.approx(FIT.copy_s, rel=1e-3)
    assert 0.6e-6 <= 2048 * byte_s <= 1.1e-6  # each row is bound by its descriptor
    assert operations.copy(1 << 20, rows_apart=True, to_hbm=True) == operations.copy(1, rows_apart=False, to_hbm=True)
    for row_bytes, GBps in ((256, 10), (512, 20), (2048, 51)):  # as measured over 8 GiB on an H200
        _, byte_s = operations.gather(row_bytes)
        assert 1e-9 / byte_s == pytest.approx(GBps, rel=0.1)


def test_decode_attention_is_the_line_nearest_to_its_kernel() -> None:
    """Within 10 % on an H100 over batches and contexts that the line was not fitted at."""
    cost = ops("full", 30_000, decode=True)["attend"].cost
    kv_bytes = 2 * 2 * 8 * 128
    for batch, tokens in ((3, 5000), (12, 30_000), (48, 2500), (96, 9000), (200, 3000)):
        found_s = cost.fixed_s + batch * tokens * kv_bytes * cost.streamed_s
        kernel_s = H100.kernels.decode_attention_s(
            batch=batch, context_tokens=tokens, heads=32, kv_heads=8, head_dim=128
        )
        assert found_s == pytest.approx(kernel_s, rel=0.1)


@pytest.mark.parametrize("policy", ["full", "shadowkv", "squeezed-attention", "offload-all", "infllm"])
@pytest.mark.parametrize("tp", [1, 2])
def test_the_two_fidelities_agree_at_serving_prices(policy: str, tp: int) -> None:
    model = replace(MODEL, layers=MODEL.layers[:4])
    options = {"model": model, "gpu": H100, "tp": tp, "gpus": tp}
    trace = random_trace(5, n=8, span_s=1.0)
    step, op = (simulate(trace, setup(policy, fidelity=fidelity, **options)) for fidelity in ("step", "op"))
    for column in ("first_token_s", "finish_s"):
        np.testing.assert_allclose(step.requests[column], op.requests[column], rtol=1e-6)


def test_serving_is_quicker_than_eager_and_slower_than_the_datasheet() -> None:
    trace = random_trace(6, n=10, span_s=3.0)
    for policy in ("full", "shadowkv", "squeezed-attention"):
        spans = {
            which: simulate(trace, setup(policy, gpu=load_gpu(f"h100-sxm@{which}"))).makespan_s
            for which in ("datasheet", "serving", "eager")
        }
        assert spans["datasheet"] < spans["serving"] < spans["eager"]


def test_attention_of_a_prompt_walks_over_its_keys() -> None:
    """Against the kernel, chunks of a long prompt within 25 % on an H100, whatever came before."""
    cost: Cost = ops("full", 30_000)["attend"].cost
    heads = {"heads": 32, "kv_heads": 8, "head_dim": 128}
    for tokens, past in ((512, 0), (2048, 0), (8192, 0), (30_000, 0), (512, 60_000), (2048, 30_000), (8192, 100_000)):
        pairs = tokens * past + tokens * (tokens + 1) // 2
        nbytes = 4 * 32 * 128 * tokens + 2 * 2 * 8 * 128 * (past + tokens)
        found_s = cost.fixed_s + 4 * 32 * 128 * pairs * cost.work_s + nbytes * cost.walked_s
        kernel_s = H100.kernels.prefill_attention_s(batch=1, tokens=tokens, cached_tokens=past, **heads)
        assert found_s == pytest.approx(kernel_s, rel=0.25), (tokens, past)


def test_lanes_are_those_of_the_direction() -> None:
    found = ops("shadowkv", 30_000)
    assert found["offload_values"].cost.lane == D2H
    fetched = ops("shadowkv", 30_000, decode=True)
    assert fetched["fetch"].cost.lane == H2D


def test_batches_of_equal_sums_take_equal_times() -> None:
    machine = Machine(gpu=H100, host=HOST)
    clock, table = Clock(MODEL, machine), PlanTable(parse_policy("full"), MODEL, machine, {})

    def step_s(*contexts: int) -> float:
        segments = [table.decode(context, 1) for context in contexts]
        load = Load(segments[0].piece.structure, sum(segment.start for segment in segments))
        return clock.iteration([load], len(contexts), len(contexts))[0]

    assert step_s(1000, 61_000) == step_s(31_000, 31_000)


def test_each_direction_of_pcie_runs_as_if_alone() -> None:
    operations, nbytes = Machine(gpu=H100, host=HOST).operations, 1 << 30
    for to_hbm in (True, False):
        start_s, byte_s = operations.copy(2048, rows_apart=False, to_hbm=to_hbm)
        alone_s, both_s = (H100.kernels.copy_s(nbytes=nbytes, to_hbm=to_hbm, duplex=duplex) for duplex in (False, True))
        assert start_s + nbytes * byte_s == pytest.approx(alone_s, rel=1e-6)
        assert both_s > 1.08 * alone_s


@pytest.mark.parametrize("tp", [1, 2])
def test_a_draft_s_run_takes_what_its_own_layers_and_head_take(tp: int) -> None:
    draft = load_model("llama-3.2-1b")
    speculation = Speculation(method="draft", draft=draft, guesses=3, acceptance=(0.7,), candidates=3, draft_share=1.0)
    machine = Machine(gpu=H100, host=HOST, tp=tp)
    guesser, clock = Guesser(speculation, MODEL.shard(tp), machine), Clock(draft.shard(tp), machine)
    for sequences in (1, 64):
        once_s, each_s = guesser.parts[0].sum(axis=1)
        attention = machine.operations.attention(draft.shard(tp).layers[0], "bf16").decode
        attending_s = draft.n_layers * (attention.start_s + machine.served.elementwise_start_s)
        own_s = clock.own_layers(sequences).record["busy_s"][[SM, NVLINK]].sum() + clock.head_s(sequences)
        assert (once_s + sequences * each_s) / 3 == pytest.approx(own_s + attending_s, rel=1e-9)
