"""The table of architectures: for each `model_type`, how its layers are made."""

from collections.abc import Mapping
from types import MappingProxyType

from policies.hf.custom_families import CUSTOM
from policies.hf.defaults import defaults_of
from policies.hf.dense_families import DENSE
from policies.hf.family import Family
from policies.hf.linear_families import LINEAR
from policies.hf.sparse_families import SPARSE

FAMILIES: Mapping[str, Family] = MappingProxyType({**DENSE, **SPARSE, **LINEAR, **CUSTOM})

# What makes the layers of those that have a function of their own.
_OWN = {
    "gemma3n_text": ("heads, windows, shared KV", "3"),
    "gemma4_text": ("heads, windows, shared KV", "3"),
    "deepseek_v4": ("window and compressed rows, indexer", "3"),
    "longcat_flash": ("MLA", "3"),
    "nemotron-nas": ("heads, in some layers", "3"),
    "zamba2": ("heads, in some layers, over Mamba-2", "3"),
    "nemotron_h": ("heads or Mamba-2", "2"),
}


def table() -> list[dict[str, str]]:
    """One row for each architecture: its attention, the matrices of its MLP, experts, and whether its head is tied."""
    return [_row(name, FAMILIES[name]) for name in sorted(FAMILIES)]


def _row(name: str, family: Family) -> dict[str, str]:
    attention, matrices = _OWN.get(name, ("", "3" if family.gated_mlp else "2"))
    return {
        "model_type": name,
        "attention": attention or _attention(family),
        "matrices": matrices if family.width else "none",
        "experts": "yes"
        if family.experts or name in ("deepseek_v4", "nemotron_h", "gemma4_text", "longcat_flash")
        else "no",
        "tied": "yes" if {**defaults_of(name), **family.defaults}.get("tie_word_embeddings") else "no",
    }


def _attention(family: Family) -> str:
    names = {"mamba_jamba": "Mamba", "mamba": "Mamba", "mamba2": "Mamba-2"}
    linear = names.get(family.linear, family.linear.replace("_", " "))
    if not family.width:
        return linear
    attention = "MLA" if family.attention == "mla" else "heads"
    attention += ", indexer" if family.index or family.indexed else ""
    if family.beside:
        return f"{attention} beside {names[family.beside]}"
    return f"{attention} or {linear}" if linear else attention
