"""Quest: page bounds choose which pages a step reads."""

import torch
from torch import Tensor

from policies import Policy, Quest
from runtime.call import Call, Method
from runtime.dense import attend
from runtime.kernels.scores import Reduce, bound_scores
from runtime.kernels.select import chosen_first, top_ids


def method(policy: Policy) -> Method:
    """Keep bounds per page, score them, read the sinks' pages, the best others and always the last."""
    if not isinstance(policy, Quest):
        raise TypeError(f"not a quest policy: {policy!r}")
    reduce: Reduce = "none" if policy.per == "query_head" else "max"
    page, most = policy.page_tokens, policy.chosen_pages

    def append(call: Call) -> None:
        past, tokens = call.step.past_tokens, call.step.tokens
        call.by_head("keys")[:, :, past:tokens].copy_(call.new_k)
        call.by_head("values")[:, :, past:tokens].copy_(call.new_v)

    def bound(call: Call) -> None:
        first, pages = call.step.past_tokens // page, -(-call.step.tokens // page)
        keys = call.by_head("keys")[:, :, first * page : pages * page].unflatten(2, (-1, page))
        token = torch.arange(first * page, pages * page, device=keys.device).unflatten(0, (-1, page))
        empty = (token >= call.step.tokens)[None, None, ..., None]
        bounds = call.by_head("bounds")[:, :, first:pages]
        bounds[:, :, :, 0] = keys.masked_fill(empty, torch.inf).amin(dim=3)
        bounds[:, :, :, 1] = keys.masked_fill(empty, -torch.inf).amax(dim=3)

    def score(call: Call) -> None:
        low, high = call.by_head("bounds")[:, :, : -(-call.step.tokens // page)].unbind(3)
        call.scratch["scores"] = bound_scores(call.q, low, high, reduce=reduce)

    def select(call: Call) -> None:
        last = -(-call.step.tokens // page) - 1
        scores = call.scratch["scores"][:, :, :last]
        if call.mask is not None:  # pages of nothing but padding are no choice
            seen = torch.nn.functional.pad(call.mask[:, 0, -1], (0, -call.mask.shape[-1] % page))
            alive = seen.unflatten(1, (-1, page)).any(-1)[:, None, :last]
            scores = scores.masked_fill(~alive, -torch.inf)
        scores = chosen_first(scores, call.first_tokens(policy.sink_tokens)[:, None] // page)
        chosen = top_ids(scores, most)
        if reduce == "none" and call.shape.group > 1:
            call.counts["added"] = _union(chosen, last, call.shape.group) - most
        tail = torch.full_like(chosen[..., :1], last)
        pages = torch.cat([chosen, tail], dim=-1)  # (batch, heads that choose, pages read)
        tokens = pages[..., None] * page + torch.arange(page, device=pages.device)
        # `top_ids` pads with -1 where there are fewer pages to choose from.
        call.scratch["tokens"] = torch.where(pages[..., None] < 0, -1, tokens).flatten(2)

    def attend_pages(call: Call) -> None:
        keys, values = call.by_head("keys"), call.by_head("values")
        tokens = call.scratch.get("tokens")
        if tokens is None:  # everything fits the budget, or a dense layer
            held = call.step.tokens
            call.out = attend(call, keys[:, :, :held], values[:, :, :held], call.mask)
            return
        there = (tokens >= 0) & (tokens < call.step.tokens)
        tokens = tokens.clamp(0, call.step.tokens - 1)
        if call.mask is not None:
            seen = call.mask[:, 0, -1, None].expand(-1, tokens.shape[1], -1)
            there &= seen.gather(2, tokens)
        mask = there.repeat_interleave(call.shape.heads // tokens.shape[1], dim=1)[:, :, None]
        call.out = attend(call, _rows(keys, tokens), _rows(values, tokens), mask)

    kernels = {"append": append, "bound": bound, "score": score, "select": select, "attend": attend_pages}
    return Method(kernels=kernels, extends=True, any_padding=True)


def _union(chosen: Tensor, pages: int, group: int) -> Tensor:
    """How many pages the query heads of a group choose between them: (batch, heads, n) -> int64 (batch, kv_heads)."""
    member = torch.zeros((*chosen.shape[:2], pages + 1), dtype=torch.bool, device=chosen.device)
    member.scatter_(2, chosen.masked_fill(chosen < 0, pages), True)
    united: Tensor = member[..., :pages].unflatten(1, (-1, group)).any(dim=2)
    return united.sum(dim=-1)


def _rows(cache: Tensor, tokens: Tensor) -> Tensor:
    """Rows of (batch, kv_heads, tokens, head_dim) for each head that chose: (batch, heads, n, head_dim)."""
    kv_heads = cache.shape[1]
    rows = tokens.unflatten(1, (kv_heads, -1)).flatten(2)
    chosen = cache.gather(2, rows[..., None].expand(-1, -1, -1, cache.shape[-1]))
    by_head: Tensor = chosen.unflatten(2, (tokens.shape[1] // kv_heads, -1))
    return by_head.flatten(1, 2)
