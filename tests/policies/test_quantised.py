"""Quantised checkpoints: sizes that were published, to the byte, and each format counted by hand."""

import json
from importlib.resources import files
from typing import Any

import pytest

from policies import hf
from policies.model import ModelShape

HIDDEN, WIDTH, LAYERS, KV_DIM, VOCAB = 256, 512, 2, 128, 1000
LLAMA = {
    "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip
# (outputs, inputs) of a layer's matrices: q, k, v, o, gate, up, down.
MATRICES = [(256, 256), (128, 256), (128, 256), (256, 256), (512, 256), (512, 256), (256, 512)]
ELEMENTS = sum(outputs * inputs for outputs, inputs in MATRICES)
OUTPUTS, INPUTS = sum(outputs for outputs, _ in MATRICES), sum(inputs for _, inputs in MATRICES)
UNCONVERTED = 2 * (2 * VOCAB * HIDDEN + HIDDEN + LAYERS * 2 * HIDDEN)  # embedding, head, norms in 16 bits
CT_FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
INPUTS_FP8 = {"num_bits": 8, "type": "float", "dynamic": True}
GROUP = {"targets": ["Linear"], "weights": CT_FP8, "input_activations": INPUTS_FP8}
CT = {"quant_method": "compressed-tensors", "config_groups": {"group_0": GROUP}}


def catalogue(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((files("kvsim") / "catalogue" / "models" / f"{name}.json").read_text())
    return config


def read(**quantization: Any) -> ModelShape:
    return hf.read({**LLAMA, "quantization_config": quantization}, "m")


def layer_bytes(shape: ModelShape) -> int:
    """Of the matrices of one layer."""
    assert (shape.weight_bytes - UNCONVERTED) % LAYERS == 0
    return (shape.weight_bytes - UNCONVERTED) // LAYERS


@pytest.mark.parametrize(
    ("name", "quantization", "published", "source"),
    [
        ("gpt-oss-20b", None, 13_761_264_768, "total_size of its model.safetensors.index.json"),
        ("gpt-oss-120b", None, 65_248_815_744, "total_size of its model.safetensors.index.json"),
        (
            "deepseek-v3", {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"},
            364_589_799_936, "total_size of an AWQ checkpoint's index, github.com/kvcache-ai/sglang_awq",
        ),
        (
            "llama-3-70b", {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
            39_767_785_472, "total_size of an AWQ checkpoint's index of 9 files, quoted in a public test",
        ),
    ],
)  # fmt: skip
def test_published_sizes_to_the_byte(
    name: str, quantization: dict[str, Any] | None, published: int, source: str
) -> None:
    config = catalogue(name)
    if quantization is not None:
        config["quantization_config"] = quantization
    assert hf.read(config, name).weight_bytes == published, source


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        # A word of eight elements; a scale in fp16 and a zero point in 4 bits for each 128 inputs; an index of inputs.
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128},
            ELEMENTS // 2 + ELEMENTS // 128 * 2 + ELEMENTS // 128 // 2 + 4 * INPUTS,
        ),
        (
            {"quant_method": "gptq", "bits": 8, "group_size": -1},
            ELEMENTS + 2 * OUTPUTS + OUTPUTS + 4 * INPUTS,
        ),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 64},
            ELEMENTS // 2 + ELEMENTS // 64 * 2 + ELEMENTS // 64 // 2,
        ),
        # Blocks of 128 x 128: every dimension here is a multiple.
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, ELEMENTS + ELEMENTS // 128**2 * 4),
        ({"quant_method": "fp8", "activation_scheme": "static"}, ELEMENTS + 7 * (4 + 4)),
        ({"quant_method": "fbgemm_fp8"}, ELEMENTS + 4 * OUTPUTS),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, ELEMENTS + 4 * OUTPUTS + 7),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ELEMENTS // 2 + ELEMENTS // 64 * 4 + 7 * 64),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
            ELEMENTS // 2 + ELEMENTS // 64 + ELEMENTS // 64 // 256 * 4 + 7 * (64 + 1024),
        ),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["lm_head"]}, ELEMENTS + 7 * (4 + 4)),
        # An fp8 scale for each 16; two in fp32 for the matrix and for its inputs.
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]},
            ELEMENTS // 2 + ELEMENTS // 16 + 7 * 8,
        ),
        (
            {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
             "config_groups": {"group_0": GROUP}},
            ELEMENTS + 2 * OUTPUTS,
        ),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["re:.*lm_head"],
             "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
                 "num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}}}},
            ELEMENTS // 2 + ELEMENTS // 128 * 2 + 7 * 16,  # and the shape before packing, two int64
        ),
        (
            {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "ignore": ["lm_head"],
             "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
                 "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
                 "input_activations": {"num_bits": 4, "type": "float"}}}},
            ELEMENTS // 2 + ELEMENTS // 16 + 7 * 8,
        ),
        (
            {"quant_method": "quark", "exclude": ["lm_head"], "global_quant_config": {
                "weight": {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}}},
            ELEMENTS // 2 + ELEMENTS // 32,
        ),
    ],
    ids=lambda value: str(value.get("quant_method")) if isinstance(value, dict) else "",
)  # fmt: skip
def test_formats_by_hand(quantization: dict[str, Any], expected: int) -> None:
    assert layer_bytes(read(**quantization)) == expected


