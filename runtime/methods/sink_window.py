"""The first and the last tokens, in a buffer whose window part is overwritten in turn.

Positions count from each row's first real token, so that a padded row keeps its own sinks.
"""

import torch
from torch import Tensor

from policies import Policy, SinkWindow
from runtime.call import Call, Method
from runtime.dense import attend, join, split
from runtime.kernels.attention import Segment, attend_segments, merge, partial_attention
from runtime.rotary import rotate, unrotate

QUERIES = 1024  # of a prompt that attend at once


def method(policy: Policy) -> Method:
    """Keep sinks and a ring of window tokens; prefill attends under a band mask."""
    if not isinstance(policy, SinkWindow):
        raise TypeError(f"not a sink-window policy: {policy!r}")
    slots, window = policy.positions == "slot", _Window(policy.sink_tokens, policy.window_tokens)

    def append(call: Call) -> None:
        keys = call.new_k
        if slots:
            own = torch.arange(call.step.past_tokens, call.step.tokens)[None]
            keys = unrotate(keys, *_angles(call, own), pairs=call.pairs)
        call.scratch["new_k"] = keys
        if call.step.new_tokens > 1:
            call.scratch["before"] = call.state["kv"].clone()
        window.write(call, join(keys, call.new_v))

    def append_captured(call: Call) -> None:
        keys = call.new_k
        if slots:
            own = call.once(("own", id(call.rotary)), lambda: _angles(call, call.rows(0)[None]))
            keys = unrotate(keys, *own, pairs=call.pairs)
        place = call.once(("place", window.sinks, window.window), lambda: window.place(call.rows(0) - call.first()))
        kv = call.state["kv"]
        kv[torch.arange(len(kv), device=kv.device), place] = join(keys, call.new_v)[:, 0]

    def attend_captured(call: Call) -> None:
        """All rows of the buffer: those that hold nothing yet have no position."""
        kv = call.state["kv"]
        counts = call.once("counts", lambda: call.rows(1) - call.first())
        keys, values, near = _near(call, window, slots, kv.shape[1], counts)
        held = Segment(keys, values, near)
        call.out = attend_segments(call.q, [held], scale=call.scale, softcap=call.softcap, sink_logits=call.sinks)

    def attend_near(call: Call) -> None:
        if call.step.new_tokens == 1:
            _decode(call, window, slots)
        else:
            _prefill(call, window, slots)

    kernels = {"append": append, "attend": attend_near}
    return Method(
        kernels=kernels,
        fused=frozenset({"rotate"}),
        extends=True,
        unrotates=slots,
        captured={"append": append_captured, "attend": attend_captured},
    )


class _Window:
    """Which row of the buffer holds which token, for sequences of their own lengths."""

    def __init__(self, sinks: int, window: int) -> None:
        self.sinks, self.window, self.size = sinks, window, sinks + window

    def positions(self, rows: int, counts: Tensor) -> Tensor:
        """The positions that `rows` rows hold once `counts` (batch,) tokens came, (batch, rows); below 0: none."""
        row, last = torch.arange(rows, device=counts.device)[None], counts[:, None] - 1
        newest = self.sinks + (last - self.sinks) % self.window
        near = last - (newest - row) % self.window
        return torch.where(row < self.sinks, row, near.masked_fill(near < self.sinks, -1))  # a sink has its own row

    def place(self, position: Tensor) -> Tensor:
        """The rows where tokens at `position` (batch,) belong."""
        return torch.where(position < self.sinks, position, self.sinks + (position - self.sinks) % self.window)

    def write(self, call: Call, new: Tensor) -> None:
        """Put new rows (batch, new_tokens, *row_shape) where they belong."""
        kv, step, first = call.state["kv"], call.step, call.first()
        if step.new_tokens == 1:
            kv[torch.arange(len(kv), device=kv.device), self.place(step.past_tokens - first)] = new[:, 0]
            return
        token = self.positions(kv.shape[1], step.tokens - first) + first[:, None] - step.past_tokens
        wide = (..., *(None,) * (new.dim() - 2))
        fresh = (token >= 0) & (token < step.new_tokens)
        rows = token.clamp(0, step.new_tokens - 1)[wide].expand(-1, -1, *new.shape[2:])
        kv.copy_(torch.where(fresh[wide], new.gather(1, rows), kv))


def _decode(call: Call, window: _Window, slots: bool) -> None:
    held = min(call.step.tokens, window.size)
    keys, values, near = _near(call, window, slots, held, call.step.tokens - call.first())
    call.out = attend(call, keys, values, None if call.mask is None else near)


