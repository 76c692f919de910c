"""What a policy's torch code is given, and what it consists of."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from policies import LayerPlan, Step
from policies.model import LayerShape
from policies.plan import Sync
from runtime.rotary import Rotary

Made = TypeVar("Made")


class Handed(NamedTuple):
    """What the model hands over in one attention call of one layer.

    `q` is (batch, heads, new_tokens, head_dim), `new_k` and `new_v` (batch, kv_heads, new_tokens, head_dim), both
    rotated. `mask` is (batch, 1, 1, tokens), True for real tokens, or None where none is padding; among the new tokens
    attention is causal besides. A model that masks otherwise gives (batch, 1, new_tokens, tokens), which says it all.
    """

    q: Tensor
    new_k: Tensor
    new_v: Tensor
    mask: Tensor | None
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None

    def span(self, first: int, count: int, tokens: int) -> "Handed":
        """`count` of the new tokens as if they came alone; they make the sequence `tokens` long."""
        at = slice(first, first + count)
        mask = self.mask
        if mask is not None:
            mask = mask[:, :, at if mask.shape[2] > 1 else slice(None), :tokens]
        return self._replace(q=self.q[:, :, at], new_k=self.new_k[:, :, at], new_v=self.new_v[:, :, at], mask=mask)


class Lengths:
    """How many tokens a captured step finds, where kernels read it: int64 (1,) on the device, set before each replay.

    Sums are made once a step, by the kernel that asks first.
    """

    def __init__(self, past: Tensor) -> None:
        self._rows = {0: past}
        self._made: dict[Hashable, Any] = {}

    def rows(self, more: int) -> Tensor:
        """The tokens held before the step and `more`."""
        if more not in self._rows:
            self._rows[more] = self._rows[0] + more
        return self._rows[more]

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` gives, made by the first layer that asks: of what is the same in all layers of the step."""
        if key not in self._made:
            self._made[key] = make()
        found: Made = self._made[key]
        return found


class CapturedStep(Step):
    """A decode step that knows no length, so that none can be baked into a graph: asking for one is an error."""

    def __init__(self, prompt_tokens: int) -> None:
        object.__setattr__(self, "prompt_tokens", prompt_tokens)
        object.__setattr__(self, "new_tokens", 1)

    @property
    def past_tokens(self) -> int:
        """Raises RuntimeError: ask `Call.rows`."""
        raise RuntimeError("a captured step has no length on the host; take it from Call.rows")

    @property
    def prefilling(self) -> bool:
        """A captured step decodes."""
        return False


@dataclass(slots=True, kw_only=True)
class Call:
    """One attention call of one layer: what the model hands over, what the arena holds, what the kernels leave.

    `q`, `new_k`, `new_v`, `mask`: see `Handed`. `state` has the plan's buffers by name, (batch, rows, *row_shape). A
    kernel that draws a count leaves it in `counts` as int64 (batch, heads of the count). `scratch` passes tensors from
    one kernel of the call to the next. The operation `attend` sets `out`, shaped as `q`. `parts` are the calls of head
    groups. `lengths` is there in a captured step alone, whose `step` knows no length (see `Method.captured`).
    """

    shape: LayerShape
    step: Step
    state: Mapping[str, Tensor]
    q: Tensor
    new_k: Tensor
    new_v: Tensor
    mask: Tensor | None
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    rotary: Rotary | None = None
    out: Tensor | None = None
    counts: dict[str, Tensor] = field(default_factory=dict)
    scratch: dict[str, Tensor] = field(default_factory=dict)
    parts: "dict[int, Call]" = field(default_factory=dict)
    lengths: Lengths | None = None

    def rows(self, more: int) -> Tensor:
        """The tokens held before a captured step and `more`, int64 (1,) on the device."""
        return self._known().rows(more)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What follows from the lengths of a captured step alone, made once for all layers that ask with one key."""
        return self._known().once(key, make)

    def _known(self) -> Lengths:
        if self.lengths is None:
            raise RuntimeError("this step is not captured: its lengths are those of `step`")
        return self.lengths

    @property
    def seen(self) -> Tensor | None:
        """Which tokens are no padding: bool (batch, tokens), or None when all of them are real."""
        return None if self.mask is None else self.mask[:, 0, -1]

    @property
    def pairs(self) -> bool:
        """Whether the model rotates neighbours of a key, not its halves."""
        return self.rotary is not None and self.rotary.pairs

    def first(self) -> Tensor:
        """The first real token of each row, the tokens held where none is real: int64 (batch,)."""
        seen = self.seen
        if seen is None:
            return torch.zeros(self.q.shape[0], dtype=torch.int64, device=self.q.device)
        return torch.where(seen.any(dim=-1), seen.int().argmax(dim=-1), seen.shape[-1])

    def first_tokens(self, count: int) -> Tensor:
        """The first `count` real tokens of each row's prompt: int64 (batch, count), -1 where it has fewer."""
        tokens = self.first()[:, None] + torch.arange(count, device=self.q.device)
        return torch.where(tokens < self.step.prompt_tokens, tokens, -1)

    def by_head(self, name: str) -> Tensor:
        """A buffer whose rows are grouped by KV head, as (batch, kv_heads, rows of a head, *row_shape)."""
        rows: Tensor = self.state[name].unflatten(1, (self.shape.kv_heads, -1))
        return rows