def test_a_head_is_converted_where_its_scheme_says_so() -> None:
    ignored = read(quant_method="compressed-tensors", config_groups={"group_0": GROUP}, ignore=["lm_head"])
    converted = read(quant_method="compressed-tensors", config_groups={"group_0": GROUP}, ignore=[])
    assert ignored.head_bytes == 2 * VOCAB * HIDDEN
    assert converted.head_bytes == VOCAB * HIDDEN + 2 * VOCAB
    assert ignored.weight_bytes - converted.weight_bytes == ignored.head_bytes - converted.head_bytes
    assert read(quant_method="gptq", bits=4, lm_head=True).head_bytes < VOCAB * HIDDEN
    assert read(quant_method="gptq", bits=4).head_bytes == 2 * VOCAB * HIDDEN


@pytest.mark.parametrize(
    ("kept", "dtypes"),
    [
        (["lm_head"], "fp8"),
        (["lm_head", "self_attn"], "bf16"),
        (["lm_head", "model.layers.0.self_attn", "model.layers.1.self_attn"], "bf16"),
        (["lm_head", "model.layers.*.self_attn"], "bf16"),
        (["lm_head", "*self_attn*"], "bf16"),
        (["lm_head", "re:.*self_attn.*"], "bf16"),
        (["lm_head", r"re:model\.layers\.\d+\.self_attn\..*_proj$"], "bf16"),
        (["lm_head", "model.layers.1.self_attn*"], "fp8+bf16"),
        (["lm_head", "vision_tower.layers.0.self_attn", "re:visual.*", "mtp.layers.0.self_attn"], "fp8"),
    ],
)
def test_modules_that_stay_as_they_were(kept: list[str], dtypes: str) -> None:
    shape = read(quant_method="compressed-tensors", config_groups={"group_0": GROUP}, ignore=kept)
    assert shape.stored_dtypes == {"attention": dtypes, "mlp": "fp8", "embeddings": "bf16", "head": "bf16"}


def test_layers_of_several_formats() -> None:
    """Attention in FP8, MLPs in NVFP4 whose inputs are not quantised, as ModelOpt lists them by name."""
    attention = {f"model.layers.{i}.self_attn.{x}_proj": {"quant_algo": "FP8"} for i in range(2) for x in "qkvo"}
    mlps = {f"model.layers.{i}.mlp": {"quant_algo": "W4A16_NVFP4", "group_size": 16} for i in range(2)}
    shape = read(
        quant_method="modelopt", quant_algo="MIXED_PRECISION", kv_cache_quant_algo="FP8",
        quantized_layers={**attention, **mlps},
    )  # fmt: skip
    assert shape.stored_dtypes == {"attention": "fp8", "mlp": "nvfp4", "embeddings": "bf16", "head": "bf16"}
    assert [dtype for dtype, params in shape.products(shape.layers[0]) if params] == ["fp8", "fp8", "bf16"]
    in_mlp = 3 * HIDDEN * WIDTH
    expected = ELEMENTS - in_mlp + 4 * 8 + in_mlp // 2 + in_mlp // 16 + 3 * 4 + 2 * 4  # and scales of keys and values
    assert layer_bytes(shape) == expected
    assert shape.kv_dtype == "fp8"
    assert shape.kv_bytes_per_token == LAYERS * 2 * KV_DIM


