"""Shapes read from Hugging Face configs: published parameter counts, layer patterns and errors."""

import time
from typing import Any

import pytest

from policies import hf
from policies.model import ModelShape


def config(
    model_type: str, hidden: int, width: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "torch_dtype": "bfloat16",
        **more,
    }


def read(values: dict[str, Any]) -> ModelShape:
    return hf.read(values, "m")


def kinds(shape: ModelShape) -> str:
    return "".join(layer.kind[0] for layer in shape.layers)


LLAMA = config("llama", 64, 128, 2, 4, 2, 100)
QWEN1_5_MOE = config(
    "qwen2_moe", 2048, 5632, 24, 16, 16, 151936,
    num_experts=60, num_experts_per_tok=4, moe_intermediate_size=1408, shared_expert_intermediate_size=5632,
    decoder_sparse_step=1, use_sliding_window=False, max_window_layers=21, sliding_window=32768,
)  # fmt: skip
DEEPSEEK_V2_LITE = config(
    "deepseek_v2", 2048, 10944, 27, 16, 16, 102400,
    moe_intermediate_size=1408, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6,
    first_k_dense_replace=1, moe_layer_freq=1, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128,
    qk_rope_head_dim=64, v_head_dim=128,
)  # fmt: skip
GEMMA_2_9B = config("gemma2", 3584, 14336, 42, 16, 8, 256000, head_dim=256, sliding_window=4096)
COMMAND_R7B = config("cohere2", 4096, 14336, 32, 32, 8, 256000, head_dim=128, sliding_window=4096, layer_switch=4)
GLM_4_0414 = config("glm4", 4096, 13696, 40, 32, 2, 151552, head_dim=128, attention_bias=True)
BAMBA_9B = config(
    "bamba", 4096, 14336, 32, 32, 8, 128256,
    attn_layer_indices=[9, 18, 27], mamba_n_heads=128, mamba_n_groups=1, mamba_d_state=128, mamba_d_conv=4,
    mamba_expand=2,
)  # fmt: skip
GRANITE_4_TINY = config(
    "granitemoehybrid", 1536, 512, 40, 12, 4, 100352,
    layer_types=["attention" if i % 10 == 5 else "mamba" for i in range(40)], num_local_experts=64,
    num_experts_per_tok=6, shared_intermediate_size=1024, mamba_n_heads=48, mamba_n_groups=1, mamba_d_state=128,
    mamba_d_conv=4, mamba_expand=2, tie_word_embeddings=True,
)  # fmt: skip
LLAMA_4_SCOUT = {
    "model_type": "llama4",
    "text_config": config(
        "llama4_text", 5120, 8192, 48, 40, 8, 202048,
        head_dim=128, intermediate_size_mlp=16384, num_local_experts=16, num_experts_per_tok=1,
        interleave_moe_layer_step=1, attention_chunk_size=8192,
    ) | {"max_position_embeddings": 10485760},
}  # fmt: skip


@pytest.mark.parametrize(
    ("values", "published", "source"),
    [
        (QWEN1_5_MOE, 14.3e9, "model card of Qwen1.5-MoE-A2.7B"),
        (DEEPSEEK_V2_LITE, 15.7e9, "DeepSeek-V2 report, appendix B"),
        (GEMMA_2_9B, (917_962_752 + 8_324_201_984), "Gemma 2 report, table 2, embedding and the rest"),
        (COMMAND_R7B, 8.03e9, "model page of c4ai-command-r7b-12-2024"),
        (GLM_4_0414, 9.40e9, "model page of GLM-4-9B-0414"),
        (BAMBA_9B, 9.78e9, "model card of Bamba-9B"),
        (GRANITE_4_TINY, 6.94e9, "model page of granite-4.0-h-tiny"),
        (LLAMA_4_SCOUT, 107.8e9, "model page of Llama-4-Scout, 108.6 B less 0.86 B of vision"),
    ],
)
def test_published_parameter_counts(values: dict[str, Any], published: float, source: str) -> None:
    assert read(values).params == pytest.approx(published, rel=0.005), source


