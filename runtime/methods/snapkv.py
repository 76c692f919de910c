"""SnapKV: of a prompt only what its last queries attended to, and those last tokens themselves."""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from policies import Policy, SnapKV
from runtime.call import Call, Method
from runtime.dense import append_raw, attend, attend_raw
from runtime.kernels.append import append_row
from runtime.kernels.attention import Segment, attend_segments, causal_mask
from runtime.kernels.select import chosen_first, top_ids


def method(policy: Policy) -> Method:
    """Keep `policy`'s budget of the prompt's tokens and all generated ones, in the order of the text.

    Weights are summed over the observation window (kvpress: the mean, which orders alike), pooled and, for
    `per="kv_head"`, averaged over a group's query heads. Padding neither votes nor is chosen.
    """
    if not isinstance(policy, SnapKV):
        raise TypeError(f"not a snapkv policy: {policy!r}")
    own = _Kernels(policy)
    kernels = {
        "append": own.append,
        "keep_queries": own.keep_queries,
        "observe": own.observe,
        "pool": own.pool,
        "select": own.select,
        "compress": own.compress,
        "attend": own.attend,
    }
    captured = {"append": own.append_captured, "attend": own.attend_captured}
    return Method(kernels=kernels, any_padding=True, captured=captured)


class _Kernels:
    """The kernels that depend on the policy's parameters; nothing is kept from call to call."""

    def __init__(self, policy: SnapKV) -> None:
        self.policy, self.window = policy, policy.observation_tokens
        self.chosen = policy.budget_tokens - policy.observation_tokens  # tokens before the window that are kept

    def append(self, call: Call) -> None:
        if call.step.prefilling:
            append_raw(call)
            return
        row = self._held(call) - 1
        for name, new in (("keys", call.new_k), ("values", call.new_v)):
            self._kept(call, name)[:, :, row : row + 1].copy_(self._by_cache(call, new))

    def append_captured(self, call: Call) -> None:
        row = call.rows(self._ahead(call))
        new_k, new_v = (self._by_cache(call, new) for new in (call.new_k, call.new_v))
        append_row(self._kept(call, "keys"), self._kept(call, "values"), new_k, new_v, row)

    # -- the end of a prompt -------------------------------------------------------------------------------------

    def keep_queries(self, call: Call) -> None:
        """Leave the last chunk the queries of the observation window that come before it."""
        first = call.step.prompt_tokens - self.window
        rows = slice(max(0, call.step.past_tokens - first), call.step.tokens - first)
        queries = call.q[:, :, rows.start - rows.stop :]
        call.state["early_q"][:, rows].copy_(queries.transpose(1, 2))

    def observe(self, call: Call) -> None:
        """What each query of the window attends to: the weights, in the plan's `scores`."""
        missing = max(0, self.window - call.step.new_tokens)
        q = call.q[:, :, -self.window :]
        if missing:
            q = torch.cat([call.state["early_q"][:, :missing].transpose(1, 2), q], dim=2)
        keys, kv_heads = call.by_head("raw_keys"), call.shape.kv_heads
        grouped = q.reshape(len(q), kv_heads, -1, q.shape[3]).float()
        weights = call.state["scores"].view(len(q), kv_heads, -1, keys.shape[2])
        torch.matmul(grouped, keys.float().mT, out=weights)
        weights.mul_(call.scale)
        if call.softcap is not None:
            weights.div_(call.softcap).tanh_().mul_(call.softcap)
        self._softmax(call, weights.view(len(q), call.shape.heads, self.window, -1))

    def pool(self, call: Call) -> None:
        """Sum over the window, pool neighbours: (batch, heads of the cache, tokens before the window)."""
        batch, tokens = len(call.q), call.step.tokens
        weights = call.state["scores"].view(batch, call.shape.heads, self.window, tokens)
        votes = weights[..., : tokens - self.window].sum(dim=2)
        size = self.policy.kernel_tokens
        pool = max_pool1d if self.policy.pooling == "max" else avg_pool1d
        votes = pool(votes, size, stride=1, padding=size // 2)
        if self.policy.per == "kv_head":
            votes = votes.unflatten(1, (call.shape.kv_heads, -1)).mean(dim=2)
        call.scratch["votes"] = votes

    def select(self, call: Call) -> None:
        votes, seen = call.scratch["votes"], call.seen
        if seen is not None:
            votes = votes.masked_fill(~seen[:, None, : votes.shape[2]], -torch.inf)
        sinks = call.first_tokens(self.policy.sink_tokens)[:, None]
        call.scratch["tokens"] = top_ids(chosen_first(votes, sinks), self.chosen)

    def compress(self, call: Call) -> None:
        chosen, tokens = call.scratch["tokens"], call.step.tokens
        window = torch.arange(tokens - self.window, tokens, device=chosen.device)
        rows = torch.cat([chosen.clamp(min=0), window.expand(*chosen.shape[:2], -1)], dim=2)
        for raw, name in (("raw_keys", "keys"), ("raw_values", "values")):
            of, kept = call.by_head(raw), self._kept(call, name)
            of = of.repeat_interleave(kept.shape[1] // of.shape[1], dim=1) if kept.shape[1] > of.shape[1] else of
            kept[:, :, : rows.shape[2]].copy_(of.gather(2, rows[..., None].expand(-1, -1, -1, of.shape[3])))

    # -- every step ----------------------------------------------------------------------------------------------

    def attend(self, call: Call) -> None:
        if call.step.prefilling:
            attend_raw(call)
            return
        keys, values = (self._kept(call, name)[:, :, : self._held(call)] for name in ("keys", "values"))
        call.out = attend(call, keys, values, self._mask(call))

    def attend_captured(self, call: Call) -> None:
        keys, values = self._kept(call, "keys"), self._kept(call, "values")
        kept = Segment(keys, values, self._mask(call), call.rows(self._ahead(call) + 1))
        call.out = attend_segments(call.q, [kept], scale=call.scale, softcap=call.softcap, sink_logits=call.sinks)

    def _mask(self, call: Call) -> Tensor | None:
        """Which kept rows are no padding: a row with too few tokens has chosen all that it has, first."""
        seen = call.seen
        if seen is None:
            return None
        first = call.step.prompt_tokens - self.window
        choices = seen[:, :first].sum(dim=1, keepdim=True)
        chosen = torch.arange(self.chosen, device=seen.device) < choices
        return torch.cat([chosen, seen[:, first:]], dim=1)[:, None, None]

    def _softmax(self, call: Call, logits: Tensor) -> None:
        """In place, over the keys that a query of the window may see; a query of padding gets zeros."""
        tokens = logits.shape[3]
        allowed = causal_mask(self.window, tokens, logits.device)
        if call.seen is not None:
            allowed = allowed & call.seen[:, None, None]
        logits.masked_fill_(~allowed, -torch.inf)
        largest = logits.amax(dim=3, keepdim=True)
        sinks = None if call.sinks is None else call.sinks.float().view(1, -1, 1, 1)
        if sinks is not None:
            largest = torch.maximum(largest, sinks)
        largest = largest.masked_fill(largest == -torch.inf, 0)
        total = logits.sub_(largest).exp_().sum(dim=3, keepdim=True)
        if sinks is not None:
            total += torch.exp(sinks - largest)
        logits.div_(total.masked_fill(total == 0, 1))

    def _held(self, call: Call) -> int:
        """Rows of a head once this step's token is among them."""
        return self._ahead(call) + call.step.tokens

    def _ahead(self, call: Call) -> int:
        """By how many rows of a head outnumber the tokens of the sequence; less than none as a rule."""
        return self.policy.budget_tokens - call.step.prompt_tokens

    def _by_cache(self, call: Call, new: Tensor) -> Tensor:
        """New keys or values for each cache: one per KV head, or one per query head."""
        return new if self.policy.per == "kv_head" else new.repeat_interleave(call.shape.group, dim=1)

    def _kept(self, call: Call, name: str) -> Tensor:
        """A buffer by the heads that it is stored for: (batch, kv_heads or heads, rows, head_dim)."""
        heads = call.shape.kv_heads if self.policy.per == "kv_head" else call.shape.heads
        rows: Tensor = call.state[name].unflatten(1, (heads, -1))
        return rows
