"""Architectures with linear layers: state-space models, hybrids of them and attention."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from policies.hf import adapt, rules
from policies.hf.dense_families import BIASED
from policies.hf.family import Experts, Family
from policies.hf.nemotron import NEMOTRON_H

_LOCAL = Experts(count="num_local_experts", width="intermediate_size")
_QWEN_SHARED = Experts(shared_width="shared_expert_intermediate_size", shared_gate=True)
_MAMBA = Family(
    norms=1, kinds=rules.all_linear, linear="mamba", width="",
    aliases={
        "state_size": "mamba_d_state", "conv_kernel": "mamba_d_conv", "expand": "mamba_expand",
        "time_step_rank": "mamba_dt_rank", "use_conv_bias": "mamba_conv_bias", "use_bias": "mamba_proj_bias",
        "num_heads": "mamba_n_heads", "head_dim": "mamba_head_dim", "n_groups": "mamba_n_groups",
    },
    defaults={"max_position_embeddings": 2**20},  # a state knows no positions
)  # fmt: skip
_LIGHTNING = Family(linear="lightning", experts=_LOCAL, kinds=rules.marked("attn_type_list", ("linear", "full")))
_QWEN_NEXT = replace(
    BIASED, qk_norm="head", gate="wide", gate_biased=True, linear="gated_delta_net", kinds=rules.qwen_next
)

LINEAR: Mapping[str, Family] = MappingProxyType(
    {
        "mamba": _MAMBA,
        "falcon_mamba": _MAMBA,
        "mamba2": replace(_MAMBA, linear="mamba2"),
        "jamba": Family(linear="mamba_jamba", kinds=rules.jamba, sparse=rules.jamba_sparse,
                        experts=Experts(width="intermediate_size")),
        "bamba": replace(BIASED, mlp_bias="mlp_bias", linear="mamba2", kinds=rules.listed("attn_layer_indices")),
        "granitemoehybrid": replace(
            BIASED, linear="mamba2", kinds=rules.needs_layer_types, sparse=rules.granite_sparse,
            width="shared_intermediate_size", aliases={"mamba_d_head": "mamba_head_dim"},
            experts=replace(_LOCAL, shared_width="shared_intermediate_size")),
        "falcon_h1": replace(BIASED, mlp_bias="mlp_bias", beside="mamba2", kinds=rules.all_full,
                             aliases={"mamba_d_head": "mamba_head_dim"}),
        "qwen3_next": replace(_QWEN_NEXT, experts=_QWEN_SHARED, sparse=rules.qwen_sparse),
        "qwen3_5_text": _QWEN_NEXT,
        "qwen3_5_moe_text": replace(_QWEN_NEXT, experts=_QWEN_SHARED),
        "kimi_linear": Family(
            attention="mla", qkv_bias="attention_bias", out_bias="attention_bias", linear="kimi_delta_attention",
            adapt=adapt.kimi_linear, sparse=rules.after(1), gate="wide", gate_if="mla_use_output_gate",
            kinds=rules.needs_layer_types,
            aliases={"num_experts_per_token": "num_experts_per_tok", "model_max_length": "max_position_embeddings",
                     "num_local_experts": "num_experts", "n_shared_experts": "num_shared_experts"},
            experts=Experts(shared_count="num_shared_experts", correction_bias=True,
                            latent="routed_expert_hidden_size", latent_norm="latent_moe_use_norm")),
        "lfm2": Family(qk_norm="head", linear="short_convolution", adapt=adapt.lfm2,
                       kinds=rules.listed("full_attn_idxs")),
        "lfm2_moe": Family(
            qk_norm="head", linear="short_convolution", kinds=rules.needs_layer_types, sparse=rules.after_dense_layers,
            experts=Experts(correction_bias="use_expert_bias")),
        "minimax": _LIGHTNING,
        "minimax_m1": _LIGHTNING,
        "minimax_text_01": _LIGHTNING,
        "olmo_hybrid": replace(BIASED, qk_norm="wide", linear="gated_delta_net", kinds=rules.qwen_next),
        "nemotron_h": NEMOTRON_H,
    }
)  # fmt: skip
