"""The dense cache: every key and value stays in HBM and is read at every step."""

from dataclasses import dataclass
from typing import ClassVar

from policies.dense import (
    activations,
    append,
    attend,
    block_pairs,
    causal_pairs,
    core_pairs,
    held_pairs,
    kv_row,
    pair_flops,
    windowed_pairs,
)
from policies.layer import LAYER_KINDS, LayerShape
from policies.model import ModelShape
from policies.plan import Access, Buffer, Compute, Plan, Rows, Step, Tier, Work
from policies.policy import Policy, Reuse


@dataclass(frozen=True, slots=True, kw_only=True)
class Full(Policy):
    """Exact attention over everything that the layer's own design keeps.

    It is also what every other policy leaves in place on the layers that it does not handle: sliding windows keep
    their window, MLA layers their latent, linear layers their state. Block layers hold and attend to blocks, once a
    block; core layers pool the tokens that their window leaves behind, a group of them into one row; compressed layers
    attend to their window and to compressed rows. Where a layer has an indexer, it chooses the rows.
    """

    name: ClassVar[str] = "full"
    paper: ClassVar[str] = "Vaswani et al. 2017, arXiv:1706.03762; read once per step as in FlashDecoding"
    reuse: ClassVar[Reuse] = Reuse.BLOCKS
    kinds: ClassVar[tuple[str, ...]] = LAYER_KINDS
    verifies: ClassVar[bool] = True
    by_shape: ClassVar[bool] = True

    def buffers(self, model: ModelShape, step: Step, layer: int) -> tuple[Buffer, ...]:
        """`kv`: one row per token or block that the layer keeps; `state`: one row for a linear layer."""
        shape = model.layers[layer]
        if shape.kind == "linear":
            state = Buffer("state", Tier.HBM, 1, (shape.state_elements,), model.dtype)
            return (*activations(model, step, layer), state)
        shared = shape.share_kv_with is not None
        kv = Buffer("kv", Tier.HBM, _kept(shape, step), kv_row(shape), model.kv_dtype, view=shared)
        return (*activations(model, step, layer), kv)

    def prefill(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Append, then attend causally."""
        shape = model.layers[layer]
        if shape.kind == "linear":
            return _update_state(shape, step.new_tokens)
        if shape.kind == "block":
            step = _in_blocks(shape, step)
            return _dense(shape, step, causal_pairs(step.past_tokens, step.new_tokens), step.tokens)
        return _dense(shape, step, _pairs(shape, step), _chosen(shape, step, _kept(shape, step)))

    def decode(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Append, then read the whole cache once."""
        shape = model.layers[layer]
        if shape.kind == "linear":
            return _update_state(shape, step.new_tokens)
        if shape.kind == "block":
            step = _in_blocks(shape, step)
            read = min(step.new_tokens, 1) * step.tokens  # nothing but where a block begins
            return _dense(shape, step, causal_pairs(step.past_tokens, step.new_tokens), read)
        kept = _kept(shape, step)
        if shape.kind == "compressed" or shape.index_topk:
            return _dense(shape, step, _pairs(shape, step), _chosen(shape, step, kept))
        return _dense(shape, step, held_pairs(step, kept), kept)


def _kept(layer: LayerShape, step: Step) -> int:
    """Rows held after the step; a chunk needs the window of its first token as well as its own rows."""
    return layer.rows(step.tokens, step.past_tokens + 1)


def _pairs(layer: LayerShape, step: Step) -> int:
    if layer.kind == "sliding":
        return windowed_pairs(step.past_tokens, step.new_tokens, layer.window_tokens)
    if layer.kind == "core":
        return core_pairs(step.past_tokens, step.new_tokens, layer.window_tokens, layer.block_tokens)
    if layer.kind == "compressed":
        rows = block_pairs(step.past_tokens, step.new_tokens, layer.block_tokens, layer.index_topk)
        return windowed_pairs(step.past_tokens, step.new_tokens, layer.window_tokens) + rows
    if layer.index_topk:
        return windowed_pairs(step.past_tokens, step.new_tokens, layer.index_topk)
    return causal_pairs(step.past_tokens, step.new_tokens)


def _chosen(layer: LayerShape, step: Step, kept: int) -> int:
    """Rows that a step reads at the most: those that an indexer can choose for its tokens, and a window beside them."""
    if not layer.index_topk:
        return kept
    rows = layer.index_rows(step.tokens)
    return kept - rows + min(rows, step.new_tokens * layer.index_topk)


def _in_blocks(layer: LayerShape, step: Step) -> Step:
    """The step as a block layer sees it; the first block of a sequence may be a partial one."""
    prompt, past, held = (-(-n // layer.block_tokens) for n in (step.prompt_tokens, step.past_tokens, step.tokens))
    return Step(prompt_tokens=prompt, past_tokens=past, new_tokens=held - past)


def _dense(layer: LayerShape, step: Step, pairs: int, kept: int) -> Plan:
    cache = (Access("kv", Rows(kept)),)
    if layer.share_kv_with is not None:
        return (attend(layer, step, Rows(pairs), cache, after=("qkv",)),)
    if layer.kind == "core":
        return (append(step), _pool(layer, step), attend(layer, step, Rows(pairs), cache, after=("append", "pool")))
    return (append(step), attend(layer, step, Rows(pairs), cache))


def _pool(layer: LayerShape, step: Step) -> Compute:
    """Turn each group of tokens that leaves the window into one row, weighted by its last query's scores."""
    groups = layer.cores(step.tokens) - layer.cores(step.past_tokens)
    left = groups * layer.block_tokens
    return Compute(
        name="pool",
        work=Work.ATTENTION,
        rows=Rows(left),
        flops_per_row=pair_flops(layer, step),
        reads=(Access("kv", Rows(left)),),
        writes=(Access("kv", Rows(groups)),),
        after=("append",),
    )


def _update_state(layer: LayerShape, new_tokens: int) -> Plan:
    # Two FLOPs an element to decay and add, two to read it out (Mamba-2 and gated delta nets alike, leading order).
    return (
        Compute(
            name="attend",
            work=Work.ATTENTION,
            rows=Rows(new_tokens),
            flops_per_row=4 * layer.state_elements,
            reads=(Access("q", Rows(new_tokens)), Access("state", Rows(1))),
            writes=(Access("out", Rows(new_tokens)), Access("state", Rows(1))),
            after=("qkv",),
        ),
    )