class Gather(NamedTuple):
    """Rows that data choose: `src[b, h, ids[b, h, i]]` to `dst[b, h, slots[b, h, i]]`; id -1 = none.

    src and dst (batch, kv_heads, rows, width), ids and slots (batch, kv_heads, n) on dst's device; see
    `runtime.kernels.gather`.
    """

    src: Tensor
    ids: Tensor
    dst: Tensor
    slots: Tensor


Piece = tuple[Tensor, Tensor]  # destination, source
Kernel = Callable[[Call], None]
Route = Callable[[Call], Iterable[Piece | Gather]]
EndKernel = Callable[[Sequence[Call]], None]


@dataclass(frozen=True, slots=True)
class Method:
    """A policy's torch code: a kernel for each `Compute`, a route (what goes where) for each `Copy`, by name.

    A route may be a generator: what it does between two pieces runs on the lane of the copy.
    `ends` are the kernels of whole-model work after the prompt: they get the last prompt call of each of the policy's
    layers. `fused` names operations that another kernel does as well. `extends`: a later turn is more of the prompt;
    else its tokens are decoded one by one, so that what was built from the prompt stays. `execution_tokens`: a prompt
    is planned and executed that many tokens at a time (0: as it comes). `crops`: the newest tokens can be taken back.
    `unrotates`: kernels need `Call.rotary`. `any_padding`: padding may stand behind real tokens too. `any_mask`:
    attention is as the mask says, whatever it says. `may_be_infinite`: buffers where an infinite number is no fault.
    `whole`: at `attend` the buffer `kv` has every token, so that a model can attend by itself.
    `captured` makes decode steps fit for a CUDA graph, which is replayed at other lengths than it was captured at: it
    has a kernel for each operation that needs a length, which it takes from `Call.rows` and buffers whole; the others
    are those of every step. None: the method's decode steps cannot be captured. `captured_tokens`: only those that feed
    back so many generated tokens and fewer can (0: all).
    """

    kernels: Mapping[str, Kernel]
    routes: Mapping[str, Route] = field(default_factory=dict)
    ends: Mapping[str, EndKernel] = field(default_factory=dict)
    fused: frozenset[str] = frozenset()
    extends: bool = False
    execution_tokens: int = 0
    crops: bool = False
    unrotates: bool = False
    any_padding: bool = False
    any_mask: bool = False
    may_be_infinite: frozenset[str] = frozenset()
    whole: bool = False
    captured: Mapping[str, Kernel] | None = None
    captured_tokens: int = 0

    def missing(self, plan: LayerPlan) -> list[str]:
        """Operations of a plan that nothing executes."""
        known = {*self.kernels, *self.routes, *self.fused}
        return [op.name for op in plan.ops if not isinstance(op, Sync) and op.name not in known]
