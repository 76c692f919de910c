"""The matrices among a layer's weights: what quantisation converts, under the names that a checkpoint has for them."""

from collections.abc import Iterator
from typing import NamedTuple

from policies.hf.family import Family
from policies.hf.keys import Keys
from policies.model import LayerShape


class Matrix(NamedTuple):
    """A linear module: the part of the layer that it belongs to, its name within the layer, and its shape."""

    part: str  # qkv, out, dense or expert
    name: str
    outputs: int
    inputs: int

    @property
    def params(self) -> int:
        """Weights of the matrix."""
        return self.outputs * self.inputs


class Naming(NamedTuple):
    """What an architecture calls the modules of a layer."""

    attention: str = "self_attn"
    linear: str = "linear_attn"
    mlp: str = "mlp"
    experts: str = "mlp.experts.0"
    shared: str = "mlp.shared_experts"
    mlps: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    expert_mlps: tuple[str, str, str] | None = None  # None: the same
    fused_qkv: str = ""
    out: str = "o_proj"


_MIXTRAL = Naming(
    experts="block_sparse_moe.experts.0", shared="block_sparse_moe.shared_experts", mlps=("w1", "w3", "w2")
)
_NEOX = Naming(
    attention="attention", fused_qkv="query_key_value", out="dense", mlps=("", "dense_h_to_4h", "dense_4h_to_h")
)
_QWEN = Naming(shared="mlp.shared_expert")
_NAMES = {
    "mixtral": _MIXTRAL,
    "phimoe": _MIXTRAL,
    "minimax": _MIXTRAL,
    "minimax_m1": _MIXTRAL,
    "minimax_m2": _MIXTRAL,
    "minimax_m3": _MIXTRAL._replace(mlps=Naming().mlps, expert_mlps=_MIXTRAL.mlps),
    "kimi_linear": Naming(linear="self_attn", experts=_MIXTRAL.experts, shared=_MIXTRAL.shared),
    "qwen2_moe": _QWEN,
    "qwen3_next": _QWEN,
    "qwen3_5_moe": _QWEN,
    "llama4": Naming(mlp="feed_forward", experts="feed_forward.experts.0", shared="feed_forward.shared_expert"),
    "jamba": Naming(linear="mamba", mlp="feed_forward", experts="feed_forward.experts.0"),
    "bamba": Naming(linear="mamba", mlp="feed_forward"),
    "falcon_h1": Naming(linear="mamba", mlp="feed_forward"),
    "granitemoehybrid": Naming(linear="mamba", experts=_MIXTRAL.experts, shared="shared_mlp"),
    "internlm2": Naming(attention="attention", fused_qkv="wqkv", out="wo", mlp="feed_forward", mlps=("w1", "w3", "w2")),
    "gemma4": Naming(experts="experts.0", shared="mlp"),
    "nemotron_h": Naming(
        attention="mixer", linear="mixer", mlp="mixer", experts="mixer.experts.0", shared="mixer.shared_experts"
    ),
    "deepseek_v4": Naming(
        attention="attn", mlp="ffn", experts="ffn.experts.0", shared="ffn.shared_experts", mlps=("w1", "w3", "w2")
    ),
    "phi3": Naming(fused_qkv="qkv_proj", mlps=("gate_up_proj", "gate_up_proj", "down_proj")),
    "glm": Naming(mlps=("gate_up_proj", "gate_up_proj", "down_proj")),
    "glm4": Naming(mlps=("gate_up_proj", "gate_up_proj", "down_proj")),
    "phi": Naming(out="dense", mlps=("", "fc1", "fc2")),
    "opt": Naming(out="out_proj", mlps=("", "fc1", "fc2")),
    "gpt_neox": _NEOX,
    "chatglm": _NEOX._replace(attention="self_attention", mlps=("dense_h_to_4h", "dense_h_to_4h", "dense_4h_to_h")),
    "falcon": _NEOX._replace(attention="self_attention"),
    "bloom": _NEOX._replace(attention="self_attention"),
}


def matrices(keys: Keys, layer: LayerShape, hidden: int, model_type: str, family: Family) -> Iterator[Matrix]:
    """The matrices of a layer. Norms, biases, convolutions, routers and gates of a few rows are none of them."""
    naming = _NAMES.get(model_type.removesuffix("_text").removesuffix("_vl"), Naming())
    if layer.kind == "linear":
        yield from _linear(keys, layer, hidden, naming)
    elif layer.kind == "mla":
        yield from _latent(keys, layer, hidden, naming)
    elif layer.latent_dim:
        yield from _compressed(keys, layer, hidden, naming)
    else:
        yield from _heads(layer, hidden, naming)
    latent = family.experts.latent if family.experts else ""
    inputs = keys.number(latent, hidden) if latent else hidden
    yield from _mlps(layer, hidden, inputs, naming, 3 if family.gated_mlp else 2)


