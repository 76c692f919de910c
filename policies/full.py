"""The dense cache: every key and value stays in HBM and is read at every step."""

from dataclasses import dataclass
from typing import ClassVar

from policies.dense import activations, append, attend, causal_pairs, held_pairs, kv_row, windowed_pairs
from policies.model import LayerShape, ModelShape
from policies.plan import Access, Buffer, Compute, Plan, Rows, Step, Tier, Work
from policies.policy import Policy, Reuse


@dataclass(frozen=True, slots=True, kw_only=True)
class Full(Policy):
    """Exact attention over everything that the layer's own design keeps.

    It is also what every other policy leaves in place on the layers that it does not handle: sliding windows keep
    their window, MLA layers their latent, linear layers their state.
    """

    name: ClassVar[str] = "full"
    paper: ClassVar[str] = "Vaswani et al. 2017, arXiv:1706.03762; read once per step as in FlashDecoding"
    reuse: ClassVar[Reuse] = Reuse.BLOCKS
    kinds: ClassVar[tuple[str, ...]] = ("full", "sliding", "mla", "linear")
    verifies: ClassVar[bool] = True

    def buffers(self, model: ModelShape, step: Step, layer: int) -> tuple[Buffer, ...]:
        """`kv`: one row per token that the layer keeps; `state`: one row for a linear layer."""
        shape = model.layers[layer]
        if shape.kind == "linear":
            state = Buffer("state", Tier.HBM, 1, (shape.state_elements,), model.dtype)
            return (*activations(model, step, layer), state)
        shared = shape.share_kv_with is not None
        kv = Buffer("kv", Tier.HBM, _kept(shape, step), kv_row(shape), model.kv_dtype, view=shared)
        return (*activations(model, step, layer), kv)

    def prefill(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Append, then attend causally."""
        shape, new = model.layers[layer], step.new_tokens
        if shape.kind == "linear":
            return _update_state(shape, new)
        if shape.window_tokens:
            pairs = windowed_pairs(step.past_tokens, new, shape.window_tokens)
        else:
            pairs = causal_pairs(step.past_tokens, new)
        return _dense(shape, step, pairs, _kept(shape, step))

    def decode(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Append, then read the whole cache once."""
        shape = model.layers[layer]
        if shape.kind == "linear":
            return _update_state(shape, step.new_tokens)
        kept = _kept(shape, step)
        return _dense(shape, step, held_pairs(step, kept), kept)


def _kept(layer: LayerShape, step: Step) -> int:
    """Rows held after the step; a chunk needs the window of its first token as well as its own rows."""
    if not layer.window_tokens:
        return step.tokens
    return min(step.tokens, layer.window_tokens + step.new_tokens - 1)


def _dense(layer: LayerShape, step: Step, pairs: int, kept: int) -> Plan:
    cache = (Access("kv", Rows(kept)),)
    if layer.share_kv_with is not None:
        return (attend(layer, step, Rows(pairs), cache, after=("qkv",)),)
    return (append(step), attend(layer, step, Rows(pairs), cache))


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
