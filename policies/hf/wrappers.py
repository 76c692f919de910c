"""Finding the language model in a config that wraps it beside vision and audio towers."""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from policies.hf.families import FAMILIES
from policies.shown import shown

# Names under which published wrappers keep their language model, most telling first; `thinker_config` holds another.
_NAMES = ("text_config", "llm_config", "language_config", "thinker_config", "language_model_config", "lm_config")
_OTHER = re.compile("vision|visual|image|video|audio|speech|talker|code|draft|mtp|projector|token2wav|quant")

# Other names of an architecture, and what a wrapper whose inner config names none holds.
_SAME: Mapping[str, str] = MappingProxyType(
    {
        "gemma3": "gemma3_text",
        "gemma3n": "gemma3n_text",
        "gemma4": "gemma4_text",
        "llama4": "llama4_text",
        "kimi_k2": "deepseek_v3",
        "kimi_k25": "deepseek_v3",
        "kimi_k3": "kimi_linear",
        "deepseek_ref": "deepseek_v4",
        "minimax_m3": "minimax_m3_vl_text",
        "minimax_m3_vl": "minimax_m3_vl_text",
        "qwen2_vl": "qwen2",
        "qwen2_vl_text": "qwen2",
        "qwen2_5_vl": "qwen2",
        "qwen2_5_vl_text": "qwen2",
        "qwen2_5_omni": "qwen2",
        "qwen2_5_omni_text": "qwen2",
        "qwen2_audio": "qwen2",
        "qwen3_vl": "qwen3",
        "qwen3_vl_text": "qwen3",
        "qwen3_vl_moe": "qwen3_moe",
        "qwen3_vl_moe_text": "qwen3_moe",
        "qwen3_omni_moe_text": "qwen3_moe",
        "qwen3_5": "qwen3_5_text",
        "qwen3_5_moe": "qwen3_5_moe_text",
        "glm4v_text": "glm4",
        "glm4v_moe_text": "glm4_moe",
        "glm46v": "glm4",
        "step3p7": "step3p5",
        "step3p5_flash": "step3p5",
        "llava": "llama",
        "llava_next": "llama",
        "llava_onevision": "qwen2",
        "vipllava": "llama",
        "video_llava": "llama",
        "idefics3": "llama",
        "smolvlm": "llama",
        "idefics2": "mistral",
        "mistral3": "mistral",
        "pixtral": "mistral",
        "paligemma": "gemma",
        "aya_vision": "cohere2",
        "cohere2_vision": "cohere2",
        "internvl": "qwen2",
        "deepseek_vl": "llama",
        "deepseek_vl_v2": "deepseek_v2",
        "phi4mm": "phi3",
        "phi4_multimodal": "phi3",
        "mimo_v2": "mimo_v2_flash",
        "exaone4_5": "exaone4",
        "lfm2_vl": "lfm2",
        "yi": "llama",
        "RefinedWeb": "falcon",
        "RefinedWebModel": "falcon",
        "stablelm_epoch": "stablelm",
        "aquila": "llama",
        "granitemoe_shared": "granitemoeshared",
    }
)


class Inner(NamedTuple):
    """A language model's config, its architecture, whether it lay in a wrapper, and the whole config."""

    config: Mapping[str, Any]
    model_type: str
    nested: bool
    outer: Mapping[str, Any]


def unwrap(config: Mapping[str, Any], name: str) -> Inner:
    """The language model of a config: itself, or the config within, whose missing keys the wrapper's own supply.

    Raises ValueError where a model_type is no name, and where several configs within may be meant.
    """
    outer, nested, model_type = config, False, _model_type(config, name)
    while (key := _language_key(config, name)) is not None:
        within: Mapping[str, Any] = config[key]
        around = {k: v for k, v in config.items() if k not in (key, "model_type") and not isinstance(v, Mapping)}
        around |= {k: v for k, v in config.items() if k == "quantization_config"}
        model_type = _model_type(within, name) or model_type
        config, nested = {**around, **within}, True
    return Inner(config, _SAME.get(model_type, model_type), nested, outer)


def _language_key(config: Mapping[str, Any], name: str) -> str | None:
    for key in _NAMES:
        if isinstance(config.get(key), Mapping) and config[key]:
            return key
    if "num_hidden_layers" in config and "vocab_size" in config:
        return None
    found = [key for key, value in config.items() if isinstance(value, Mapping) and _is_language(key, value)]
    if len(found) > 1:
        raise ValueError(
            f"config of {shown(name)}: {' and '.join(sorted(found)[:4])} may both hold the language model; save the "
            "one that is meant as a config.json of its own"
        )
    return found[0] if found else None


def _is_language(key: str, value: Mapping[str, Any]) -> bool:
    model_type = value.get("model_type")
    known = isinstance(model_type, str) and _SAME.get(model_type, model_type) in FAMILIES
    return not _OTHER.search(key) and ("vocab_size" in value or known or _language_key(value, "") is not None)


def _model_type(config: Mapping[str, Any], name: str) -> str:
    model_type = config.get("model_type") or ""
    if not isinstance(model_type, str):
        raise ValueError(f"config of {shown(name)}: model_type must be a name, not {shown(model_type)}")
    return model_type
