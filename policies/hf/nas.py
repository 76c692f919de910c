"""Layers of Nemotron-NAS (Puzzle, arXiv:2411.19146), each of its own width, some without attention."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from policies.hf.attention import head_dim_of, heads_params
from policies.hf.family import Family
from policies.hf.keys import Keys
from policies.hf.mlps import layer, mlp_params
from policies.model import LayerShape

_MULTIPLE = 256  # of the width of an MLP


def nas_layers(keys: Keys, family: Family) -> tuple[LayerShape, ...]:
    """One layer for each that attends; MLPs of those without attention count with the one before."""
    hidden, blocks = keys.number("hidden_size"), keys.sequence("block_configs")
    if len(blocks) != keys.number("num_hidden_layers"):
        raise keys.error("num_hidden_layers", f"differs from the {len(blocks)} entries of block_configs")
    layers: list[LayerShape] = []
    for index, block in enumerate(blocks):
        width = _width(keys, _part(keys, block, "ffn"))
        mlp = mlp_params(hidden, width, family, False) if width else 0
        attention = _part(keys, block, "attention")
        if attention.get("no_op"):
            added = mlp + (hidden if width else 0)
            if not layers:
                raise keys.error("block_configs", "begins with a layer without attention")
            last = layers[-1]
            layers[-1] = replace(
                last, mlp_params=last.mlp_params + added, mlp_active_params=last.mlp_active_params + added
            )
            continue
        parts = {**_attention(keys, family, attention, index), "mlp_params": mlp, "mlp_active_params": mlp}
        layers.append(layer(parts, 2 * hidden if width else hidden))
    return tuple(layers)


def _attention(keys: Keys, family: Family, attention: Mapping[str, Any], index: int) -> dict[str, Any]:
    heads, group = keys.number("num_attention_heads"), attention.get("n_heads_in_group")
    for design in ("replace_with_linear", "sparsify", "window_length", "num_sink_tokens"):
        if attention.get(design):
            raise keys.error("block_configs", f"has {design} in layer {index}, which is not understood")
    if not isinstance(group, int) or isinstance(group, bool) or group < 1 or heads % group:
        raise keys.error("block_configs", f"needs n_heads_in_group, a divisor of {heads} heads, in layer {index}")
    dim = head_dim_of(keys, heads)
    return {**heads_params(keys, family, heads, heads // group, (dim, dim)), "kind": "full"}


def _width(keys: Keys, ffn: Mapping[str, Any]) -> int:
    """Width of an MLP: two thirds of so many hidden sizes as `ffn_mult` says, rounded up; 0 for none."""
    if ffn.get("no_op"):
        return 0
    multiple = ffn.get("ffn_mult")
    if ffn.get("intermediate_size"):
        return int(ffn["intermediate_size"])
    if ffn.get("replace_with_linear") or not isinstance(multiple, int | float) or not 0 < multiple < 1000:
        raise keys.error("block_configs", "needs ffn_mult, a positive number, for each MLP")
    width = int(2 * multiple * keys.number("hidden_size") / 3)
    return -(-width // _MULTIPLE) * _MULTIPLE


def _part(keys: Keys, block: object, name: str) -> Mapping[str, Any]:
    part = block.get(name) if isinstance(block, Mapping) else None
    if not isinstance(part, Mapping):
        raise keys.error("block_configs", f"must hold an object with {name} for each layer")
    return part
