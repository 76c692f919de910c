"""Weights of the vision towers beside a language model, with what joins the two, where their config says enough."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from policies.hf.keys import Keys

_TOWERS = ("vision_config", "visual", "vision_tower_config", "vit_config", "audio_config", "speech_config")


def count_towers(config: Mapping[str, Any], text_dim: int) -> tuple[int, tuple[str, ...]]:
    """Weights of all towers of a wrapper whose language model is `text_dim` wide, and a note for each not counted."""
    thinker = config.get("thinker_config")
    if isinstance(thinker, Mapping):
        config = thinker
    params, notes = 0, []
    for key in _TOWERS:
        tower, model_type = config.get(key), config.get("model_type")
        if not isinstance(tower, Mapping):
            continue
        count = _COUNTS.get(model_type) if key == "vision_config" and isinstance(model_type, str) else None
        try:
            if count is None:
                raise ValueError
            params += count(Keys(tower, key, {}), Keys(config, "the wrapper", {}), text_dim)
        except ValueError:
            notes.append(
                f"{key}: its weights are not counted, and take memory besides (model show --exact may know them)"
            )
    return params, tuple(notes)


def _block(dim: int, width: int, *, gated: bool = False, biased: bool = True, norm_dim: int | None = None) -> int:
    """A layer of a tower: four square projections, an MLP, two norms (of a weight and a bias each)."""
    mlp = (3 if gated else 2) * dim * width
    bias = 4 * dim + (2 if gated else 1) * width + dim if biased else 0
    return 4 * dim * dim + mlp + bias + (4 * dim if norm_dim is None else norm_dim)


def _pair(first: tuple[int, int], second: tuple[int, int]) -> int:
    """Two linear layers with biases, each (inputs, outputs)."""
    return sum(inputs * outputs + outputs for inputs, outputs in (first, second))


def _patch(keys: Keys, dim: int) -> int:
    """A convolution over patches, of two frames where the tower takes pairs of them."""
    channels = keys.number("in_channels", keys.number("in_chans", keys.number("num_channels", 3)))
    return channels * keys.number("temporal_patch_size", 1) * keys.number("patch_size") ** 2 * dim


def _qwen2_vl(keys: Keys, _: Keys, text_dim: int) -> int:
    dim, merged = keys.number("embed_dim"), keys.number("spatial_merge_size", 2) ** 2 * keys.number("embed_dim")
    blocks = keys.number("depth") * _block(dim, keys.number("mlp_ratio", 4) * dim)
    out = keys.number("hidden_size", text_dim)
    return _patch(keys, dim) + blocks + 2 * dim + _pair((merged, merged), (merged, out))


def _qwen2_5_vl(keys: Keys, _: Keys, text_dim: int) -> int:
    dim = keys.number("hidden_size")
    merged = keys.number("spatial_merge_size", 2) ** 2 * dim
    blocks = keys.number("depth") * _block(dim, keys.number("intermediate_size"), gated=True, norm_dim=2 * dim)
    out = keys.number("out_hidden_size", text_dim)
    return _patch(keys, dim) + blocks + dim + _pair((merged, merged), (merged, out))


def _qwen3_vl(keys: Keys, _: Keys, text_dim: int) -> int:
    dim = keys.number("hidden_size")
    merged, out = keys.number("spatial_merge_size", 2) ** 2 * dim, keys.number("out_hidden_size", text_dim)
    blocks = keys.number("depth") * _block(dim, keys.number("intermediate_size"))
    merger = _pair((merged, merged), (merged, out))
    deep = len(keys.sequence("deepstack_visual_indexes")) * (merger + 2 * merged)
    positions = keys.number("num_position_embeddings") * dim
    return _patch(keys, dim) + dim + positions + blocks + merger + 2 * dim + deep


def _llava(keys: Keys, _: Keys, text_dim: int) -> int:
    """CLIP, all of it, and a projector of two layers."""
    dim, patches = keys.number("hidden_size"), (keys.number("image_size") // keys.number("patch_size")) ** 2
    blocks = keys.number("num_hidden_layers") * _block(dim, keys.number("intermediate_size"))
    return (
        _patch(keys, dim) + dim + (patches + 1) * dim + blocks + 4 * dim + _pair((dim, text_dim), (text_dim, text_dim))
    )


def _gemma3(keys: Keys, _: Keys, text_dim: int) -> int:
    """SigLIP, its pooling head where the config keeps it, a projection and a norm."""
    dim, patches = keys.number("hidden_size"), (keys.number("image_size") // keys.number("patch_size")) ** 2
    width = keys.number("intermediate_size")
    blocks = keys.number("num_hidden_layers") * _block(dim, width)
    pooling = dim + 4 * dim * dim + 4 * dim + 2 * dim + 2 * dim * width + width + dim
    head = pooling if keys.flag("vision_use_head", True) else 0
    return _patch(keys, dim) + dim + patches * dim + blocks + 2 * dim + head + dim * text_dim + dim


def _gemma4(keys: Keys, _: Keys, text_dim: int) -> int:
    dim, heads, width = keys.number("hidden_size"), keys.number("num_attention_heads"), keys.number("intermediate_size")
    if keys.flag("use_clipped_linears", False):
        raise keys.error("use_clipped_linears", "adds bounds to each matrix, which are not counted")
    head_dim, kv_heads = keys.number("head_dim"), keys.number("num_key_value_heads", heads)
    attention = 2 * dim * heads * head_dim + 2 * dim * kv_heads * head_dim + 2 * head_dim
    blocks = keys.number("num_hidden_layers") * (attention + 3 * dim * width + 4 * dim)
    return 2 * keys.number("position_embedding_size") * dim + _patch(keys, dim) + blocks + dim * text_dim


def _mistral3(keys: Keys, outer: Keys, text_dim: int) -> int:
    """Pixtral without biases, a merger of patches and a projector."""
    dim, merge = keys.number("hidden_size"), outer.number("spatial_merge_size", 2)
    blocks = keys.number("num_hidden_layers") * _block(
        dim, keys.number("intermediate_size"), gated=True, biased=False, norm_dim=2 * dim
    )
    bias = 2 * text_dim if outer.flag("multimodal_projector_bias", False) else 0
    projector = dim + merge**2 * dim * dim + dim * text_dim + text_dim * text_dim + bias
    return _patch(keys, dim) + dim + blocks + projector


def _kimi(keys: Keys, _: Keys, text_dim: int) -> int:
    """MoonViT: a table of positions, layers with biases, a norm, and a merger of patches."""
    dim, merge = keys.number("vt_hidden_size"), keys.sequence("merge_kernel_size")
    if merge != [2, 2] or keys.value("mm_projector_type") != "patchmerger":
        raise keys.error("merge_kernel_size", "is not understood")
    positions = keys.number("init_pos_emb_height") * keys.number("init_pos_emb_width") * dim
    blocks = keys.number("vt_num_hidden_layers") * _block(dim, keys.number("vt_intermediate_size"))
    merged = 4 * dim
    return _patch(keys, dim) + dim + positions + blocks + 4 * dim + _pair((merged, merged), (merged, text_dim))


def _minimax_m3(keys: Keys, outer: Keys, text_dim: int) -> int:
    """CLIP's layers over pairs of frames, a projector, and one more that merges patches."""
    dim, compression = keys.number("hidden_size"), Keys(keys.mapping("img_token_compression_config"), "vision", {})
    merge, frames = compression.number("spatial_merge_size"), compression.number("temporal_patch_size")
    out = outer.number("projector_hidden_size", text_dim)
    blocks = keys.number("num_hidden_layers") * _block(dim, keys.number("intermediate_size"))
    patch = keys.number("num_channels", 3) * frames * keys.number("patch_size") ** 2 * dim
    projectors = _pair((dim, out), (out, text_dim)) + _pair((merge**2 * text_dim, out), (out, text_dim))
    return patch + 2 * dim + blocks + projectors


_COUNTS: Mapping[str, Callable[[Keys, Keys, int], int]] = MappingProxyType(
    {
        "qwen2_vl": _qwen2_vl,
        "qwen2_5_vl": _qwen2_5_vl,
        "qwen3_vl": _qwen3_vl,
        "qwen3_vl_moe": _qwen3_vl,
        "qwen3_5": _qwen3_vl,
        "qwen3_5_moe": _qwen3_vl,
        "llava": _llava,
        "gemma3": _gemma3,
        "gemma4": _gemma4,
        "mistral3": _mistral3,
        "kimi_k25": _kimi,
        "minimax_m3_vl": _minimax_m3,
    }
)