def _heads(layer: LayerShape, hidden: int, naming: Naming) -> Iterator[Matrix]:
    """Query, key and value projections, with the gate that some queries come with."""
    at = naming.attention
    q_dim, k_dim = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    v_dim, out_dim = layer.kv_heads * layer.v_head_dim, layer.heads * layer.v_head_dim
    rows = layer.qkv_params // hidden
    gate = (rows - q_dim - k_dim - v_dim) // out_dim * out_dim if rows >= q_dim + k_dim + v_dim else 0
    wanted = [("q_proj", q_dim + gate), ("k_proj", k_dim), ("v_proj", v_dim)]
    for name, outputs in wanted:
        if outputs <= rows:  # a layer that reads another's cache projects no keys and values
            rows -= outputs
            yield Matrix("qkv", f"{at}.{naming.fused_qkv or name}", outputs, hidden)
    yield Matrix("out", f"{at}.{naming.out}", min(hidden, layer.out_params // out_dim), out_dim)


def _latent(keys: Keys, layer: LayerShape, hidden: int, naming: Naming) -> Iterator[Matrix]:
    """MLA's projections to and from its latents, and those of an indexer."""
    at, rope, latent = naming.attention, keys.number("qk_rope_head_dim"), keys.number("kv_lora_rank")
    q_dim, left = layer.heads * layer.head_dim, layer.qkv_params
    found = [("kv_a_proj_with_mqa", latent + rope, hidden)]
    found.append(("kv_b_proj", layer.heads * (layer.head_dim - rope + layer.v_head_dim), latent))
    if "q_lora_rank" in keys:
        rank = keys.number("q_lora_rank")
        found += [("q_a_proj", rank, hidden), ("q_b_proj", q_dim, rank)]
        if "index_n_heads" in keys and "index_head_dim" in keys:
            dim = keys.number("index_head_dim")
            found += [("indexer.wq_b", keys.number("index_n_heads") * dim, rank), ("indexer.wk", dim, hidden)]
    else:
        found.append(("q_proj", q_dim, hidden))
    found.append(("g_proj", layer.heads * layer.v_head_dim, hidden))  # of Kimi K3, where enough is left
    for name, outputs, inputs in found:
        if outputs * inputs <= left:
            left -= outputs * inputs
            yield Matrix("qkv", f"{at}.{name}", outputs, inputs)
    yield Matrix("out", f"{at}.{naming.out}", hidden, layer.heads * layer.v_head_dim)


def _compressed(keys: Keys, layer: LayerShape, hidden: int, naming: Naming) -> Iterator[Matrix]:
    """DeepSeek-V4's projections; what pools tokens into blocks is not converted."""
    at, rank = naming.attention, keys.number("q_lora_rank")
    groups, out_rank, dim = keys.number("o_groups"), keys.number("o_lora_rank"), layer.heads * layer.head_dim
    yield Matrix("qkv", f"{at}.wq_a", rank, hidden)
    yield Matrix("qkv", f"{at}.wq_b", dim, rank)
    yield Matrix("qkv", f"{at}.wkv", layer.head_dim, hidden)
    if layer.index_dim:
        yield Matrix("qkv", f"{at}.indexer.wq_b", layer.index_heads * layer.index_dim, rank)
    yield Matrix("out", f"{at}.wo_a", groups * out_rank, dim // groups)
    yield Matrix("out", f"{at}.wo_b", hidden, groups * out_rank)


def _linear(keys: Keys, layer: LayerShape, hidden: int, naming: Naming) -> Iterator[Matrix]:
    """Projections into and out of a mixer with a state."""
    at, inner = naming.linear, layer.out_params // hidden
    if "linear_num_value_heads" in keys and "linear_num_key_heads" in keys:
        key_dim = keys.number("linear_num_key_heads") * keys.number("linear_key_head_dim")
        yield Matrix("qkv", f"{at}.in_proj_qkv", inner + 2 * key_dim, hidden)
        yield Matrix("qkv", f"{at}.in_proj_z", inner, hidden)
    else:
        # Convolutions, norms and biases make up less than a row in a hundred: whole multiples of eight rows are left.
        rows = layer.qkv_params // hidden
        if "mamba_n_heads" in keys and "mamba_d_state" in keys:
            groups = keys.number("mamba_n_groups", 1)
            rows = 2 * inner + 2 * groups * keys.number("mamba_d_state") + keys.number("mamba_n_heads")
        yield Matrix("qkv", f"{at}.in_proj", rows, hidden)
    yield Matrix("out", f"{at}.out_proj", hidden, inner)


def _mlps(layer: LayerShape, hidden: int, inputs: int, naming: Naming, matrices_each: int) -> Iterator[Matrix]:
    """The dense part, and one expert, which reads `inputs` elements: the hidden size, or a latent of tokens."""
    names = naming.mlps[3 - matrices_each :]
    dense = layer.dense_params
    if layer.experts:
        width = _width(layer.expert_params, inputs, matrices_each)
        own = (naming.expert_mlps or naming.mlps)[3 - matrices_each :]
        yield from _mlp("expert", naming.experts, own, width, inputs)
        dense -= layer.experts * hidden  # the router
        if inputs != hidden:
            dense -= 2 * hidden * inputs
            yield Matrix("dense", f"{naming.mlp}.fc1_latent_proj", inputs, hidden)
            yield Matrix("dense", f"{naming.mlp}.fc2_latent_proj", hidden, inputs)
    at = naming.shared if layer.experts else naming.mlp
    yield from _mlp("dense", at, names, _width(dense, hidden, matrices_each), hidden)


def _mlp(part: str, at: str, names: tuple[str, ...], width: int, inputs: int) -> Iterator[Matrix]:
    if width > 0:
        for name in names[:-1]:
            yield Matrix(part, f"{at}.{name}", width, inputs)
        yield Matrix(part, f"{at}.{names[-1]}", inputs, width)


def _width(params: int, inputs: int, matrices_each: int) -> int:
    """The width of an MLP of so many weights: a multiple of eight, so that norms and biases are not taken for rows."""
    return params // (matrices_each * inputs) // 8 * 8
