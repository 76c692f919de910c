"""Weights and cached elements of each kind of layer, counted from the keys of its Hugging Face config."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from policies.hf.keys import Keys
from policies.model import LayerShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Which keys describe an architecture's routed experts, and what stands beside them."""

    count: str
    width: str
    shared_width: str = ""  # key of the width of a shared expert
    shared_count: str = ""  # key of how many shared experts of `width` there are
    always_shared: int = 0  # so many in any case
    shared_gate: bool = False
    correction_bias: bool = False  # DeepSeek-V3's balancing bias, one weight for each expert
    biased: bool = False  # experts and router have biases


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What an architecture fixes in its code, so that its configs do not say it.

    A bias of None means that the config's `attention_bias` decides.
    """

    kv: str = "full"  # of the layers that are no linear ones: "full" (or a window) or "mla"
    norms: int = 2  # vectors of hidden_dim weights in a layer
    last_norms: int = 1  # and after the last one
    qkv_bias: bool | None = False
    out_bias: bool | None = False
    qk_norm: str = ""  # "head": one norm for each head's dimensions; "heads": a norm for every head of its own
    gated: bool = False  # the query projection also makes an output gate
    sinks: bool = False  # one learned attention sink for each head
    tied: bool = False  # default of tie_word_embeddings
    gated_mlp: bool = True  # three matrices, not two
    mlp_bias: bool = False  # default of mlp_bias
    experts: Experts | None = None
    linear: str = ""  # the linear layers: "mamba", "mamba2" or "gated_delta_net"
    defaults: Mapping[str, Any] = field(default_factory=dict)


def attention(keys: Keys, family: Family, window_tokens: int) -> dict[str, Any]:
    """Softmax attention over full KV heads, windowed when `window_tokens` is not 0."""
    hidden, heads = keys.number("hidden_size"), keys.number("num_attention_heads")
    kv_heads = keys.number("num_key_value_heads", heads)
    if "head_dim" not in keys and hidden % heads:
        raise keys.error("hidden_size", f"is not a multiple of num_attention_heads={heads}; give head_dim")
    head_dim = keys.number("head_dim", hidden // heads)
    q_dim, kv_dim = heads * head_dim, kv_heads * head_dim
    qkv_dim = q_dim * (2 if family.gated else 1) + 2 * kv_dim
    biased = keys.flag("attention_bias", False)
    qkv = hidden * qkv_dim + (qkv_dim if _either(family.qkv_bias, biased) else 0)
    out = q_dim * hidden + (hidden if _either(family.out_bias, biased) else 0)
    if family.qk_norm == "head":
        qkv += 2 * head_dim
    elif family.qk_norm == "heads" and keys.flag("use_qk_norm", False):
        qkv += q_dim + kv_dim
    if family.sinks:
        qkv += heads
    return {
        "kind": "sliding" if window_tokens else "full",
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "v_head_dim": head_dim,
        "window_tokens": window_tokens,
        "qkv_params": qkv,
        "out_params": out,
    }


def mla(keys: Keys) -> dict[str, Any]:
    """Multi-head latent attention (DeepSeek-V2, section 2.1): a latent and one rotary key per token are cached."""
    hidden, heads = keys.number("hidden_size"), keys.number("num_attention_heads")
    latent, rope = keys.number("kv_lora_rank"), keys.number("qk_rope_head_dim")
    nope, v_dim = keys.number("qk_nope_head_dim"), keys.number("v_head_dim")
    q_dim = heads * (nope + rope)
    down = hidden * (latent + rope) + latent
    if "q_lora_rank" in keys:
        q_rank = keys.number("q_lora_rank")
        down += hidden * q_rank + q_rank
        up = q_rank * q_dim
    else:
        up = hidden * q_dim
    up += latent * heads * (nope + v_dim)
    return {
        "kind": "mla",
        "heads": heads,
        "kv_heads": 1,
        "head_dim": nope + rope,
        "v_head_dim": v_dim,
        "latent_dim": latent + rope,
        "qkv_params": down + up,
        "whole_params": down,
        "out_params": heads * v_dim * hidden,
    }


def mamba(keys: Keys) -> dict[str, Any]:
    """Mamba as in Jamba, which norms dt, B and C: every channel has a state and the last inputs of a convolution."""
    hidden, state, width = keys.number("hidden_size"), keys.number("mamba_d_state"), keys.number("mamba_d_conv")
    inner = keys.number("mamba_expand") * hidden
    rank = keys.number("mamba_dt_rank", -(-hidden // 16))
    conv = inner * (width + (1 if keys.flag("mamba_conv_bias", True) else 0))
    selection = inner * (rank + 2 * state) + rank * inner + inner + rank + 2 * state
    bias = (2 * inner, hidden) if keys.flag("mamba_proj_bias", False) else (0, 0)
    return {
        "kind": "linear",
        "heads": inner,
        "kv_heads": inner,
        "head_dim": 1,
        "v_head_dim": 1,
        "state_elements": inner * (state + width - 1),
        "qkv_params": hidden * 2 * inner + bias[0] + conv + selection + inner * state + inner,
        "out_params": inner * hidden + bias[1],
    }


def mamba2(keys: Keys) -> dict[str, Any]:
    """Mamba-2 (Bamba, Granite 4, Nemotron-H): a (head_dim, state) matrix a head, and the convolution's last inputs."""
    hidden, state, width = keys.number("hidden_size"), keys.number("mamba_d_state"), keys.number("mamba_d_conv")
    heads, groups = keys.number("mamba_n_heads"), keys.number("mamba_n_groups")
    if "mamba_head_dim" in keys:
        inner = heads * keys.number("mamba_head_dim")
    else:
        inner = keys.number("mamba_expand") * hidden
        if inner % heads:
            raise keys.error("mamba_n_heads", f"does not divide mamba_expand * hidden_size = {inner}")
    conv_dim = inner + 2 * groups * state
    conv = conv_dim * (width + (1 if keys.flag("mamba_conv_bias", True) else 0))
    bias = (inner + conv_dim + heads, hidden) if keys.flag("mamba_proj_bias", False) else (0, 0)
    return {
        "kind": "linear",
        "heads": heads,
        "kv_heads": heads,
        "head_dim": inner // heads,
        "v_head_dim": inner // heads,
        "state_elements": inner * state + conv_dim * (width - 1),
        "qkv_params": hidden * (inner + conv_dim + heads) + bias[0] + conv + 3 * heads + inner,
        "out_params": inner * hidden + bias[1],
    }


