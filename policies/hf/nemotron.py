"""Layers of Nemotron-H (arXiv:2504.03624), whose config writes mixers and MLPs as blocks of their own."""

from collections.abc import Iterator
from typing import Any

from policies.hf.attention import attention
from policies.hf.family import Experts, Family
from policies.hf.keys import Keys
from policies.hf.mixers import mamba2
from policies.hf.mlps import dense_mlp, layer, sparse_mlp
from policies.model import LayerShape
from policies.shown import shown

_EXPERTS = Experts(
    count="n_routed_experts",
    shared_width="moe_shared_expert_intermediate_size",
    correction_bias=True,
    latent="moe_latent_size",
    shared_bias="mlp_bias",
)
_BLOCKS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
_BLOCK_TYPES = {
    "mamba": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "mlp": "-",
    "moe": "E",
}
_MIXERS = "M*"


def nemotron_layers(keys: Keys, family: Family) -> tuple[LayerShape, ...]:
    """One layer for each mixer; the MLP that follows it is its own, and where none does it has none.

    Raises ValueError for a pattern that is not understood.
    """
    hidden = keys.number("hidden_size")
    layers = []
    for index, (mixer, mlp) in enumerate(_pairs(keys)):
        first = mamba2(keys) if mixer == "M" else attention(keys, family, "full", index)
        layers.append(layer({**first, **_mlp(keys, family, mlp, index)}, 2 * hidden if mlp else hidden))
    return tuple(layers)


def _mlp(keys: Keys, family: Family, letter: str, index: int) -> dict[str, Any]:
    if letter == "E":
        return sparse_mlp(keys, family, _EXPERTS, index)
    if letter == "-":
        return dense_mlp(keys, family, keys.number("intermediate_size"))
    return {"mlp_params": 0, "mlp_active_params": 0}


NEMOTRON_H = Family(
    norms=1,  # for each block
    gated_mlp=False,
    mlp_bias="mlp_bias",
    layers=nemotron_layers,
    aliases={
        "attention_head_dim": "head_dim",
        "mamba_num_heads": "mamba_n_heads",
        "n_groups": "mamba_n_groups",
        "ssm_state_size": "mamba_d_state",
        "conv_kernel": "mamba_d_conv",
        "use_conv_bias": "mamba_conv_bias",
        "use_bias": "mamba_proj_bias",
        "mamba_proj_bias": "of_no_use",
    },
)


def block_numbers(keys: Keys) -> list[tuple[int, int]]:
    """The numbers of the blocks that each layer's mixer and MLP are in the checkpoint."""
    return [(i, i + 1) for i, letter in enumerate(_pattern(keys)) if letter in _MIXERS]


def _pairs(keys: Keys) -> Iterator[tuple[str, str]]:
    """Mixers and the MLPs after them, as letters of the pattern; no letter for no MLP."""
    pattern = _pattern(keys)
    if len(pattern) != keys.number("num_hidden_layers", len(pattern)):
        raise keys.error("num_hidden_layers", f"differs from the {len(pattern)} blocks of the pattern")
    for before, here in zip(" " + pattern, pattern, strict=False):
        if here not in _MIXERS and before not in _MIXERS:
            raise keys.error("hybrid_override_pattern", "has an MLP that follows no mixer")
    for here, after in zip(pattern, pattern[1:] + " ", strict=True):
        if here in _MIXERS:
            yield here, "" if after in _MIXERS + " " else after


def _pattern(keys: Keys) -> str:
    names = keys.names("layers_block_type")
    for name in names:
        if name not in _BLOCK_TYPES:
            raise keys.error("layers_block_type", f"has {shown(name)}; known: {', '.join(_BLOCK_TYPES)}")
    pattern = "".join(_BLOCK_TYPES[name] for name in names) or keys.text("hybrid_override_pattern")
    for letter in pattern:
        if letter not in _BLOCKS:
            known = ", ".join(f"{letter} ({what})" for letter, what in _BLOCKS.items())
            raise keys.error("hybrid_override_pattern", f"has {shown(letter)}; known: {known}")
    return pattern