def test_llama_by_hand() -> None:
    shape = read(LLAMA)
    attention = 64 * 64 + 2 * 64 * 32 + 64 * 64  # q; k and v of two heads of 16; o
    assert shape.params == 2 * (attention + 3 * 64 * 128 + 2 * 64) + 64 + 2 * 100 * 64
    assert shape.kv_bytes_per_token == 2 * 2 * 2 * 16 * 2  # layers, K and V, heads, head_dim, bytes


def test_layer_patterns() -> None:
    assert kinds(read(GEMMA_2_9B)) == "sf" * 21
    assert kinds(read(COMMAND_R7B)) == "sssf" * 8
    assert kinds(read(BAMBA_9B)) == "l" * 9 + "f" + "l" * 8 + "f" + "l" * 8 + "f" + "l" * 4
    assert kinds(read(LLAMA_4_SCOUT)) == "sssf" * 12
    assert kinds(read(DEEPSEEK_V2_LITE)) == "m" * 27
    assert kinds(read(config("mistral", 64, 128, 2, 4, 2, 100, sliding_window=4096))) == "ss"
    windows = {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 3}
    assert kinds(read(config("qwen2", 64, 128, 5, 4, 2, 100, **windows))) == "fffss"
    named = ["full_attention", "sliding_attention"]
    assert kinds(read({**LLAMA, "layer_types": named, "sliding_window": 64})) == "fs"


def test_a_window_of_all_positions_is_none() -> None:
    assert kinds(read(config("phi3", 64, 128, 2, 4, 4, 100, sliding_window=262144))) == "ff"