def gated_delta_net(keys: Keys) -> dict[str, Any]:
    """Gated delta net (Qwen3-Next): a (key, value) matrix for each value head, and the convolution's last inputs."""
    hidden, width = keys.number("hidden_size"), keys.number("linear_conv_kernel_dim")
    heads, key_heads = keys.number("linear_num_value_heads"), keys.number("linear_num_key_heads")
    value_dim, key_dim = keys.number("linear_value_head_dim"), keys.number("linear_key_head_dim")
    values, conv_dim = heads * value_dim, heads * value_dim + 2 * key_heads * key_dim
    return {
        "kind": "linear",
        "heads": heads,
        "kv_heads": key_heads,
        "head_dim": key_dim,
        "v_head_dim": value_dim,
        "state_elements": heads * key_dim * value_dim + conv_dim * (width - 1),
        "qkv_params": hidden * (conv_dim + values + 2 * heads) + conv_dim * width + 2 * heads + value_dim,
        "out_params": values * hidden,
    }


LINEAR = {"mamba": mamba, "mamba2": mamba2, "gated_delta_net": gated_delta_net}


def dense_mlp(keys: Keys, family: Family, width: int) -> dict[str, Any]:
    """An MLP: three matrices between hidden_size and `width` where it is gated, else two."""
    params = _mlp_params(keys, family, width, keys.flag("mlp_bias", family.mlp_bias))
    return {"mlp_params": params, "mlp_active_params": params}


def _mlp_params(keys: Keys, family: Family, width: int, biased: bool) -> int:
    hidden, matrices = keys.number("hidden_size"), 3 if family.gated_mlp else 2
    return matrices * hidden * width + ((matrices - 1) * width + hidden if biased else 0)


def sparse_mlp(keys: Keys, family: Family, experts: Experts) -> dict[str, Any]:
    """Routed experts, each an MLP, with their router and the experts that every token uses."""
    hidden, width = keys.number("hidden_size"), keys.number(experts.width)
    count, per_token = keys.number(experts.count), keys.number("num_experts_per_tok")
    expert = _mlp_params(keys, family, width, experts.biased)
    shared = experts.always_shared * width
    if experts.shared_width:
        shared = keys.number(experts.shared_width)
    elif experts.shared_count:
        shared = keys.number(experts.shared_count, 0, least=0) * width
    rest = count * hidden + _mlp_params(keys, family, shared, False)
    rest += count if experts.biased or experts.correction_bias else 0
    rest += hidden if experts.shared_gate else 0
    return {
        "mlp_params": rest + count * expert,
        "mlp_active_params": rest + per_token * expert,
        "experts": count,
        "experts_per_token": per_token,
        "expert_params": expert,
    }


def layer(parts: Mapping[str, Any], norm_params: int) -> LayerShape:
    """Join the two parts of a layer; half of its norm weights count with each, all with one that has no MLP."""
    first = norm_params // 2 if parts["mlp_params"] else 0
    return LayerShape(
        **{
            **parts,
            "qkv_params": parts["qkv_params"] + norm_params - first,
            "mlp_params": parts["mlp_params"] + first,
            "mlp_active_params": parts["mlp_active_params"] + first,
        }
    )


def _either(fixed: bool | None, configured: bool) -> bool:
    return configured if fixed is None else fixed
