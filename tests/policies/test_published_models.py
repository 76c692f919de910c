"""Public configs: their weights as Transformers counts them, their caches by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from policies import POLICIES, ModelShape, Step, hf, parse_policy, plan_layer
from policies.plan import Tier, flops, stored_bytes

MODELS = {
    entry["model"]: entry
    for entry in json.loads(Path(__file__).with_name("published_models.json").read_text(encoding="utf-8"))["models"]
}
T = 100_001  # tokens, beyond every window
KV = 2 * 2  # bytes of a key and a value element in bf16

# Bytes of T tokens: of rows that grow, of full windows, and of states.
BY_HAND = {
    "MiniMaxAI/MiniMax-M2.5": 62 * 8 * 128 * KV * T,
    "nvidia/MiniMax-M3-NVFP4": 60 * 4 * 128 * KV * T + 57 * 128 * 2 * T,  # an indexer's key in all but three layers
    "Qwen/Qwen3-235B-A22B": 94 * 4 * 128 * KV * T,
    "Qwen/Qwen3-VL-8B-Instruct": 36 * 8 * 128 * KV * T,
    # 48 of 64 layers: 48 heads of 128 x 128, and three inputs of a convolution over queries, keys and values.
    "Qwen/Qwen3.5-27B": 16 * 4 * 256 * KV * T + 48 * (48 * 128 * 128 + 3 * (2 * 16 + 48) * 128) * 2,
    "Qwen/Qwen3.5-397B-A17B": 15 * 2 * 256 * KV * T + 45 * (64 * 128 * 128 + 3 * (2 * 16 + 64) * 128) * 2,
    "XiaomiMiMo/MiMo-7B-Base": 36 * 8 * 128 * KV * T,
    # Keys of 192, values of 128 elements: 4 heads in 9 full layers, 8 in 39 with a window of 128.
    "XiaomiMiMo/MiMo-V2-Flash": (9 * 4 * T + 39 * 8 * 128) * (192 + 128) * 2,
    "deepseek-ai/DeepSeek-V3.2": 61 * (512 + 64 + 128) * 2 * T,
    # 2 layers with a window of 128 alone, 21 with a row for 4 tokens and a key of 128 for each, 20 with one for 128.
    "deepseek-ai/DeepSeek-V4-Flash": 2 * (43 * 128 * 512 + 21 * (T // 4) * (512 + 128) + 20 * (T // 128) * 512),
    "google/gemma-4-26B-A4B": 5 * 2 * 512 * KV * T + 25 * 8 * 256 * KV * 1024,
    "nvidia/Gemma-4-31B-IT-NVFP4": 10 * 4 * 512 * KV * T + 50 * 16 * 256 * KV * 1024,
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct": (12 * T + 36 * 8192) * 8 * 128 * KV,
    "moonshotai/Kimi-K2-Instruct": 61 * 576 * 2 * T,
    "moonshotai/Kimi-K2.5": 61 * 576 * 2 * T,
    "zai-org/GLM-5": 78 * (576 + 128) * 2 * T,
    "zai-org/GLM-5.2": (78 * 576 + 21 * 128) * 2 * T,  # 21 layers have an indexer of their own
    "nvidia/Llama-3_3-Nemotron-Super-49B-v1": 49 * 8 * 128 * KV * T,
    # 8 attention layers; 40 of Mamba-2: 128 heads x 64 x 128, and three inputs of 8192 + 2 x 8 x 128 channels.
    "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-FP8": 8 * 2 * 128 * KV * T
    + 40 * (128 * 64 * 128 + 3 * (8192 + 2 * 8 * 128)) * 2,
    "stepfun-ai/Step-3.7-Flash": (12 * T + 33 * 512) * 8 * 128 * KV,
    "openai/gpt-oss-120b": (18 * T + 18 * 128) * 8 * 64 * KV,
}


def shape_of(model: str) -> ModelShape:
    return hf.read(MODELS[model]["config"], model)


@pytest.mark.parametrize("model", MODELS)
def test_weights_as_counted(model: str) -> None:
    entry = MODELS[model]
    assert shape_of(model).params == pytest.approx(entry["params"], rel=entry["within"], abs=0), entry["counted_by"]


@pytest.mark.parametrize("model", MODELS)
def test_caches_by_hand(model: str) -> None:
    assert shape_of(model).kv_bytes(T) == BY_HAND[model]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tokens", [1, 127, 1000, T])
def test_the_dense_cache_s_plan_stores_what_the_shape_says(model: str, tokens: int) -> None:
    shape, policy = shape_of(model), parse_policy("full")
    step = Step.decoding(tokens - 1, 1) if tokens > 1 else Step(prompt_tokens=1, past_tokens=0, new_tokens=1)
    stored = stored_bytes([plan_layer(policy, shape, step, layer).buffers for layer in range(shape.n_layers)])
    assert stored == {Tier.HBM: shape.kv_bytes(tokens)}


def brute_force_pairs(window: int, block: int, most: int, tokens: range) -> int:
    return sum(min(t, window) + min(t // block, most) for t in tokens)


def test_compressed_attention_pair_by_pair() -> None:
    """DeepSeek-V4-Flash: a window of 128, and 512 rows that an indexer chooses, or all of those for 128 tokens."""
    shape, policy = shape_of("deepseek-ai/DeepSeek-V4-Flash"), parse_policy("full")
    for past, new in ((0, 3000), (2500, 700), (4000, 1)):
        step = Step(prompt_tokens=past + new, past_tokens=past, new_tokens=new)
        for layer, block, most in ((2, 4, 512), (3, 128, 10**9)):
            seen = range(past + 1, past + new + 1)
            pairs = brute_force_pairs(128, block, most, seen)
            scored = sum(t // 4 for t in seen) if block == 4 else 0
            work = pairs * 2 * 64 * (512 + 512) + scored * 2 * 64 * 128
            assert flops(plan_layer(policy, shape, step, layer).ops, {}) == work


def test_an_indexer_limits_what_is_attended_to() -> None:
    shape, policy = shape_of("deepseek-ai/DeepSeek-V3.2"), parse_policy("full")
    step = Step(prompt_tokens=5000, past_tokens=0, new_tokens=5000)
    attended = sum(min(t, 2048) for t in range(1, 5001))
    scored = sum(range(1, 5001))
    work = attended * 2 * 128 * (192 + 128) + scored * 2 * 64 * 128
    assert flops(plan_layer(policy, shape, step, 0).ops, {}) == work


def small(model_type: str, **keys: Any) -> ModelShape:
    common = {
        "model_type": model_type, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 4096,
    }  # fmt: skip
    return hf.read({**common, **keys}, "m")


def test_a_mixer_beside_attention_adds_its_state() -> None:
    """Falcon-H1: each layer has a Mamba-2 of 4 heads x 8 x 16, and a convolution of 32 + 2 x 16 channels."""
    shape = small("falcon_h1", num_hidden_layers=3, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=16)
    state = 4 * 8 * 16 + 3 * (32 + 2 * 16)
    assert shape.kv_bytes(T) == 3 * (2 * 16 * KV * T + state * 2)
    plan = plan_layer(parse_policy("full"), shape, Step.decoding(9, 1), 0)
    assert stored_bytes([plan.buffers])[Tier.HBM] == 2 * 16 * KV * 10 + state * 2


def test_layers_that_share_a_cache_store_none() -> None:
    """Gemma 3n: of 10 layers, the last 4 read what layers 4 (full) and 5 (window) hold."""
    shape = small("gemma3n_text", num_hidden_layers=10, head_dim=16, sliding_window=64, num_kv_shared_layers=4)
    assert [layer.share_kv_with for layer in shape.layers] == [None] * 6 + [5, 5, 5, 4]
    assert shape.kv_bytes(T) == 2 * 16 * KV * (T + 5 * 64)


def test_zamba2_attends_in_its_hybrid_layers() -> None:
    kinds = ["mamba", "hybrid", "mamba", "hybrid"]
    shape = small("zamba2", num_hidden_layers=4, num_key_value_heads=4, layers_block_type=kinds, mamba_d_state=16,
                  n_mamba_heads=4, mamba_ngroups=1)  # fmt: skip
    state = 128 * 16 + 3 * (128 + 2 * 16)
    assert shape.kv_bytes(T) == 2 * 4 * 32 * KV * T + 4 * state * 2


def test_longcat_flash_as_its_report_counts() -> None:
    """arXiv:2509.01322: 560 B weights, 18.6 to 31.3 B of them active, 27 B on average; two MLA caches a layer."""
    shape = small(
        "longcat_flash", hidden_size=6144, num_layers=28, num_attention_heads=64, vocab_size=131072, q_lora_rank=1536,
        kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, ffn_hidden_size=12288,
        n_routed_experts=512, zero_expert_num=256, moe_topk=12, expert_ffn_hidden_size=2048, num_hidden_layers=28,
    )  # fmt: skip
    assert shape.params == pytest.approx(560e9, rel=0.01)
    assert shape.active_params == pytest.approx(27e9, rel=0.05)
    assert shape.kv_bytes(T) == 56 * 576 * 2 * T


@pytest.mark.parametrize("key", ["text_config", "llm_config", "language_config", "thinker_config", "brain_config"])
def test_wrappers_of_any_name(key: str) -> None:
    text = {
        "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 100,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    inner = {"text_config": text} if key == "thinker_config" else text
    outer = {
        "model_type": "seer",
        key: inner,
        "vision_config": {"hidden_size": 32, "vocab_size": 5},
        "talker_config": text,
    }
    assert hf.read(outer, "m").params == hf.read(text, "m").params


def test_a_sparse_text_config_has_the_defaults_of_its_class() -> None:
    text = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096}
    shape = hf.read({"model_type": "llava", "text_config": text, "torch_dtype": "float16"}, "llava-1.5-7b")
    vicuna = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096) + 4096 + 2 * 32064 * 4096
    assert (shape.params, shape.kv_dtype) == (vicuna, "fp16")
    with pytest.raises(ValueError, match="has no key 'num_hidden_layers'"):
        hf.read(text, "m")
    with pytest.raises(ValueError, match="a_config and b_config may both hold the language model"):
        hf.read({"model_type": "x", "a_config": text, "b_config": text}, "m")


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_beside_attention_keeps_out_of_every_policy_s_way(policy: str) -> None:
    """Operations and buffers of an indexer and a mixer have names of their own, and attention waits for them."""
    beside = {
        "indexer": shape_of("nvidia/MiniMax-M3-NVFP4"),
        "mixer": small("falcon_h1", num_hidden_layers=3, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8,
                       mamba_d_state=16, max_position_embeddings=65536, num_attention_heads=2, head_dim=128),
    }  # fmt: skip
    for name, shape in beside.items():
        for step in (Step(prompt_tokens=20_000, past_tokens=0, new_tokens=20_000), Step.decoding(20_000, 1)):
            plan = plan_layer(parse_policy(policy), shape, step, shape.n_layers - 1)
            names, buffers = [op.name for op in plan.ops], [buffer.name for buffer in plan.buffers]
            assert names.count(name) == 1
            assert len(set(names)) == len(names)
            assert len(set(buffers)) == len(buffers)
            assert all(name in op.after for op in plan.ops if op.name == "attend")
