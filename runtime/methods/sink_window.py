"""The first and the last tokens, in a buffer whose window part is overwritten in turn."""

import torch

from policies import Policy, SinkWindow
from runtime.call import Call, Method
from runtime.dense import attend, split


def method(policy: Policy) -> Method:
    """Keep sinks and a ring of window tokens; prefill attends under a band mask.

    Raises ValueError for `positions="slot"`, which needs keys before rotation.
    """
    if not isinstance(policy, SinkWindow):
        raise TypeError(f"not a sink-window policy: {policy!r}")
    if policy.positions == "slot":
        raise ValueError("sink-window: the runtime executes positions=original; positions=slot needs unrotated keys")
    sinks, window = policy.sink_tokens, policy.window_tokens

    def row_of(tokens: torch.Tensor) -> torch.Tensor:
        return torch.where(tokens < sinks, tokens, sinks + (tokens - sinks) % window)

    def append(call: Call) -> None:
        kv, step = call.state["kv"], call.step
        first = max(step.past_tokens, step.tokens - window)  # earlier new tokens would be overwritten at once
        tokens = torch.arange(step.past_tokens, step.tokens, device=kv.device)
        tokens = tokens[(tokens < sinks) | (tokens >= first)]
        new = torch.stack([call.new_k, call.new_v], dim=2)  # (batch, kv_heads, 2, new, head_dim)
        rows = new[..., tokens - step.past_tokens, :].permute(0, 3, 2, 1, 4)
        call.scratch["before"] = kv.clone() if step.new_tokens > 1 and step.past_tokens else kv
        kv.index_copy_(1, row_of(tokens), rows)

    def attend_near(call: Call) -> None:
        kv, step = call.state["kv"], call.step
        if step.new_tokens == 1:
            held = min(step.tokens, sinks + window)
            keys, values = split(kv, held)
            columns = _token_of_row(held, step.tokens, sinks, window, kv.device)
            mask = None if call.mask is None else call.mask[..., columns]
            call.out = attend(call, keys, values, mask)
            return
        held = min(step.past_tokens, sinks + window)
        keys, values = split(call.scratch["before"], held)
        keys = torch.cat([keys, call.new_k], dim=2)
        values = torch.cat([values, call.new_v], dim=2)
        old = _token_of_row(held, step.past_tokens, sinks, window, kv.device)
        columns = torch.cat([old, torch.arange(step.past_tokens, step.tokens, device=kv.device)])
        rows = torch.arange(step.past_tokens, step.tokens, device=kv.device)[:, None]
        near = (columns <= rows) & ((columns < sinks) | (columns > rows - window))
        mask = near[None, None] if call.mask is None else near[None, None] & call.mask[..., columns]
        # A padding row may see nothing: let it see everything rather than divide by zero; nobody reads it.
        call.out = attend(call, keys, values, mask | ~mask.any(-1, keepdim=True))

    return Method(kernels={"append": append, "attend": attend_near})


def _token_of_row(rows: int, tokens: int, sinks: int, window: int, device: torch.device) -> torch.Tensor:
    """Which token each of the first `rows` rows holds once `tokens` have been written."""
    row = torch.arange(rows, device=device)
    newest = sinks + (tokens - 1 - sinks) % window
    return torch.where(row < sinks, row, tokens - 1 - (newest - row) % window)
