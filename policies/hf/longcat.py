"""Layers of LongCat-Flash (arXiv:2509.01322): two of attention and an MLP each, with one mixture of experts beside."""

from policies.hf.attention import mla
from policies.hf.family import Experts, Family
from policies.hf.keys import Keys
from policies.hf.mlps import dense_mlp, layer, sparse_mlp
from policies.model import LayerShape

_EXPERTS = Experts(
    count="n_routed_experts",
    width="expert_ffn_hidden_size",
    top_k="moe_topk",
    correction_bias=True,
    idle="zero_expert_num",
)


def longcat_layers(keys: Keys, family: Family) -> tuple[LayerShape, ...]:
    """Two layers for each of the config's `num_layers`; the experts, which work beside both, count with the first."""
    hidden, width = keys.number("hidden_size"), keys.number("ffn_hidden_size")
    layers = []
    for index in range(keys.number("num_layers")):
        attention, dense = mla(keys, family, index), dense_mlp(keys, family, width)
        both = sparse_mlp(keys, family, _EXPERTS, index)
        both |= {key: both[key] + dense[key] for key in ("mlp_params", "mlp_active_params")}
        layers += [layer({**attention, **both}, 2 * hidden), layer({**attention, **dense}, 2 * hidden)]
    return tuple(layers)
