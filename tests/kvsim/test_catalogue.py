"""Every GPU, host and model of the catalogue is priced and simulated: none lacks a figure that a command needs."""

import json
from dataclasses import replace
from typing import Any

import pytest

import traces
from kvsim.__main__ import main
from kvsim.explain.costs import Explainer
from kvsim.hardware.catalogue import gpu_names, host_names, load_gpu, load_host
from kvsim.models import load_model, model_names
from kvsim.run.simulate import simulate
from kvsim.scenario.scenario_file import default_host
from kvsim.scenario.setup import Setup
from policies import Full, ModelShape, OffloadAll

SMALL = load_model("llama-3.2-1b")
TRACE = traces.load("mooncake-conversation", limit=2)


def checked(model: ModelShape, gpu: str, host: str, tp: int = 1, **options: Any) -> None:
    """Price a dense cache, and a streamed one where layers allow it, and simulate: times are positive."""
    card, server = load_gpu(gpu), load_host(host)
    streamed = all(layer.kind == "full" and layer.share_kv_with is None for layer in model.layers)
    for policy in (Full(), OffloadAll())[: 2 if streamed else 1]:
        costs = Explainer(policy, model, card, server, tp=tp).costs(2048)
        assert costs.prefill_s > 0 < costs.decode_s_per_token
        assert costs.concurrency > 0
    setup = Setup(model=model, policy=Full(), gpu=card, host=server, gpus=tp, tp=tp, **options)
    result = simulate(TRACE, setup)
    assert result.requests["finish_s"].min() > 0
    assert result.makespan_s > TRACE.arrival_s.max()


@pytest.mark.parametrize("parameters", ["datasheet", "eager", "serving"])
@pytest.mark.parametrize("gpu", gpu_names())
def test_every_gpu(gpu: str, parameters: str) -> None:
    for dtype in ("bf16", "fp16", "fp8", "int8", "int4", "nvfp4"):
        rate = load_gpu(f"{gpu}@{parameters}").rates.product_flops(dtype)
        assert rate >= load_gpu(f"{gpu}@{parameters}").rates.flops("fp16") * 0.99
    checked(SMALL, f"{gpu}@{parameters}", default_host(gpu))


@pytest.mark.parametrize("host", host_names())
def test_every_host(host: str) -> None:
    checked(SMALL, "h100-sxm", host)


@pytest.mark.parametrize("name", model_names())
def test_every_model(name: str) -> None:
    model = load_model(name)
    card = load_gpu("b200")
    fits = (tp for tp in (1, 2, 4, 8) if model.shard(tp).weight_bytes < 0.8 * card.memory_bytes)
    checked(model, "b200", "ddr5-dual-xeon", next(fits), max_num_batched_tokens=2048)


def test_a_gpu_without_bf16_runs_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--model", "llama-3.2-1b", "--gpu", "t4", "--json"]
    assert main(["explain", "--context", "2k", *common]) == 0
    assert len(json.loads(capsys.readouterr().out)) > 5
    assert main(["simulate", "--trace", "mooncake-conversation", "--limit", "2", *common]) == 0
    assert json.loads(capsys.readouterr().out)
    for mode in ("--occupancy", "--paper"):
        arguments = [text for text in common if mode != "--paper" or text != "--json"]
        assert main(["explain", mode, "--context", "2k", *arguments]) == 0
    assert main(["hardware", "show", "t4"]) == 0


def test_bf16_on_a_gpu_without_it_costs_what_fp16_costs() -> None:
    half = replace(SMALL, dtype="fp16", kv_dtype="fp16", weight_dtype="fp16")
    costs = [
        Explainer(Full(), model, load_gpu("t4"), load_host("ddr4-dual-xeon")).costs(4096) for model in (SMALL, half)
    ]
    assert costs[0] == costs[1]
