"""What an architecture fixes in its code, so that its configs do not say it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from policies.hf.keys import Keys
from policies.model import LayerShape

Switch = bool | str  # fixed by the architecture, or the name of the config's flag that decides


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Which keys describe an architecture's routed experts, and what stands beside them."""

    count: str = "num_experts"
    width: str = "moe_intermediate_size"
    top_k: str = "num_experts_per_tok"
    shared_width: str = ""  # key of the width of a shared expert
    shared_count: str = ""  # key of how many shared experts of `width` there are
    always_shared: int = 0  # so many in any case
    shared_gate: bool = False
    shared_bias: Switch = False  # of the shared experts, and of projections to a latent
    correction_bias: Switch = False  # DeepSeek-V3's balancing bias, one weight for each expert
    biased: bool = False  # experts and router have biases
    latent: str = ""  # key of the width that tokens are projected to before the routed experts
    latent_norm: str = ""  # flag of a norm after the experts in that width
    idle: str = ""  # key of how many experts are the identity: routed to, without weights
    further: Callable[[Keys], int] | None = None  # weights of a sparse MLP


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How the layers of an architecture are made, and which keys of its config say the rest.

    `kinds` names a layer's attention where the config has no `layer_types`, `sparse` tells layers with experts from
    dense ones where it has no `mlp_layer_types`. `layers` makes all layers at once, where they are not alike in more
    than that; `outside` counts weights beside the layers, the embedding, the head and the last norm.
    """

    attention: str = "heads"  # of the layers that are no linear ones: "heads" or "mla"
    kinds: Callable[[Keys, int], str] | None = None
    window: str = "sliding_window"  # key of the window of sliding layers
    norms: int | Callable[[Keys], int] = 2  # norms of hidden_size in a layer
    last_norms: int = 1  # and after the last one
    norm_bias: bool = False  # LayerNorm: a bias for each weight
    qkv_bias: Switch = False
    out_bias: Switch = False
    qk_norm: str = ""  # "head": one norm for all heads; "wide": over all heads at once, or one for each
    qk_norm_bias: bool = False
    qk_norm_if: Switch = True
    gate: str = ""  # of the attention's output: "wide", one for each element, or "head", one for each head
    gate_if: Switch = True
    gate_biased: bool = False  # with the bias of qkv
    sinks: str = ""  # one learned attention sink for each head, in layers of all kinds ("all") or in "sliding" ones
    index: bool = False  # a lightning indexer chooses the tokens of MLA layers
    indexed: Callable[[Keys, int], bool] | None = None  # layers over keys and values whose indexer caches a key a token
    width: str = "intermediate_size"  # key of the width of dense MLPs; "": no MLP
    wide: int = 0  # that width in hidden sizes, where the key is missing
    gated_mlp: bool = True  # three matrices, not two
    mlp_bias: Switch = False
    experts: Experts | None = None
    sparse: Callable[[Keys, int], bool] | None = None  # None: every layer, where there are experts
    linear: str = ""  # the linear layers: a name of `mixers.MIXERS`
    beside: str = ""  # a linear mixer that works beside the attention of every layer
    embedding: str = ""  # key of the width of embeddings that are not as wide as the layers
    head_bias: Switch = False
    outside: Callable[[Keys], int] | None = None
    further: Callable[[Keys], int] | None = None  # weights of every layer
    layers: Callable[[Keys, "Family"], tuple[LayerShape, ...]] | None = None
    adapt: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)  # the common name of each key that is named otherwise
    defaults: Mapping[str, int | bool] = field(default_factory=dict)  # beyond those of the configuration class


def decided(keys: Keys, switch: Switch) -> bool:
    """Whether a part is there: as the architecture fixes it, or as the config's flag says (false when it has none)."""
    return switch if isinstance(switch, bool) else keys.flag(switch, False)


def norm_params(keys: Keys, family: Family) -> int:
    """Weights of one norm of hidden_size."""
    return keys.number("hidden_size") * (2 if family.norm_bias else 1)


def layer_norms(keys: Keys, family: Family) -> int:
    """Norms of hidden_size in one layer."""
    return family.norms if isinstance(family.norms, int) else family.norms(keys)