def test_experts_and_shared_experts_by_their_own_names() -> None:
    """DeepSeek-V3 as ModelOpt converts it: attention but the output projection stays, and so does the head."""
    config, layers = catalogue("deepseek-v3"), range(61)
    kept = [f"model.layers.{i}.self_attn.{name}" for i in layers for name in ("q_a_proj", "q_b_proj", "kv_b_proj")]
    kept += [f"model.layers.{i}.self_attn.kv_a_proj_with_mqa" for i in layers]
    config["quantization_config"] = {
        "quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8",
        "exclude_modules": ["lm_head", *kept, "model.layers.61*"],
    }  # fmt: skip
    shape = hf.read(config, "m")
    expert = 3 * 7168 * 2048
    converted = expert // 2 + expert // 16 + 3 * 8
    assert {layer.expert_stored.nbytes for layer in shape.layers if layer.expert_stored} == {converted}
    assert shape.layers[5].dense_stored is not None
    router_and_norm = 256 * 7168 + 256 + 7168
    assert shape.layers[5].dense_stored.nbytes == converted + 2 * router_and_norm
    assert shape.layers[5].out_stored is not None
    out = 7168 * 128 * 128
    assert shape.layers[5].out_stored.nbytes == out // 2 + out // 16 + 8
    assert shape.kv_bytes_per_token == 61 * (512 + 64)


@pytest.mark.parametrize(
    ("quantization", "kv_dtype"),
    [
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_quant_algo": "NVFP4"}, "nvfp4"),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": None}, "bf16"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": GROUP},
             "kv_cache_scheme": {"num_bits": 8, "type": "float"}},
            "fp8",
        ),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": GROUP}, "kv_cache_scheme": None}, "bf16"),
    ],
)  # fmt: skip
def test_the_cache_has_the_scheme_s_type(quantization: dict[str, Any], kv_dtype: str) -> None:
    assert read(**quantization).kv_dtype == kv_dtype


def test_what_a_step_reads_is_what_is_stored() -> None:
    """A batch that touches every expert reads all weights but the embedding and the last norm."""
    for name in ("gpt-oss-20b", "deepseek-v3"):
        shape = hf.read(catalogue(name), name)
        read_bytes = sum(shape.layer_bytes_touched(layer, 10**6) for layer in shape.layers) + shape.head_bytes
        outside = 2 * (shape.outer_params - shape.head_params)
        assert read_bytes + outside == shape.weight_bytes
    assert {dtype for dtype, _ in shape.products(shape.layers[-1])} == {"fp8"}


def test_another_type_replaces_the_scheme() -> None:
    shape = read(quant_method="awq", bits=4)
    plain = hf.read(LLAMA, "m")
    assert shape.stored_as("bf16") == plain
    assert shape.stored_as(kv_dtype="fp8").weight_bytes == shape.weight_bytes


def test_ranks_share_what_is_stored() -> None:
    shape = read(quant_method="fp8", weight_block_size=[128, 128])
    assert 2 * shape.shard(2).weight_bytes == pytest.approx(shape.weight_bytes, rel=1e-3)


def test_fp32_is_served_in_half_of_it() -> None:
    shape = hf.read({**LLAMA, "torch_dtype": "float32"}, "m")
    assert (shape.weight_dtype, shape.kv_dtype) == ("bf16", "bf16")
    assert shape.notes
    assert "--weight-dtype fp32" in shape.notes[0]
    assert shape.stored_as("fp32").weight_bytes == 2 * shape.weight_bytes


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "hqq"}, "is not understood; known quant_method: fp8"),
        ({"quant_method": []}, "is not understood; known quant_method: fp8"),
        ({"quant_method": "gptq", "bits": 5}, "bits=5 must be 2, 3, 4 or 8"),
        ({"quant_method": "gptq"}, "has no key 'bits'"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "must be two whole numbers"),
        ({"quant_method": "fp8", "modules_to_not_convert": [7]}, "must be texts, and 7 is none"),
        ({"quant_method": "compressed-tensors"}, "is needed"),
        ({"quant_method": "compressed-tensors", "config_groups": []}, "must be an object"),
        ({**CT, "ignore": ["re:("]}, "no regular expression"),
        ({**CT, "ignore": ["re:(.*)*x"]}, "nested repeats"),
        ({**CT, "ignore": ["re:" + ".*a" * 40]}, "repeats"),
        ({"quant_method": "modelopt", "quant_algo": "FP3"}, "known: FP8"),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP3"}, "must be FP8, INT8, NVFP4"),
        ({"quant_method": "bitsandbytes"}, "must be true"),
        ({"quant_method": "hqq", "more": ["x" * 100] * 1000}, "understood"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_in_a_line(quantization: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read(**quantization)
    assert len(str(error.value)) < 500


def test_older_and_empty_configs() -> None:
    assert read().weight_bytes == hf.read(LLAMA, "m").weight_bytes
    assert read(load_in_8bit=True) == read(quant_method="bitsandbytes", load_in_8bit=True)
    with pytest.raises(ValueError, match="quantized_layers must hold objects") as error:
        read(quant_method="modelopt", quantized_layers={"x" * 10_000: 7})
    assert len(str(error.value)) < 400