def _near(call: Call, window: _Window, slots: bool, rows: int, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of `rows` rows after `counts` (batch,) tokens, and which rows hold one: (batch, 1, 1, rows)."""
    keys, values = split(call.state["kv"], rows, call.shape.head_dim)

    def standing() -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Which rows hold a token, and the angles by which they are read."""
        position = window.positions(rows, counts)
        near = ((position >= 0) & (position < counts[:, None]))[:, None, None]
        if not slots:
            return near, None
        # As far from the query as their slots are: window keys at their positions, sinks moved along.
        moved = (counts - window.size).clamp(min=0)[:, None]
        turned = torch.where(position < window.sinks, position + moved, position)
        return near, _angles(call, turned + call.first()[:, None])

    key = "near", rows, window.sinks, window.window, id(call.rotary)
    near, angles = standing() if call.lengths is None else call.once(key, standing)
    if angles is not None:
        keys = rotate(keys, *angles, pairs=call.pairs)  # rows that hold nothing are masked
    return keys, values, near


def _prefill(call: Call, window: _Window, slots: bool) -> None:
    """Attention of a prompt's chunk, some queries at a time: to the window before each, and to the sinks apart."""
    step, first = call.step, call.first()
    held = min(step.past_tokens, window.size)
    keys, values = split(call.scratch["before"], held, call.shape.head_dim)
    old = window.positions(held, (step.past_tokens - first).clamp(min=1))
    old = old.masked_fill(old >= (step.past_tokens - first)[:, None], -1)  # rows of padded sequences that hold nothing
    query = torch.arange(step.past_tokens, step.tokens, device=keys.device)[None] - first[:, None]
    if slots:
        keys = rotate(keys, *_angles(call, old + first[:, None]), pairs=call.pairs)
    keys, values = torch.cat([keys, call.new_k], dim=2), torch.cat([values, call.new_v], dim=2)
    column = torch.cat([old, query], dim=1)
    sinks = _sinks(window, keys, values, column)
    outs = []
    for start in range(0, step.new_tokens, QUERIES):  # so that no mask is as large as the prompt squared
        rows = slice(start, min(start + QUERIES, step.new_tokens))
        # The buffer is in no order; of the new tokens those before the first query's window are not looked at.
        seen = slice(0 if start < window.window else held + start - window.window + 1, held + rows.stop)
        near = (keys[:, :, seen], values[:, :, seen], column[:, seen])
        outs.append(_band(call, window, slots, call.q[:, :, rows], query[:, rows], near, sinks))
    call.out = torch.cat(outs, dim=2)


_Part = tuple[
    Tensor, Tensor, Tensor
]  # keys and values (batch, kv_heads, n, head_dim), and where they stand, (batch, n)


def _sinks(window: _Window, keys: Tensor, values: Tensor, column: Tensor) -> _Part:
    """The keys at the first positions, wherever a row has them; where it has none, position -1."""
    stands = (column >= 0) & (column < window.sinks)
    count = min(window.sinks, column.shape[1])
    at = stands.int().argsort(dim=1, descending=True, stable=True)[:, :count]
    position = torch.where(stands.gather(1, at), column.gather(1, at), -1)
    rows = at[:, None, :, None].expand(-1, keys.shape[1], -1, -1)
    keys, values = (x.gather(2, rows.expand(-1, -1, -1, x.shape[3])) for x in (keys, values))
    return keys, values, position


def _band(call: Call, window: _Window, slots: bool, q: Tensor, query: Tensor, near: _Part, sinks: _Part) -> Tensor:
    """Attention of queries at positions `query` (batch, n) to what is near and to the sinks; below 0 stands nothing."""
    row, closer = query[:, None, :, None], q
    if slots:  # a query beyond the window is as far from a sink as the sizes say, wherever it stands
        first = call.first()[:, None]
        moved = (query - window.size + 1).clamp(min=0)
        closer = unrotate(q, *_angles(call, query + first), pairs=call.pairs)
        closer = rotate(closer, *_angles(call, query - moved + first), pairs=call.pairs)
    column = near[2][:, None, None]
    in_window = (column >= window.sinks) & (column <= row) & (column > row - window.window)
    first_ones = (sinks[2][:, None, None] >= 0) & (sinks[2][:, None, None] <= row)
    attended = [
        partial_attention(part, keys, values, scale=call.scale, mask=mask, softcap=call.softcap)
        for part, (keys, values, _), mask in ((q, near, in_window), (closer, sinks, first_ones))
    ]
    return merge(attended, sink_logits=call.sinks).to(q.dtype)


def _angles(call: Call, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of tokens (batch or 1, n), for all heads: (batch, 1, n, rotated dimensions).

    Tokens before the first stand for rows that hold nothing, which are masked: any angle will do.
    """
    if call.rotary is None:
        raise RuntimeError("no angles: the cache was not told how the model rotates")
    cos, sin = call.rotary.at(tokens.to(call.q.device).clamp(min=0))
    return cos[:, None], sin[:, None]
