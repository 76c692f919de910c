"""Pipelines: the fill and drain of equal stages in closed form, splits by brute force, memory and volumes by hand."""

import json
from dataclasses import replace
from importlib.resources import files
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated import GPU, HOST, MODEL

from kvsim.__main__ import main
from kvsim.explain.costs import Explainer
from kvsim.explain.pipeline import Pipelined, pipeline_s
from kvsim.models import load_model
from kvsim.scenario.stages import stage_layers, stage_shape
from policies import Full, hf


@given(m=st.integers(1, 20), p=st.integers(1, 8), seconds=st.floats(0.01, 10), send_s=st.floats(0, 1))
def test_equal_micro_batches_fill_and_drain(m, p, seconds, send_s):
    """m micro-batches through p stages take (m + p - 1) times one of them, and p - 1 sends that nothing hides."""
    total_s = pipeline_s([[seconds] * p] * m, [0.0] + [send_s] * (p - 1))
    assert total_s == pytest.approx((m + p - 1) * seconds + (p - 1) * send_s)


@given(times=st.lists(st.lists(st.floats(0, 5), min_size=3, max_size=3), min_size=1, max_size=5))
def test_the_slowest_path_decides(times):
    """Without sends the makespan is the dearest monotone path through the grid of micro-batches and stages."""
    m, p = len(times), 3
    paths = []
    for turns in combinations(range(m + p - 2), p - 1):  # when a path goes on to the next stage
        i = j = 0
        total = times[0][0]
        for step in range(m + p - 2):
            i, j = (i, j + 1) if step in turns else (i + 1, j)
            total += times[i][j]
        paths.append(total)
    assert pipeline_s(times, [0.0] * p) == pytest.approx(max(paths))


