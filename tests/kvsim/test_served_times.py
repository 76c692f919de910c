"""Times of serving engines: a model's own layers by its kernels, and whole steps against sums of measured kernels."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from simulated import HOST

from kvsim.hardware.catalogue import gpu_names, load_gpu
from kvsim.hardware.machine import SM, Machine
from kvsim.hardware.served import ServedModel, before_matrices, dense_matrices, out_matrices
from kvsim.iteration.clock import Clock, Load
from kvsim.models import load_model
from kvsim.plans.derive import PlanTable
from policies import parse_policy
from policies.layer import LayerShape
from policies.model import ModelShape

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
MODEL_8B = load_model("llama-3.1-8b")
MODELS = {"8B": (MODEL_8B, 1), "70B, tp 8": (load_model("llama-3.1-70b"), 8)}
MEASURED_MLP = {"8B": (28672 + 12288) * 4096, "70B, tp 8": (7168 + 3584) * 8192}  # of the tables' nearest matrices


@cache
def clock_of(gpu: str, name: str) -> tuple[Clock, PlanTable]:
    model, tp = MODELS[name]
    shape = model.shard(tp).layers[0]
    params = MEASURED_MLP[name]
    layer = replace(shape, mlp_params=params, mlp_active_params=params)
    rank = replace(model.shard(tp), layers=(layer,) * 8, params=model.params)
    machine = Machine(gpu=load_gpu(gpu), host=HOST, tp=tp)
    return Clock(rank, machine), PlanTable(parse_policy("full"), rank, machine, {})


def step_s(gpu: str, name: str, step: str) -> float:
    """One layer's time in a step as composites are named, as the simulator prices it."""
    clock, table = clock_of(gpu, name)
    kind, *numbers = step.replace(" x ", " ").split()
    if kind == "prefill":
        tokens = int(numbers[0])
        structure, amounts = table.prefill(tokens, 0, tokens)
    else:
        tokens, context = map(int, numbers)
        segment = table.decode(context - 1, 1)
        structure, amounts = segment.piece.structure, tokens * segment.start
    seconds, _ = clock.iteration([Load(structure, amounts)], tokens, 0)
    return seconds / clock.model.n_layers


def elementwise_s(gpu: str, name: str, tokens: int) -> float:
    """What no table has: two norms, rotary embedding, activation, and the write of new keys and values."""
    clock, _ = clock_of(gpu, name)
    model, layer = clock.model, clock.model.layers[0]
    hidden, kv = model.hidden_dim, 2 * layer.kv_heads * layer.head_dim
    channels = layer.mlp_params // (3 * hidden)
    elements = [4 * hidden, 4 * hidden, 2 * (layer.heads + layer.kv_heads) * layer.head_dim, 3 * channels, 2 * kv]
    return sum(clock.machine.gpu.kernels.elementwise_s(nbytes=2 * tokens * n) for n in elements)


COMPOSITES = json.loads((RESULTS / "kernel_fit.json").read_text(encoding="utf-8"))["composites"]
REDUCED = (32, 4096, 8192)  # rows whose all-reduce on eight GPUs was measured; others lie far from any in the tables


def test_steps_are_sums_of_measured_kernels() -> None:
    """Decode steps and prefills of an 8B on one GPU and a 70B on eight, H100 and A100, by the simulator's own clock."""
    errors = []
    for row in COMPOSITES:
        gpu, name, step = row["gpu"], row["model"], row["step"]
        tokens = int(step.split()[1])
        if name == "8B" or tokens in REDUCED:
            found_s = step_s(gpu, name, step) - elementwise_s(gpu, name, tokens)
            errors.append(abs(found_s / row["measured_s"] - 1))
    assert len(errors) == 30
    assert sum(error <= 0.08 for error in errors) >= 29
    assert max(errors) <= 0.10


@pytest.mark.parametrize("gpu", ["h100-sxm", "a100-80g-sxm", "b200", "l40s"])
@pytest.mark.parametrize("name", MODELS)
def test_steps_are_sums_of_kernels_prices(gpu: str, name: str) -> None:
    """The clock adds what each kernel costs by itself; attention's is the line nearest to it."""
    clock, _ = clock_of(gpu, name)
    kernels, model, layer, tp = clock.machine.gpu.kernels, clock.model, clock.model.layers[0], clock.machine.tp
    heads = {"heads": layer.heads, "kv_heads": layer.kv_heads, "head_dim": layer.head_dim}
    channels = MEASURED_MLP[name] // (3 * model.hidden_dim)
    hidden, q, kv = model.hidden_dim, layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    matrices = [(q + 2 * kv, hidden), (hidden, q), (2 * channels, hidden), (hidden, channels)]
    for step in ("decode 4 x 8192", "decode 32 x 2048", "decode 128 x 4096", "prefill 1024", "prefill 8192"):
        kind, *numbers = step.replace(" x ", " ").split()
        tokens = int(numbers[0])
        if kind == "prefill":
            attention_s = kernels.prefill_attention_s(batch=1, tokens=tokens, **heads)
        else:
            attention_s = kernels.decode_attention_s(batch=tokens, context_tokens=int(numbers[1]), **heads)
        gemms_s = sum(kernels.gemm_s(m=tokens, n=n, k=k, dtype="bf16", captured=True) for n, k in matrices)
        reduces_s = 2 * clock.machine.allreduce_s(model, tokens)
        expected_s = attention_s + gemms_s + reduces_s + elementwise_s(gpu, name, tokens)
        assert step_s(gpu, name, step) == pytest.approx(expected_s, rel=0.05), step
        if tp > 1 and clock.machine.gpu.rates.nvlink_Bps:
            assert reduces_s == 2 * kernels.all_reduce_s(nbytes=2 * tokens * hidden, gpus=tp)


