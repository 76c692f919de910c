"""Attention sinks and a sliding window; everything between is forgotten."""

from dataclasses import dataclass
from typing import ClassVar

from policies.dense import activations, append, attend, held_pairs, kv_row, windowed_pairs
from policies.model import ModelShape
from policies.plan import Access, Buffer, Compute, Plan, Rows, Step, Tier, Work
from policies.policy import Policy, Reuse, at_least, one_of


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkWindow(Policy):
    """The first `sink_tokens` and the last `window_tokens` stay in HBM.

    `positions="slot"` keeps keys before rotation and rotates them by cache slot at every step (StreamingLLM);
    `"original"` keeps them rotated at their true positions (LM-Infinite's local branch).
    """

    name: ClassVar[str] = "sink-window"
    paper: ClassVar[str] = (
        "StreamingLLM, Xiao et al. 2023, arXiv:2309.17453; LM-Infinite, Han et al. 2023, arXiv:2308.16137"
    )
    reuse: ClassVar[Reuse] = Reuse.NOTHING
    verifies: ClassVar[bool] = True
    by_shape: ClassVar[bool] = True

    sink_tokens: int = 4
    window_tokens: int = 2000
    positions: str = "slot"

    def __post_init__(self) -> None:
        at_least(self, sink_tokens=0, window_tokens=1)
        one_of(self, "positions", "slot", "original")

    def buffers(self, model: ModelShape, step: Step, layer: int) -> tuple[Buffer, ...]:
        """`kv`: one row for each sink and window token; a chunk also holds its own tokens until it is done."""
        kv = Buffer("kv", Tier.HBM, self._kept(step), kv_row(model.layers[layer]), model.kv_dtype)
        return (*activations(model, step, layer), kv)

    def prefill(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Each token attends to the sinks and to its own window, so prefill is linear in the prompt."""
        pairs = windowed_pairs(step.past_tokens, step.new_tokens, self.sink_tokens + self.window_tokens)
        return self._attend(model, step, layer, pairs)

    def decode(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Drop the oldest token after the sinks, append, attend to what is left."""
        return self._attend(model, step, layer, held_pairs(step, self._kept(step)))

    def _kept(self, step: Step) -> int:
        return min(step.tokens, self.sink_tokens + self.window_tokens + step.new_tokens - 1)

    def _attend(self, model: ModelShape, step: Step, layer: int, pairs: int) -> Plan:
        shape, cache = model.layers[layer], (Access("kv", Rows(self._kept(step))),)
        if self.positions == "original":
            return (append(step), attend(shape, step, Rows(pairs), cache))
        rotate = Compute(
            name="rotate",  # in registers while the keys are read: FLOPs and no traffic of its own
            work=Work.ELEMENTWISE,
            rows=Rows(self._kept(step)),
            flops_per_row=3 * shape.kv_heads * shape.head_dim,
            after=("append",),
            launches=0,
        )
        return (append(step), rotate, attend(shape, step, Rows(pairs), cache, after=("rotate",)))
