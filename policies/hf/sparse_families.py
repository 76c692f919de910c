"""Architectures with routed experts, over keys and values or over a latent."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from policies.hf import adapt, rules
from policies.hf.dense_families import BIASED, LLAMA, QWEN2, QWEN3
from policies.hf.family import Experts, Family
from policies.hf.keys import Keys

_LOCAL = Experts(count="num_local_experts", width="intermediate_size")
_QWEN_SHARED = Experts(shared_width="shared_expert_intermediate_size", shared_gate=True)
_DEEPSEEK = Experts(count="n_routed_experts", shared_count="n_shared_experts", correction_bias=True)
_SHARED = Experts(shared_count="num_shared_experts", correction_bias=True)

_MLA = Family(
    attention="mla", qkv_bias="attention_bias", out_bias="attention_bias", experts=_DEEPSEEK, sparse=rules.after_first
)
_MIMO = Family(
    qkv_bias="attention_bias", sinks="sliding", experts=_DEEPSEEK, sparse=rules.after(1),
    adapt=adapt.mimo, kinds=rules.marked("hybrid_layer_pattern", ("full", "sliding")),
)  # fmt: skip
_STEP = Family(
    qk_norm="head", gate="head", sparse=rules.after(3), adapt=adapt.step,
    experts=Experts(count="n_routed_experts", shared_width="share_expert_dim", correction_bias=True),
    aliases={
        "num_attention_groups": "num_key_value_heads", "moe_num_experts": "n_routed_experts",
        "num_experts": "n_routed_experts", "moe_top_k": "num_experts_per_tok",
        "num_local_experts": "n_routed_experts", "share_expert_dims": "share_expert_dim",
        "num_mtp_layers": "num_nextn_predict_layers",
    },
)  # fmt: skip
_BAILING = Family(
    qkv_bias="use_qkv_bias", out_bias="use_bias", qk_norm="head", qk_norm_if="use_qk_norm", sparse=rules.after_first,
    experts=replace(_SHARED, correction_bias="moe_router_enable_expert_bias"),
)  # fmt: skip


def _indexed(keys: Keys, index: int) -> bool:
    """Whether a layer of MiniMax-M3 has an indexer: as its list of 0 and 1 or its layer types say."""
    types = keys.sequence("layer_types")
    if types:
        return index < len(types) and types[index] == "minimax_m3_sparse"
    marks = keys.sequence("indexed_layers")
    return index < len(marks) and bool(marks[index])


SPARSE: Mapping[str, Family] = MappingProxyType(
    {
        "mixtral": Family(experts=_LOCAL),
        "qwen2_moe": replace(QWEN2, qkv_bias="qkv_bias", experts=_QWEN_SHARED, sparse=rules.qwen_sparse),
        "qwen3_moe": replace(QWEN3, experts=Experts(), sparse=rules.qwen_sparse),
        "gpt_oss": replace(BIASED, sinks="all", kinds=rules.full_every("", 2),
                           experts=replace(_LOCAL, biased=True)),
        "olmoe": replace(BIASED, qk_norm="wide", experts=Experts(width="intermediate_size")),
        "flex_olmo": replace(BIASED, qk_norm="wide", experts=Experts(width="intermediate_size")),
        "phimoe": replace(BIASED, norm_bias=True, experts=_LOCAL, head_bias="lm_head_bias"),
        "granitemoe": replace(BIASED, experts=_LOCAL),
        "granitemoeshared": replace(BIASED, experts=replace(_LOCAL, shared_width="shared_intermediate_size")),
        "granitemoe_swa": replace(BIASED, sinks="all", kinds=rules.full_every("", 4, first=True),
                                  experts=replace(_LOCAL, shared_width="shared_intermediate_size")),
        "llama4_text": replace(BIASED, kinds=rules.llama4, window="attention_chunk_size",
                               width="intermediate_size_mlp", sparse=rules.llama4_sparse,
                               experts=replace(_LOCAL, always_shared=1)),
        "ernie4_5_moe": Family(
            qkv_bias="use_bias", out_bias="use_bias", mlp_bias="use_bias", sparse=rules.ernie_sparse,
            experts=Experts(count="moe_num_experts", top_k="moe_k", shared_count="moe_num_shared_experts",
                            correction_bias=True, shared_bias="use_bias"), head_bias="use_bias"),
        "exaone_moe": Family(qk_norm="head", kinds=rules.by_pattern, experts=_SHARED, sparse=rules.after(1)),
        "hunyuan_v1_moe": replace(BIASED, qk_norm="head", experts=Experts(
            width="intermediate_size", top_k="moe_topk", always_shared=1)),
        "hy_v3": replace(LLAMA, qk_norm="head", experts=replace(_SHARED, shared_bias="mlp_bias"),
                         sparse=rules.after(1)),
        "solar_open": replace(BIASED, out_bias=False, experts=_DEEPSEEK),
        "dots1": replace(BIASED, qk_norm="head", experts=_DEEPSEEK, sparse=rules.after_first,
                         kinds=rules.qwen),
        "deepseek": replace(BIASED, experts=replace(_DEEPSEEK, correction_bias=False), sparse=rules.after_first),
        "glm4_moe": replace(BIASED, out_bias=False, qk_norm="head", qk_norm_if="use_qk_norm", experts=_DEEPSEEK,
                            sparse=rules.after_first),
        "afmoe": replace(BIASED, qk_norm="head", gate="wide", norms=4, experts=_SHARED,
                         sparse=rules.after_dense_layers, kinds=rules.full_every("global_attn_every_n_layers", 4)),
        "laguna": replace(BIASED, qk_norm="head", gate="head", gate_if="gating", sparse=rules.after(1),
                          experts=Experts(shared_width="shared_expert_intermediate_size", correction_bias=True),
                          kinds=rules.all_full),
        "mellum": replace(BIASED, qk_norm="head", kinds=rules.all_full, experts=Experts(count="num_local_experts")),
        "minimax_m2": Family(qk_norm="wide", experts=replace(_LOCAL, correction_bias=True)),
        "minimax_m3_vl_text": Family(
            qk_norm="head", width="dense_intermediate_size", kinds=rules.all_full, adapt=adapt.minimax_m3,
            experts=replace(_LOCAL, correction_bias=True, shared_width="shared_intermediate_size"),
            indexed=_indexed),
        "mimo_v2_flash": _MIMO,
        "step3p5": _STEP,
        "bailing_moe": _BAILING,
        "bailing_moe_v2": _BAILING,
        "dbrx": Family(experts=Experts(width="intermediate_size"), adapt=adapt.dbrx, aliases={
            "d_model": "hidden_size", "n_heads": "num_attention_heads", "n_layers": "num_hidden_layers",
            "max_seq_len": "max_position_embeddings"}),
        "deepseek_v2": replace(_MLA, mlp_bias="mlp_bias", experts=replace(
            _DEEPSEEK, correction_bias=False, shared_bias="mlp_bias")),
        "deepseek_v3": _MLA,
        "mistral4": replace(_MLA, experts=replace(_DEEPSEEK, correction_bias=False)),
        "deepseek_v32": replace(_MLA, index=True),
        "glm4_moe_lite": replace(_MLA, sparse=rules.after(1)),
        "glm_moe_dsa": replace(_MLA, index=True, sparse=rules.after(3)),
        "axk1": replace(_MLA, sparse=rules.after(1), experts=replace(
            _DEEPSEEK, further=lambda keys: keys.number("hidden_size"))),  # a norm after the experts
    }
)  # fmt: skip