def test_dense_layers_of_a_mixture() -> None:
    lite = read(DEEPSEEK_V2_LITE)
    assert [layer.experts for layer in lite.layers[:3]] == [0, 64, 64]
    assert lite.kv_bytes_per_token == 27 * (512 + 64) * 2
    sparse = {**QWEN1_5_MOE, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert [layer.experts for layer in read(sparse).layers[:6]] == [0, 60, 0, 0, 0, 60]


def test_mamba2_state_by_hand() -> None:
    bamba = read(BAMBA_9B)
    state = 128 * 64 * 128 + (8192 + 2 * 128) * 3  # heads x head_dim x state; the last 3 inputs of the convolution
    assert bamba.layers[0].state_elements == state
    assert bamba.kv_bytes(1) == 29 * state * 2 + 3 * 2 * 8 * 128 * 2


def test_defaults_of_the_gemma_3_configuration_class() -> None:
    # google/gemma-3-4b-pt says no more of its text model than this.
    values = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    shape = read({"model_type": "gemma3", "torch_dtype": "bfloat16", "text_config": {**values, "sliding_window": 1024}})
    assert kinds(shape) == "sssssf" * 5 + "ssss"
    assert (shape.layers[0].heads, shape.layers[0].kv_heads, shape.layers[0].head_dim) == (8, 4, 256)


def test_older_and_quantised_configs() -> None:
    many_heads = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert read(many_heads).layers[0].kv_heads == 4  # Llama 1: as many as query heads
    assert read({**LLAMA, "torch_dtype": "float16"}).kv_dtype == "fp16"
    assert read({**LLAMA, "quantization_config": {"quant_method": "awq", "bits": 4}}).weight_dtype == "int4"
    assert read({**LLAMA, "quantization_config": {"quant_method": "fp8"}}).weight_dtype == "fp8"
    with pytest.raises(ValueError, match=r"quantization_config=.*known quant_method: fp8, mxfp4, awq, gptq"):
        read({**LLAMA, "quantization_config": {"quant_method": "hqq"}})


def test_an_unknown_family_is_never_read_as_a_llama() -> None:
    with pytest.raises(ValueError, match=r"model_type 'newllama' is not in the table of families.*state them with --p"):
        read({**LLAMA, "model_type": "newllama"})
    with pytest.raises(ValueError, match="model_type '' is not in the table"):
        read({key: value for key, value in LLAMA.items() if key != "model_type"})


def test_stated_weights_take_keys_and_values_from_the_config() -> None:
    shape = hf.read({**LLAMA, "model_type": "newllama"}, "m", params=1_000_000)
    assert (shape.params, shape.kv_bytes_per_token) == (1_000_000, read(LLAMA).kv_bytes_per_token)
    assert shape.source == "stated by --params; keys and values as the config of a 'newllama' has them"
    in_layers = sum(x.qkv_params + x.out_params + x.mlp_params for x in shape.layers)
    assert in_layers == 1_000_000 - 2 * 100 * 64


def test_experts_by_whatever_name_transformers_gives_their_count() -> None:
    moe = config("qwen3_moe", 64, 128, 2, 4, 2, 100, num_experts_per_tok=2, moe_intermediate_size=32)
    counts = {key: read({**moe, key: 6}).layers[0].experts for key in ("num_experts", "num_local_experts")}
    assert counts == {"num_experts": 6, "num_local_experts": 6}


@pytest.mark.parametrize(
    ("changes", "params", "message"),
    [
        ({}, 30_000, "--params 30,000 is [0-9,]+ less than attention and embeddings weigh"),
        ({"model_type": "llama"}, 10**6, "the weights of a llama model are counted; leave it out"),
        ({"ssm_state_size": 16}, 10**6, "ssm_state_size=16 tells of a cache that its keys do not describe"),
        ({"sliding_window": 64}, 10**6, "sliding_window=64 is of layers that nothing names"),
        ({"layer_types": ["full_attention", "mamba"]}, 10**6, "has 'mamba', whose cache its keys do not describe"),
    ],
)
def test_errors_of_stated_weights(changes: dict[str, Any], params: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf.read({**LLAMA, "model_type": "newllama", **changes}, "m", params=params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": ["llama"]}, "model_type must be a name, not"),
        ({"vocab_size": None}, "config of 'm' has no key 'vocab_size'"),
        ({"vocab_size": "many"}, "vocab_size='many' must be a whole number of at least 1"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "hidden_size=64 is not a multiple of num_at"),
        ({"torch_dtype": "int3"}, "torch_dtype='int3' is not one of bfloat16, float16, float32"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' must be true or false"),
        ({"layer_types": ["full_attention"]}, "num_hidden_layers=2 differs from the 1 entries of layer_types"),
        ({"layer_types": ["full_attention", "hyena"]}, "layer_types=.* has 'hyena'; known: full_attention"),
        ({"layer_types": ["mamba", "mamba"]}, "has linear layers, which 'llama' models do not have"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "has no key 'sliding_window'"),
    ],
)  # fmt: skip
def test_errors_name_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read({**LLAMA, **changes})


@pytest.mark.parametrize(
    "value", [0, -1, 2**20 + 1, 2**63 - 1, 10**30, 1.5, float("nan"), True, "64", [], {}, {"a": 1}],
)  # fmt: skip
@pytest.mark.parametrize(
    "key", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
)
def test_no_number_is_taken_that_is_none_or_too_large(key: str, value: object) -> None:
    """Within a second, and in one line; of the value no more than a glance."""
    began = time.process_time()
    with pytest.raises(ValueError, match=key) as error:
        read({**LLAMA, key: value})
    assert time.process_time() - began < 1
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": []},
        {"model_type": {}},
        {"model_type": 7},
        {"layer_types": {}},
        {"layer_types": [[], {}]},
        {"layer_types": "full_attention"},
        {"torch_dtype": []},
        {"torch_dtype": {"a": 1}},
        {"quantization_config": []},
        {"quantization_config": "awq"},
        {"text_config": []},
        {"model_type": "llava", "text_config": {"model_type": []}},
        {"tie_word_embeddings": []},
        {"head_dim": 2**21},
        {"vocab_size": 2**25},
        {"max_position_embeddings": 2**33},
        {"num_attention_heads": 2**16, "num_key_value_heads": 1, "head_dim": 2**16},
    ],
)
def test_no_list_is_taken_where_a_name_belongs(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^(config of 'm'|heads=)") as error:
        read({**LLAMA, **changes})
    assert len(str(error.value)) < 400


def test_a_long_value_comes_after_the_rule() -> None:
    rule = r"^config of 'm': quantization_config is not understood; .*; it begins \{"
    with pytest.raises(ValueError, match=rule) as error:
        read({**LLAMA, "quantization_config": {"quant_method": "hqq", "layers": ["x" * 50] * 1000}})
    assert len(str(error.value).partition("it begins ")[2]) <= 80
