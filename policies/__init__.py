"""Policies: what a KV cache stores, moves and computes, stated once for the simulator and for the runtime."""

from policies.compose import (
    ByContext,
    ByHeads,
    ByLayer,
    LayerPlan,
    plan_end,
    plan_ends,
    plan_layer,
    resolve,
    reuse_of,
    settle,
)
from policies.full import Full
from policies.infllm import InfLLM
from policies.model import LayerShape, ModelShape
from policies.offload_all import OffloadAll
from policies.plan import Step
from policies.policy import Policy, Reuse
from policies.quest import Quest
from policies.retrieval_attention import RetrievalAttention
from policies.shadowkv import ShadowKV
from policies.sink_window import SinkWindow
from policies.snapkv import SnapKV
from policies.squeezed_attention import SqueezedAttention
from policies.text import describe, parse

POLICIES: dict[str, type[Policy]] = {
    cls.name: cls
    for cls in (
        Full,
        OffloadAll,
        SinkWindow,
        SnapKV,
        Quest,
        InfLLM,
        SqueezedAttention,
        ShadowKV,
        RetrievalAttention,
    )
}


def parse_policy(text: str) -> Policy:
    """The policy that `text` describes, such as `shadowkv:budget_tokens=1024`; see `policies.text.parse`."""
    return parse(text, POLICIES)


__all__ = [
    "POLICIES",
    "ByContext",
    "ByHeads",
    "ByLayer",
    "Full",
    "InfLLM",
    "LayerPlan",
    "LayerShape",
    "ModelShape",
    "OffloadAll",
    "Policy",
    "Quest",
    "RetrievalAttention",
    "Reuse",
    "ShadowKV",
    "SinkWindow",
    "SnapKV",
    "SqueezedAttention",
    "Step",
    "describe",
    "parse_policy",
    "plan_end",
    "plan_ends",
    "plan_layer",
    "resolve",
    "reuse_of",
    "settle",
]
