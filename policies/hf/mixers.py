"""Weights and states of layers that cache a state of constant size, counted from the keys of their config."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from policies.hf.keys import Keys


def _linear(heads: tuple[int, int], dims: tuple[int, int], state: int, params: tuple[int, int]) -> dict[str, Any]:
    """A linear layer's parts: (value, key) heads, (key, value) dimensions, state elements, weights in and out."""
    return {
        "kind": "linear",
        "heads": heads[0],
        "kv_heads": heads[1],
        "head_dim": dims[0],
        "v_head_dim": dims[1],
        "state_elements": state,
        "qkv_params": params[0],
        "out_params": params[1],
    }


def mamba_jamba(keys: Keys) -> dict[str, Any]:
    """Mamba as in Jamba, which norms dt, B and C."""
    parts, state = mamba(keys), keys.number("mamba_d_state")
    return {**parts, "qkv_params": parts["qkv_params"] + _dt_rank(keys) + 2 * state}


def mamba(keys: Keys) -> dict[str, Any]:
    """Mamba (arXiv:2312.00752): every channel has a state and the last inputs of a convolution."""
    hidden, state, width = keys.number("hidden_size"), keys.number("mamba_d_state"), keys.number("mamba_d_conv")
    inner, rank = keys.number("mamba_expand") * hidden, _dt_rank(keys)
    conv = inner * (width + (1 if keys.flag("mamba_conv_bias", True) else 0))
    selection = inner * (rank + 2 * state) + rank * inner + inner
    bias = (2 * inner, hidden) if keys.flag("mamba_proj_bias", False) else (0, 0)
    into = hidden * 2 * inner + bias[0] + conv + selection + inner * state + inner
    return _linear((inner, inner), (1, 1), inner * (state + width - 1), (into, inner * hidden + bias[1]))


def _dt_rank(keys: Keys) -> int:
    given = keys.value("mamba_dt_rank")
    return -(-keys.number("hidden_size") // 16) if given in (None, "auto") else keys.number("mamba_dt_rank")


def mamba2(keys: Keys) -> dict[str, Any]:
    """Mamba-2 (Bamba, Granite 4, Nemotron-H): a (head_dim, state) matrix a head, and the convolution's last inputs."""
    hidden, state, width = keys.number("hidden_size"), keys.number("mamba_d_state"), keys.number("mamba_d_conv")
    heads, groups, inner = keys.number("mamba_n_heads"), keys.number("mamba_n_groups", 1), _inner(keys)
    conv_dim = inner + 2 * groups * state
    conv = conv_dim * (width + (1 if keys.flag("mamba_conv_bias", True) else 0))
    biased = keys.flag("mamba_proj_bias", False)
    bias = inner + conv_dim + heads if biased else 0
    out_bias = hidden if keys.flag("projectors_bias", biased) else 0
    norm = inner if keys.flag("mamba_rms_norm", True) else 0
    into = hidden * (inner + conv_dim + heads) + bias + conv + 3 * heads + norm
    dims, kept = inner // heads, inner * state + conv_dim * (width - 1)
    return _linear((heads, heads), (dims, dims), kept, (into, inner * hidden + out_bias))


def _inner(keys: Keys) -> int:
    """Channels of a Mamba-2 layer: as given, of all heads together, or a multiple of the hidden size."""
    heads = keys.number("mamba_n_heads")
    if "mamba_d_ssm" in keys:
        inner = keys.number("mamba_d_ssm")
    elif keys.value("mamba_head_dim") not in (None, "auto"):
        return heads * keys.number("mamba_head_dim")
    else:
        inner = keys.number("mamba_expand") * keys.number("hidden_size")
    if inner % heads:
        raise keys.error("mamba_n_heads", f"does not divide the {inner} channels")
    return inner


def gated_delta_net(keys: Keys) -> dict[str, Any]:
    """Gated delta net (Qwen3-Next): a (key, value) matrix for each value head, and the convolution's last inputs."""
    hidden, width = keys.number("hidden_size"), keys.number("linear_conv_kernel_dim")
    heads, key_heads = keys.number("linear_num_value_heads"), keys.number("linear_num_key_heads")
    value_dim, key_dim = keys.number("linear_value_head_dim"), keys.number("linear_key_head_dim")
    values, conv_dim = heads * value_dim, heads * value_dim + 2 * key_heads * key_dim
    into = hidden * (conv_dim + values + 2 * heads) + conv_dim * width + 2 * heads + value_dim
    state = heads * key_dim * value_dim + conv_dim * (width - 1)
    return _linear((heads, key_heads), (key_dim, value_dim), state, (into, values * hidden))


def kimi_delta_attention(keys: Keys) -> dict[str, Any]:
    """Kimi Delta Attention (arXiv:2510.26692): a (key, value) matrix a head, decayed element by element."""
    hidden, width = keys.number("hidden_size"), keys.number("linear_conv_kernel_dim")
    heads, dim = keys.number("linear_num_heads"), keys.number("linear_head_dim")
    inner = heads * dim
    low_rank = hidden * dim + dim * inner
    gate = hidden * inner if keys.flag("use_full_rank_gate", False) else low_rank
    into = 3 * inner * (hidden + width) + inner + heads + low_rank + hidden * heads + gate + dim
    return _linear((heads, heads), (dim, dim), heads * dim * dim + 3 * inner * (width - 1), (into, inner * hidden))


def lightning(keys: Keys) -> dict[str, Any]:
    """Lightning attention (MiniMax-01, arXiv:2501.08313): a (key, value) matrix for each head."""
    hidden, heads = keys.number("hidden_size"), keys.number("num_attention_heads")
    dim = keys.number("head_dim", hidden // heads)
    inner = heads * dim
    return _linear((heads, heads), (dim, dim), inner * dim, (4 * hidden * inner + inner, inner * hidden))


def short_convolution(keys: Keys) -> dict[str, Any]:
    """LFM2's gated short convolution: every channel keeps its last inputs."""
    hidden, width = keys.number("hidden_size"), keys.number("conv_L_cache", least=2)
    bias = (4 * hidden, hidden) if keys.flag("conv_bias", False) else (0, 0)
    into = hidden * (3 * hidden + width) + bias[0]
    return _linear((hidden, hidden), (1, 1), hidden * (width - 1), (into, hidden * hidden + bias[1]))


MIXERS: Mapping[str, Callable[[Keys], dict[str, Any]]] = MappingProxyType(
    {
        "mamba": mamba,
        "mamba_jamba": mamba_jamba,
        "mamba2": mamba2,
        "gated_delta_net": gated_delta_net,
        "kimi_delta_attention": kimi_delta_attention,
        "lightning": lightning,
        "short_convolution": short_convolution,
    }
)