# All linear layers of Llama-3.1-8B in one CUDA graph on one H200 (driver 580, torch 2.11): rows and ms.
H200_LINEAR_MS = {1: 3.745, 8: 3.844, 16: 3.892, 32: 3.964, 64: 4.077, 96: 4.275, 128: 4.480, 192: 5.395, 256: 6.526,
                  384: 8.768, 512: 12.255, 1024: 21.490, 2048: 43.167, 4096: 85.744, 8192: 169.956}  # fmt: skip


@pytest.mark.parametrize(("gpu", "mean", "most"), [("h200-sxm", 0.06, 0.12), ("h200-sxm@measured", 0.04, 0.12)])
def test_layers_take_what_an_h200_took_for_its_gemms(gpu: str, mean: float, most: float) -> None:
    """Norms, rotary embedding and activations come on top: 2 to 9 % of a layer."""
    machine, layer = Machine(gpu=load_gpu(gpu), host=HOST), MODEL_8B.layers[0]
    errors = [abs(32e3 * sum(machine.layer_s(MODEL_8B, layer, n)) / ms - 1) for n, ms in H200_LINEAR_MS.items()]
    assert sum(errors) / len(errors) <= mean
    assert max(errors) <= most


def test_matrices_are_those_of_the_model() -> None:
    def shapes(model: ModelShape, layer: LayerShape, tp: int = 1) -> list[tuple[int, int]]:
        dense = [matrix for pair in dense_matrices(model, layer, tp) for matrix in pair]
        return [(m.n, m.k) for m in (*before_matrices(model, layer), *out_matrices(model, layer), *dense)]

    assert shapes(MODEL_8B, MODEL_8B.layers[0]) == [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
    rank = load_model("llama-3.1-70b").shard(8)
    assert shapes(rank, rank.layers[0], 8) == [(1280, 8192), (8192, 1024), (7168, 8192), (8192, 3584)]
    deepseek = load_model("deepseek-v3")
    first, *_, last = deepseek.layers
    assert shapes(deepseek, first)[0] == (1536 + 576, 7168)  # to the latents
    assert shapes(deepseek, first)[-2:] == [(2 * 18432, 7168), (7168, 18432)]
    assert shapes(deepseek, last)[-2:] == [(2 * 2048, 7168), (7168, 2048)]  # the shared expert
    assert {m.dtype for m in before_matrices(deepseek, last)} == {"fp8_block"}


@pytest.mark.parametrize("model", ["llama-3.1-8b", "mixtral-8x7b", "deepseek-v3", "qwen3-30b-a3b"])
@pytest.mark.parametrize("gpu", [name for name in gpu_names() if load_gpu(name).kernels.fitted])
def test_nothing_is_faster_than_the_datasheet(gpu: str, model: str) -> None:
    """No layer and no head takes less than its weights' way from HBM, or its products at the chip's peak."""
    shape, tokens = load_model(model), np.array([1, 7, 64, 300, 2048, 8192])
    served = ServedModel(load_gpu(gpu).kernels, 1)
    chip = served.kernels.chip
    for layer in dict.fromkeys(shape.layers):
        parts = served.layer(shape, layer, tokens)
        seconds = sum(part.seconds for part in parts)
        read = np.array([shape.layer_bytes_touched(layer, n) for n in tokens.tolist()])
        flops = {
            dtype: 2 * params * tokens / chip.product(dtype)[1] for dtype, params in shape.products(layer) if params
        }
        assert (seconds >= read / chip.hbm_Bps * (1 - 1e-9)).all()
        assert (seconds >= 0.99 * sum(flops.values())).all()  # matrices are counted in whole multiples of 16
        assert all((part.by_hbm_s + part.by_compute_s <= part.seconds * (1 + 1e-9)).all() for part in parts)
        assert all((np.maximum(part.hbm_s, part.work_s) <= part.seconds * (1 + 1e-9)).all() for part in parts)


def test_many_row_counts_at_once_are_the_same() -> None:
    rows = np.array([1, 2, 8, 16, 31, 64, 65, 129, 256, 300, 1000, 4096])
    for gpu in ("h100-sxm", "a100-80g-sxm", "b200", "l40s", "h200-sxm@measured"):
        kernels = load_gpu(gpu).kernels
        for dtype, product in (("bf16", "bf16"), ("fp8", "fp8"), ("fp8_block", "fp8_block"), ("int8", "bf16"),
                               ("int4-g128", "bf16")):  # fmt: skip
            found = kernels.gemm_rows_s(m=rows, n=6144, k=4096, dtype=dtype, product=product)
            each = [kernels.gemm_s(m=m, n=6144, k=4096, dtype=dtype, product=product, captured=True) for m in rows]
            np.testing.assert_allclose(found, each, rtol=1e-12)


def test_the_loop_s_table_is_what_explain_prices() -> None:
    clock = Clock(MODEL_8B, Machine(gpu=load_gpu("h100-sxm"), host=HOST))
    for tokens in (1, 128, 129, 777):
        own = clock.own_layers(tokens)
        parts = clock.machine.layer_s(MODEL_8B, MODEL_8B.layers[0], tokens)
        assert own.times_s[1:4] == pytest.approx(parts, rel=1e-12)
        assert own.record["busy_s"][SM] == pytest.approx(32 * sum(parts), rel=1e-12)
        assert clock.head_s(tokens) == pytest.approx(clock.machine.head_s(MODEL_8B, tokens), rel=1e-12)
    assert clock.head_s(0) == 0
