"""Architectures whose layers differ from each other in more than a kind."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from policies.hf.deepseek_v4 import deepseek_v4_layers, deepseek_v4_outside
from policies.hf.dense_families import BIASED
from policies.hf.family import Family
from policies.hf.gemma import gemma3n_layers, gemma3n_outside, gemma4_layers, per_layer_embeddings
from policies.hf.longcat import longcat_layers
from policies.hf.nas import nas_layers
from policies.hf.zamba import zamba2_layers, zamba2_outside

_GEMMA = replace(BIASED, norms=4, qk_norm="head")

CUSTOM: Mapping[str, Family] = MappingProxyType(
    {
        "gemma3n_text": replace(_GEMMA, layers=gemma3n_layers, outside=gemma3n_outside),
        "gemma4_text": replace(_GEMMA, layers=gemma4_layers, outside=per_layer_embeddings,
                               defaults={"global_head_dim": 512}),
        "deepseek_v4": Family(layers=deepseek_v4_layers, outside=deepseek_v4_outside),
        "longcat_flash": Family(attention="mla", qkv_bias="attention_bias", out_bias="attention_bias",
                                layers=longcat_layers),
        "nemotron-nas": Family(layers=nas_layers, defaults={"tie_word_embeddings": False}),
        "zamba2": Family(layers=zamba2_layers, outside=zamba2_outside, aliases={
            "mamba_ngroups": "mamba_n_groups", "n_mamba_heads": "mamba_n_heads", "mamba_headdim": "mamba_head_dim",
            "add_bias_linear": "mamba_proj_bias"}),
    }
)  # fmt: skip
