"""Weights of MLPs and of routed experts, counted from the keys of their config."""

from collections.abc import Mapping
from typing import Any

from policies.hf.family import Experts, Family, decided
from policies.hf.keys import Keys
from policies.hf.per_layer import number_at
from policies.model import LayerShape


def dense_mlp(keys: Keys, family: Family, width: int) -> dict[str, Any]:
    """An MLP: three matrices between hidden_size and `width` where it is gated, else two."""
    params = mlp_params(keys.number("hidden_size"), width, family, decided(keys, family.mlp_bias))
    return {"mlp_params": params, "mlp_active_params": params}


def mlp_params(hidden: int, width: int, family: Family, biased: bool) -> int:
    """Weights of one MLP or expert of `width` that reads and writes `hidden` elements."""
    matrices = 3 if family.gated_mlp else 2
    return matrices * hidden * width + ((matrices - 1) * width + hidden if biased else 0)


def sparse_mlp(keys: Keys, family: Family, experts: Experts, index: int) -> dict[str, Any]:
    """Routed experts, each an MLP, with their router and the experts that every token uses."""
    hidden, width = keys.number("hidden_size"), number_at(keys, experts.width, index)
    count, per_token = number_at(keys, experts.count, index), number_at(keys, experts.top_k, index)
    latent = keys.number(experts.latent, hidden) if experts.latent else hidden
    expert = mlp_params(latent, width, family, experts.biased)
    routed = count + (keys.number(experts.idle, 0, least=0) if experts.idle else 0)
    biased = decided(keys, experts.shared_bias)
    rest = routed * hidden
    if latent != hidden:
        rest += 2 * hidden * latent + (hidden + latent if biased else 0)
    if latent != hidden and experts.latent_norm and keys.flag(experts.latent_norm, False):
        rest += latent
    shared = _shared_width(keys, experts, width, index)
    rest += mlp_params(hidden, shared, family, biased) if shared else 0
    per_token = per_token * count // routed if routed > count else per_token  # some of those chosen do nothing
    rest += routed if experts.biased or decided(keys, experts.correction_bias) else 0
    rest += hidden if experts.shared_gate else 0
    rest += experts.further(keys) if experts.further else 0
    return {
        "mlp_params": rest + count * expert,
        "mlp_active_params": rest + per_token * expert,
        "experts": count,
        "experts_per_token": per_token,
        "expert_params": expert,
    }


def _shared_width(keys: Keys, experts: Experts, width: int, index: int) -> int:
    """Width of what every token uses beside the routed experts; 0 for nothing."""
    if experts.shared_width and experts.shared_width in keys:
        return number_at(keys, experts.shared_width, index, least=0)
    if experts.shared_count:
        return number_at(keys, experts.shared_count, index, 0, least=0) * width
    return experts.always_shared * width


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
