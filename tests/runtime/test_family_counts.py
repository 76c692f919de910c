"""Every family of the table that Transformers has: our count of weights against its own model, to the last one."""

import json
import re
import warnings
from typing import Any

import pytest

from policies import hf
from policies.hf.defaults import defaults_of
from policies.hf.families import FAMILIES
from policies.model import ModelShape

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
auto = pytest.importorskip("transformers.models.auto.configuration_auto")

# What a class leaves open, or has in a way of which it makes no model.
NEEDED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, "moe_intermediate_size": 32},
    "deepseek_v4": {"compress_ratios": [0, 4, 128, 4], "num_hash_layers": 1, "n_shared_experts": 1},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "head_dim": 128,
              "first_k_dense_replace": 1},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 704,
                    "num_kv_shared_layers": 2, "use_double_wide_mlp": True, "attention_k_eq_v": True,
                    "num_global_key_value_heads": 2, "num_hidden_layers": 8},
    "gemma3n_text": {"num_kv_shared_layers": 2, "num_hidden_layers": 8, "intermediate_size": 2048},
    "glm4_moe": {"head_dim": 128, "use_qk_norm": True},
    "glm_moe_dsa": {"index_topk_freq": 2, "index_skip_topk_offset": 1, "num_hidden_layers": 5},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 4},
    "kimi_linear": {"num_hidden_layers": 5},
    "lfm2_moe": {"layer_types": ["full_attention", "conv", "conv", "full_attention"]},
    "minimax_m3_vl_text": {
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "layer_types": ["full_attention", "full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
    },
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "nemotron_h": {"moe_latent_size": 64, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    "qwen3_next": {"num_hidden_layers": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "hybrid", "linear_attention", "hybrid"],
               "num_hidden_layers": 5, "num_mem_blocks": 2},
}  # fmt: skip
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Switches that change weights. Each is turned over wherever a class has it.
SWITCHES = (
    "attention_bias", "mlp_bias", "use_bias", "bias", "qkv_bias", "use_qkv_bias", "attention_out_bias", "enable_bias",
    "tie_word_embeddings", "use_qk_norm", "qk_layernorm", "mamba_conv_bias", "mamba_proj_bias", "conv_bias",
    "use_conv_bias", "projectors_bias", "lm_head_bias", "use_expert_bias", "use_shared_attention_adapter",
    "add_bias_linear", "mamba_rms_norm", "use_parallel_residual", "parallel_attn", "multi_query",
    "do_layer_norm_before", "use_post_norm",
)  # fmt: skip
# Numbers that may be doubled each for itself, without another that would have to follow.
SIZES = re.compile(
    "vocab_size$|experts$|intermediate_size|^ffn_dim$|^n_inner$|lora_rank$|^qk_nope_head_dim$|^index_|d_state$|d_conv$|"
    "^state_size$|conv_kernel|^conv_L_cache$|laurel_rank|hidden_size_per_layer_input|max_position_embeddings|n_positions"
)
# Turned over, these make a config of which Transformers itself makes no model, or one without the part.
LEFT = {
    "kimi_linear": ("tie_word_embeddings",),  # it never ties
    "nemotron_h": ("tie_word_embeddings", "mamba_proj_bias"),
    "zamba2": ("tie_word_embeddings",),  # untied, its shared blocks come apart as well
}  # fmt: skip
UNBUILT = {
    "dbrx": "Transformers 5.17 makes no model of its own default config",
    "longcat_flash": "Transformers 5.17 sets aside gates for experts that are the identity and have no weights",
    "mistral4": "it is no entry of AutoModelForCausalLM",
    "step3p5": "Transformers makes it within a vision-language model alone",
}
KNOWN = sorted(name for name in FAMILIES if name in auto.CONFIG_MAPPING and name not in UNBUILT)


def weights(config: Any) -> int:
    """Weights of the model that Transformers builds: its parameters, and the biases that balance experts."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(config)
    biases = sum(x.numel() for name, x in model.named_buffers() if name.endswith(("correction_bias", "expert_bias")))
    return sum(x.numel() for x in model.parameters()) + biases


def made(model_type: str, **changes: Any) -> Any:
    """A class's own default config with a few layers, and what else is given."""
    config_class = auto.CONFIG_MAPPING[model_type]
    given = dict(NEEDED.get(model_type, {}))
    own = next((name for name in LAYERS if name in config_class.__dataclass_fields__), None)
    if own and own not in given and "layers_block_type" not in given:
        given[own] = 4
    return config_class(**{**given, **changes})


def read(config: Any) -> ModelShape:
    return hf.read(json.loads(config.to_json_string(use_diff=False)), "m")


@pytest.mark.parametrize("model_type", KNOWN)
def test_every_weight_of_a_family_is_counted(model_type: str) -> None:
    config = made(model_type)
    assert read(config).params == weights(config)


@pytest.mark.parametrize("model_type", KNOWN)
def test_switches_change_the_count_as_they_change_the_model(model_type: str) -> None:
    fields = auto.CONFIG_MAPPING[model_type].__dataclass_fields__
    names = [name for name in SWITCHES if name in fields and name not in LEFT.get(model_type, ())]
    over = {name: not fields[name].default for name in names if isinstance(fields[name].default, bool)}
    if not over:
        pytest.skip("no switches")
    config = made(model_type, **over)
    assert read(config).params == weights(config), over


@pytest.mark.parametrize("model_type", KNOWN)
def test_sizes_are_read_and_not_the_defaults_taken(model_type: str) -> None:
    fields = auto.CONFIG_MAPPING[model_type].__dataclass_fields__
    needed = NEEDED.get(model_type, {})
    doubled = {
        name: 2 * field.default
        for name, field in fields.items()
        if type(field.default) is int and field.default > 0 and name not in needed and SIZES.search(name)
    }
    config = made(model_type, **doubled)
    assert read(config).params == weights(config), doubled


def test_defaults_are_those_of_the_configuration_classes() -> None:
    for model_type in KNOWN:
        fields = auto.CONFIG_MAPPING[model_type].__dataclass_fields__
        for key, value in defaults_of(model_type).items():
            assert fields[key].default == value, (model_type, key)
