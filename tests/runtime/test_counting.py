"""`kvsim model show --exact`: weights of any architecture that Transformers has, towers apart."""

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from kvsim.__main__ import main
from policies import hf
from runtime.counting import count_weights

TEXT = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}  # fmt: skip
VISION = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "projection_dim": 16,
}  # fmt: skip
JETMOE = {
    "model_type": "jetmoe", "hidden_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 2, "kv_channels": 16,
    "intermediate_size": 96, "vocab_size": 100, "max_position_embeddings": 512, "num_local_experts": 4,
    "num_experts_per_tok": 2,
}  # fmt: skip


def shown(capsys: pytest.CaptureFixture[str], path: Path, config: dict, *options: str) -> tuple[int, dict, str]:
    path.joinpath("config.json").write_text(json.dumps(config))
    code = main(["model", "show", str(path / "config.json"), "--json", *options])
    out, err = capsys.readouterr()
    return code, json.loads(out or "{}"), err


def test_a_tower_stands_apart_and_takes_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llava = {"model_type": "llava", "text_config": TEXT, "vision_config": VISION, "image_token_index": 99}
    code, facts, _ = shown(capsys, tmp_path, llava, "--exact")
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
    assert (code, facts["params"]) == (0, 2 * layer + 64 + 2 * 100 * 64)
    # Patches, class and 5 positions; one layer with biases; three norms; and the projector's two matrices.
    tower = 3 * 14 * 14 * 32 + 32 + 5 * 32 + 4 * (32 * 32 + 32) + (2 * 32 * 64 + 64 + 32) + 4 * 32 + 2 * 2 * 32
    projector = 32 * 64 + 64 + 64 * 64 + 64
    assert facts["other_params"] == tower + projector
    assert facts["weight_bytes"] == 2 * (facts["params"] + facts["other_params"])
    assert facts["params_source"].startswith("family table: llama; counted by Transformers ")


def test_an_architecture_beyond_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, facts, _ = shown(capsys, tmp_path, JETMOE, "--exact")
    expert = 64 * 2 * 96 + 96 * 64
    attention = 4 * (64 * 32 + 32 * 64) + 4 * 64 + 64 + 2 * 64 * 32  # experts of q and out, router, bias; k and v
    assert (code, facts["params"]) == (0, 2 * (attention + 4 * expert + 4 * 64 + 64 + 2 * 64) + 64 + 100 * 64)
    assert facts["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 2
    assert facts["params_source"].startswith("counted by Transformers ")
    code, facts, _ = shown(capsys, tmp_path, {**JETMOE, "num_attention_heads": 4}, "--params", "1.5M")
    assert (code, facts["params"], facts["kv_bytes_per_token"]) == (0, 1_500_000, 2 * 2 * 2 * 16 * 2)
    assert facts["params_source"].startswith("stated by --params")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "model_type 'jetmoe' is not in the table of families, and its weights are not guessed"),
        (("--exact", "--params", "8B"), "--exact counts the weights and --params states them; give one"),
        (("--params", "many"), "number of weights 'many' is not a finite number"),
        (("--params", "0"), "number of weights '0' must be at least 1"),
    ],
)
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str) -> None:
    code, _, err = shown(capsys, tmp_path, JETMOE, *options)
    assert code == 2
    assert message in err


def test_what_transformers_cannot_count() -> None:
    with pytest.raises(ValueError, match="has no architecture 'hyena'; state the weights with --params"):
        count_weights({"model_type": "hyena"})
    with pytest.raises(ValueError, match="makes no model of this config"):
        count_weights({**TEXT, "hidden_size": "wide"})


QWEN_TEXT = {**TEXT, "model_type": "qwen2"}
TOWERS = {
    "llava": ({}, VISION, TEXT),
    "qwen2_vl": ({}, {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 4}, QWEN_TEXT),
    "qwen2_5_vl": (
        {}, {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}, QWEN_TEXT),
    "qwen3_vl": (
        {}, {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
             "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}, {**TEXT, "model_type": "qwen3"}),
    "gemma3": (
        {}, {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_use_head": False},
        {**TEXT, "model_type": "gemma3_text", "head_dim": 16}),
    "mistral3": (
        {"spatial_merge_size": 2}, {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48,
                                    "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14},
        {**TEXT, "model_type": "mistral", "head_dim": 16}),
}  # fmt: skip


@pytest.mark.parametrize("model_type", TOWERS)
def test_towers_of_the_table_are_those_that_transformers_builds(model_type: str) -> None:
    outer, vision, text = TOWERS[model_type]
    full = {"patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2} if "qwen" in model_type else {}
    names = {"qwen2_vl": "qwen2_vl_text", "qwen2_5_vl": "qwen2_5_vl_text", "qwen3_vl": "qwen3_vl_text"}
    text = {**text, "model_type": names.get(model_type, text["model_type"])}
    untied = {"tie_word_embeddings": False}  # in both places, as some wrappers' classes tie by default
    config = {"model_type": model_type, **untied, **outer, "vision_config": {**full, **vision}, "text_config": text}
    counted, shape = count_weights(config), hf.read(config, "m")
    assert (shape.params, shape.other_params, shape.notes) == (counted.params, counted.other_params, ())


def test_a_tower_that_is_not_counted_is_told_of() -> None:
    shape = hf.read({"model_type": "llava", "text_config": TEXT, "vision_config": {"hidden_size": 32}}, "m")
    assert shape.other_params == 0
    assert shape.notes[0].startswith("vision_config: its weights are not counted, and take memory besides")
