"""Options by the names that serving engines have for them: what stands for each, or what is not modelled."""

import pytest
from simulated import setup, trace

from kvsim.__main__ import main
from kvsim.hardware.catalogue import load_gpu
from kvsim.models import load_model
from kvsim.results.summary import summarize
from kvsim.run.simulate import simulate
from kvsim.scenario.engine_names import ENGINE_NAMES
from kvsim.scenario.scenario_file import OPTIONS, load_scenario

ASKED = {"trace": "azure-2023-code", "model": "deepseek-v3", "gpu": "h200-sxm"}
FLAGS = ["--trace", "azure-2023-code", "--model", "deepseek-v3", "--gpu", "h200-sxm"]


@pytest.mark.parametrize("flag", ["--ep", "--enable-expert-parallel", "--moe-a2a-backend"])
def test_expert_parallelism_is_refused_in_words(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("simulate", "compare"):
        assert main([command, *FLAGS, flag, "8"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: No such option: {flag}")
        assert "expert parallelism is not modelled: each of tp ranks has its slice of every expert" in error
        assert error.count("\n") == 1
    key = flag.removeprefix("--").replace("-", "_")
    with pytest.raises(ValueError, match=f"unknown key '{key}'; expert parallelism is not modelled"):
        load_scenario({**ASKED, key: 8})


def test_data_parallel_attention_is_refused_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *FLAGS, "--enable-dp-attention"]) == 2
    assert "data-parallel attention is not modelled" in capsys.readouterr().err


def test_what_is_named_instead_is_an_option() -> None:
    known = {one.flag for one in OPTIONS}
    named = {word.rstrip(",;") for words in ENGINE_NAMES.values() for word in words.split() if word.startswith("--")}
    assert named - known == set()
    assert len(named) > 8
    assert not {f"--{name.replace('_', '-')}" for name in ENGINE_NAMES} & known


@pytest.mark.parametrize(
    ("model", "tp", "latents"), [("mixtral-8x7b", 2, False), ("deepseek-v3", 8, True), ("mixtral-8x7b", 4, False)]
)
def test_a_run_says_how_its_experts_are_spread(model: str, tp: int, *, latents: bool) -> None:
    options = {"model": load_model(model).stored_as("fp8", None), "gpus": tp, "tp": tp}
    options |= {"gpu": load_gpu("h200-sxm")}
    (note,) = summarize(simulate(trace([0.0], 100, 2), setup(**options)))["inputs"]["model_notes"]
    assert note.startswith(f"each of {tp} ranks holds a slice of every expert")
    assert ("whole latent" in note) == latents
    assert note.endswith("are not modelled")


def test_other_models_say_nothing_of_it() -> None:
    for s in (setup(gpus=2, tp=2), setup(model=load_model("qwen3-30b-a3b"))):
        assert summarize(simulate(trace([0.0], 100, 2), s))["inputs"]["model_notes"] == []


def test_experts_that_do_not_fit_are_told_of_what_would_spread_them() -> None:
    with pytest.raises(ValueError, match=r"deepseek-v3 does not fit: .*for expert parallelism is not modelled$"):
        setup(model=load_model("deepseek-v3"), gpus=8, tp=8).capacity()
    with pytest.raises(ValueError, match=r"llama-3\.1-70b does not fit: .*--weight-dtype$"):
        setup(model=load_model("llama-3.1-70b")).capacity()
