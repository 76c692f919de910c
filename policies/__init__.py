"""Policies: what a KV cache stores, moves and computes, stated once for the simulator and for the runtime."""

from policies.compose import (
    ByContext,
    ByHeads,
    ByLayer,
    LayerPlan,
    leaves,
    plan_end,
    plan_ends,
    plan_layer,
    plan_layers,
    resolve,
    reuse_of,
    settle,
)
from policies.full import Full
from policies.hip import HiP
from policies.infllm import InfLLM
from policies.landmark import Landmark
from policies.lazyllm import LazyLLM
from policies.lococo import LoCoCo
from policies.locret import Locret
from policies.model import LayerShape, ModelShape
from policies.offload_all import OffloadAll
from policies.plan import Step
from policies.policy import Policy, Reuse
from policies.quest import Quest
from policies.retrieval_attention import RetrievalAttention
from policies.retroinfer import RetroInfer
from policies.shadowkv import ShadowKV
from policies.sink_window import SinkWindow
from policies.snapkv import SnapKV
from policies.squeezed_attention import SqueezedAttention
from policies.text import describe, outside, parse
from policies.xattention import XAttention

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
        RetroInfer,
        Locret,
        LazyLLM,
        XAttention,
        HiP,
        LoCoCo,
        Landmark,
    )
}


def code_of(text: str) -> list[str]:
    """The classes from outside, as module:Class, whose modules `parse_policy` would run to read this text."""
    return outside(text, POLICIES)


def parse_policy(text: str) -> Policy:
    """The policy that `text` describes, such as `shadowkv:budget_tokens=1024`; see `policies.text.parse`."""
    return parse(text, POLICIES)


__all__ = [
    "POLICIES",
    "ByContext",
    "ByHeads",
    "ByLayer",
    "Full",
    "HiP",
    "InfLLM",
    "Landmark",
    "LayerPlan",
    "LayerShape",
    "LazyLLM",
    "LoCoCo",
    "Locret",
    "ModelShape",
    "OffloadAll",
    "Policy",
    "Quest",
    "RetrievalAttention",
    "RetroInfer",
    "Reuse",
    "ShadowKV",
    "SinkWindow",
    "SnapKV",
    "SqueezedAttention",
    "Step",
    "XAttention",
    "code_of",
    "describe",
    "leaves",
    "parse_policy",
    "plan_end",
    "plan_ends",
    "plan_layer",
    "plan_layers",
    "resolve",
    "reuse_of",
    "settle",
]
