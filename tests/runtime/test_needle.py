"""The shipped model: it unpacks to what Hugging Face loads, and it answers its examples."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from runtime.needle import expand, load_evals  # noqa: E402
from runtime.needle.expand import PACKED, WEIGHTS  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return expand(tmp_path_factory.mktemp("needle") / "model")


def test_a_matrix_is_its_integers_times_the_scale_of_their_row(folder: Path) -> None:
    name = "model.layers.3.self_attn.k_proj.weight"
    with safe_open(PACKED / WEIGHTS, framework="np") as packed:
        integers, scales = packed.get_tensor(name), packed.get_tensor(name + ".scale")
    unpacked = load_file(folder / "model.safetensors")
    exact = integers.astype(np.float64) * scales.astype(np.float64)[:, None]
    assert unpacked[name].dtype == torch.bfloat16
    # bf16 keeps 8 significant bits: half a unit in the last place is 2**-9 of the value.
    np.testing.assert_allclose(unpacked[name].double().numpy(), exact, rtol=2.0**-8, atol=0)
    assert not any(tensor.endswith(".scale") for tensor in unpacked)
    assert unpacked["model.norm.weight"].dtype == torch.bfloat16


def test_it_has_the_parameters_that_its_shape_says(folder: Path) -> None:
    embedding = 8192 * 512  # tied
    attention = 512 * (512 + 256 + 256) + 512 * 512  # q, k, v of 8 + 4 + 4 heads of 64, then o
    layer = attention + 3 * 512 * 1408 + 2 * 512  # gate, up, down; two norms
    tensors = load_file(folder / "model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == embedding + 8 * layer + 512


def test_expanding_again_leaves_the_folder_alone(folder: Path) -> None:
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert expand(folder) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_a_file_is_no_destination(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(ValueError, match="taken is a file; name a folder"):
        expand(tmp_path / "taken")


@pytest.mark.parametrize("task", ["niah_single", "kv_recall"])
def test_greedy_decoding_answers(folder: Path, task: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    example = load_evals((task,), max_tokens=2048)[4]
    prompt = torch.from_numpy(example.prompt)[None]
    produced = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=len(example.answer))
    assert example.correct(produced[0, prompt.shape[1] :].numpy())


def test_there_are_ten_examples_of_each_task_and_length() -> None:
    examples = load_evals()
    cells = {(example.task, example.length_tokens) for example in examples}
    assert len(cells) == 5 * 4
    assert len(examples) == 200
    for example in examples:
        assert len(example.prompt) + len(example.answer) <= example.length_tokens
        assert example.scored.any()
        assert example.correct(example.answer)


def test_one_wrong_scored_token_is_wrong() -> None:
    example = load_evals(("niah_multiquery",), max_tokens=2048)[0]
    where = np.flatnonzero(example.scored)[-1]
    assert not example.correct(np.where(np.arange(len(example.answer)) == where, 7777, example.answer))
    unscored = np.where(example.scored, example.answer, 7777)
    assert example.correct(unscored)
    with pytest.raises(ValueError, match="generate at least as many"):
        example.correct(example.answer[:-1])


def test_an_unknown_task_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"'vtx' is unknown; the tasks are niah_single, .*kv_recall"):
        load_evals(("vtx",))


@pytest.mark.parametrize(
    ("task", "tail"),
    [("niah_single", 6), ("vt", 6), ("niah_multiquery", 4), ("kv_recall", 4)],
)
def test_the_question_is_the_end_of_the_prompt(task: str, tail: int) -> None:
    """It starts after a line's end, names what is asked, and leaves the needle in the context."""
    for example in load_evals((task,), max_tokens=8192):
        asked = example.question_tokens
        assert tail < asked < 80 if task != "kv_recall" else 1 < asked < 12
        # What the answer says stands in the context, not in the question.
        wanted = example.answer[example.scored][:1].tolist()
        assert set(wanted) <= set(example.prompt[:-asked].tolist())