@pytest.mark.parametrize(("model", "pp"), [("llama-3.1-8b", 4), ("llama-3.1-8b", 5), ("deepseek-v3", 3)])
def test_no_split_has_a_smaller_largest_stage(model, pp):
    shape = load_model(model)
    weights = [x.qkv_params + x.out_params + x.mlp_params for x in shape.layers]
    ranges = stage_layers(shape, pp)
    assert [i for own in ranges for i in own] == list(range(shape.n_layers))
    largest = max(sum(weights[i] for i in own) for own in ranges)
    for cuts in combinations(range(1, shape.n_layers), pp - 1):
        edges = [0, *cuts, shape.n_layers]
        assert largest <= max(sum(weights[a:b]) for a, b in pairwise(edges))
    if model == "llama-3.1-8b":
        assert max(map(len, ranges)) == -(-32 // pp)


def test_stages_add_up_to_the_model():
    """Weights and cache of all stages; a tied embedding is stored twice, at both ends."""
    for name in ("llama-3.1-8b", "deepseek-v3"):
        model = load_model(name)
        stages = [stage_shape(model, own) for own in stage_layers(model, 4)]
        assert sum(stage.params for stage in stages) == model.params
        assert sum(stage.kv_bytes(1000) for stage in stages) == model.kv_bytes(1000)
    tied = load_model("llama-3.2-1b")
    assert sum(stage_shape(tied, own).params for own in stage_layers(tied, 2)) == tied.params + tied.head_params


@pytest.mark.parametrize("tp", [1, 2])
def test_one_stage_is_what_explain_prices(tp):
    one, plain = Pipelined(MODEL, GPU, HOST, pp=1, tp=tp), Explainer(Full(), MODEL, GPU, HOST, tp=tp)
    piped, costs = one.costs(8000, 1), plain.costs(8000)
    assert (piped.concurrency, sum(piped.kv_bytes)) == (costs.concurrency, costs.kv_bytes)
    assert piped.prefill_s == pytest.approx(costs.prefill_s, rel=1e-12)
    assert piped.decode_s_per_token == pytest.approx(costs.decode_s_per_token, rel=1e-12)
    assert piped.output_tokens_per_s == pytest.approx(costs.output_tokens_per_s, rel=1e-12)
    assert (piped.prefill_idle_share, piped.sent_bytes_per_token) == (pytest.approx(0, abs=1e-12), 0)


def test_four_stages_by_hand():
    """A sequence alone pays all stages and three hops; a stage's part of memory holds more sequences than one GPU's."""
    four, one = Pipelined(MODEL, GPU, HOST, pp=4), Pipelined(MODEL, GPU, HOST, pp=1)
    a, b = four.costs(8000, 8), one.costs(8000, 1)
    rates = GPU.rates
    hop_s = rates.nvlink_latency_s + 4096 * 2 / rates.nvlink_Bps
    assert four.send_s(1) == [0.0] + [pytest.approx(hop_s)] * 3
    assert a.layers == [8] * 4
    assert a.decode_s_per_token == pytest.approx(b.decode_s_per_token + 3 * hop_s, rel=1e-9)
    assert a.sent_bytes_per_token == 3 * 4096 * 2
    # Beside weights: a CUDA context, graphs, and a pass of 8,192 tokens through a layer.
    taken_bytes = 0.89 * 2**30 + 8192 * (8 * 4096 + 6 * 14336)
    rooms = [85_017_755_648 * 0.9 - weights - taken_bytes for weights in a.weight_bytes]
    assert a.concurrency == min(room // (8000 * 8 * 4096) for room in rooms) > 4 * b.concurrency
    assert 0 < a.prefill_idle_share < 0.5  # 3 / 11 for equal chunks; later ones attend to more
    assert a.prefill_s < 0.5 * b.prefill_s
    assert a.output_tokens_per_s > b.output_tokens_per_s
    # Stages of two hosts: the third hop of four goes through a GPU's share of the adapters.
    far = Pipelined(MODEL, GPU, replace(HOST, gpus_max=2, nic_Bps=2e9), pp=4)
    assert far.send_s(1)[2] == pytest.approx(HOST.nic_latency_s + 4096 * 2 / 1e9)
    assert far.send_s(1)[1] == far.send_s(1)[3] == pytest.approx(hop_s)


def test_the_command_and_its_errors(capsys):
    assert main(["explain", "--pp", "4", "--gpu", "h100-sxm", "--context", "8k,32k", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["pp"], row["context_tokens"], row["layers"]) for row in rows] == [
        (4, 8000, [8] * 4),
        (4, 32000, [8] * 4),
    ]
    assert main(["explain", "--pp", "2", "--micro-batches", "4"]) == 0
    assert "idle" in capsys.readouterr().out
    for arguments, message in (
        (["--pp", "33"], "pp=33 must be from 1 to the 32 layers"),
        (["--pp", "2", "--sp", "2"], "--sp has no use for --pp"),
        (["--pp", "2", "--policy", "full"], "--pp has no use for --policy"),
        (["--micro-batches", "2"], "--micro-batches is of --pp"),
        (["--pp", "2", "--micro-batches", "90000"], "micro_batches=90000 must be from 1 to"),
        (["--pp", "9", "--host", "h200-vm"], "has no network"),
    ):
        assert main(["explain", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_stages_of_a_quantised_model_hold_it_once() -> None:
    """Embedding in 16 bits on the first, a converted head on the last, half of the layers on each."""
    config = json.loads((files("kvsim") / "catalogue" / "models" / "llama-3.1-8b.json").read_text())
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
    scheme = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    model = hf.read({**config, "quantization_config": scheme}, "m")
    assert model.head_stored is not None
    stages = [stage_shape(model, own) for own in (range(16), range(16, 32))]
    assert sum(stage.weight_bytes for stage in stages) == model.weight_bytes
    layers = sum(model.layer_bytes_touched(layer, 1) for layer in model.layers[:16])
    assert stages[0].weight_bytes == layers + 2 * 128256 * 4096
