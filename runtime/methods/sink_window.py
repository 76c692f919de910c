"""The first and the last tokens, in a buffer whose window part is overwritten in turn.

Positions count from each row's first real token, so that a padded row keeps its own sinks.
"""

import torch
from torch import Tensor

from policies import Policy, SinkWindow
from runtime.call import Call, Method
from runtime.dense import attend, join, split
from runtime.kernels.attention import merge, partial_attention
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

    def attend_near(call: Call) -> None:
        if call.step.new_tokens == 1:
            _decode(call, window, slots)
        else:
            _prefill(call, window, slots)

    kernels = {"append": append, "attend": attend_near}
    return Method(kernels=kernels, fused=frozenset({"rotate"}), extends=True, unrotates=slots)


class _Window:
    """Which row of the buffer holds which token, for sequences of their own lengths."""

    def __init__(self, sinks: int, window: int) -> None:
        self.sinks, self.window, self.size = sinks, window, sinks + window

    def positions(self, rows: int, counts: Tensor) -> Tensor:
        """The position that each of `rows` rows holds once `counts` (batch,) tokens came: (batch, rows)."""
        row, last = torch.arange(rows, device=counts.device)[None], counts[:, None] - 1
        newest = self.sinks + (last - self.sinks) % self.window
        return torch.where(row < self.sinks, row, last - (newest - row) % self.window)

    def write(self, call: Call, new: Tensor) -> None:
        """Put new rows (batch, new_tokens, *row_shape) where they belong."""
        kv, step, first = call.state["kv"], call.step, call.first()
        if step.new_tokens == 1:
            place = step.past_tokens - first
            place = torch.where(place < self.sinks, place, self.sinks + (place - self.sinks) % self.window)
            kv[torch.arange(len(kv), device=kv.device), place] = new[:, 0]
            return
        token = self.positions(kv.shape[1], step.tokens - first) + first[:, None] - step.past_tokens
        wide = (..., *(None,) * (new.dim() - 2))
        fresh = (token >= 0) & (token < step.new_tokens)
        rows = token.clamp(0, step.new_tokens - 1)[wide].expand(-1, -1, *new.shape[2:])
        kv.copy_(torch.where(fresh[wide], new.gather(1, rows), kv))


def _decode(call: Call, window: _Window, slots: bool) -> None:
    counts = call.step.tokens - call.first()
    held = min(call.step.tokens, window.size)
    keys, values = split(call.state["kv"], held, call.shape.head_dim)
    position = window.positions(held, counts)
    if slots:  # as far from the query as their slots are: window keys at their positions, sinks moved along
        moved = (counts - window.size).clamp(min=0)[:, None]
        turned = torch.where(position < window.sinks, position + moved, position)
        at = turned + call.first()[:, None]
        keys = rotate(keys, *_angles(call, at), pairs=call.pairs)  # rows that hold nothing are masked below
    mask = None if call.mask is None else ((position >= 0) & (position < counts[:, None]))[:, None, None]
    call.out = attend(call, keys, values, mask)


def _prefill(call: Call, window: _Window, slots: bool) -> None:
    step, first = call.step, call.first()
    held = min(step.past_tokens, window.size)
    keys, values = split(call.scratch["before"], held, call.shape.head_dim)
    old = window.positions(held, (step.past_tokens - first).clamp(min=1))
    old = old.masked_fill(old >= (step.past_tokens - first)[:, None], -1)  # rows of padded sequences that hold nothing
    query = torch.arange(step.past_tokens, step.tokens, device=keys.device)[None] - first[:, None]
    if slots:
        keys = rotate(keys, *_angles(call, old + first[:, None]), pairs=call.pairs)
    keys, values = torch.cat([keys, call.new_k], dim=2), torch.cat([values, call.new_v], dim=2)
    column = torch.cat([old, query], dim=1)[:, None, None]
    outs = []
    for start in range(0, step.new_tokens, QUERIES):  # so that no mask is as large as the prompt squared
        rows = slice(start, min(start + QUERIES, step.new_tokens))
        seen = slice(0, held + rows.stop)
        args = (call.q[:, :, rows], keys[:, :, seen], values[:, :, seen], query[:, rows], column[..., seen])
        outs.append(_band(call, window, slots, *args))
    call.out = torch.cat(outs, dim=2)


def _band(
    call: Call, window: _Window, slots: bool, q: Tensor, keys: Tensor, values: Tensor, query: Tensor, column: Tensor
) -> Tensor:
    """Attention of queries at positions `query` (batch, n) to keys at `column` (batch, 1, 1, tokens; below 0: none)."""
    row = query[:, None, :, None]
    near = (column >= 0) & (column <= row) & (column > row - window.window)
    sinks = (column >= 0) & (column <= row) & (column < window.sinks)
    parts = [(q, near | sinks)]
    if slots:  # a query beyond the window is as far from a sink as the sizes say, wherever it stands
        first = call.first()[:, None]
        moved = (query - window.size + 1).clamp(min=0)
        closer = unrotate(q, *_angles(call, query + first), pairs=call.pairs)
        closer = rotate(closer, *_angles(call, query - moved + first), pairs=call.pairs)
        parts = [(q, near & ~sinks), (closer, sinks)]
    attended = [
        partial_attention(part, keys, values, scale=call.scale, mask=mask, softcap=call.softcap) for part, mask in parts
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
