"""Quest: page bounds choose which pages a step reads."""

import torch
from torch import Tensor

from policies import Policy, Quest
from runtime.call import Call, Kernel, Method
from runtime.dense import attend
from runtime.kernels.append import append_row
from runtime.kernels.attention import Segment, attend_segments
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
    return Method(kernels=kernels, extends=True, any_padding=True, captured=_captured(policy, reduce))


def _captured(policy: Quest, reduce: Reduce) -> dict[str, Kernel]:
    """The kernels of a step that knows no length: all pages that there is room for, of which the later hold nothing."""
    page = policy.page_tokens

    def append(call: Call) -> None:
        append_row(call.by_head("keys"), call.by_head("values"), call.new_k, call.new_v, call.rows(0))

    def last_page(call: Call) -> Tensor:
        """The page that the new token is in: int64 (1,)."""
        return call.once(("page", page), lambda: call.rows(0) // page)

    def bound(call: Call) -> None:
        """Of the page that the new token is in."""
        keys, bounds, last = call.by_head("keys"), call.by_head("bounds"), last_page(call)

        def page_rows() -> tuple[Tensor, Tensor]:
            token = last * page + torch.arange(page, device=keys.device)
            return token.clamp(max=keys.shape[2] - 1), (token > call.rows(0))[:, None]

        rows, empty = call.once(("page rows", page), page_rows)
        there = keys.index_select(2, rows)
        low, high = there.masked_fill(empty, torch.inf).amin(dim=2), there.masked_fill(empty, -torch.inf).amax(dim=2)
        bounds.index_copy_(2, last, torch.stack([low, high], dim=2)[:, :, None])

    def score(call: Call) -> None:
        low, high = call.by_head("bounds").unbind(3)
        call.scratch["scores"] = bound_scores(call.q, low, high, reduce=reduce)

    def select(call: Call) -> None:
        scores, last = call.scratch["scores"], last_page(call)
        pages = scores.shape[2]

        def choices() -> tuple[Tensor, Tensor]:
            """Pages that are no choice, and the sinks' pages: that of the new token is read anyway."""
            later = torch.arange(pages, device=last.device) >= last
            if call.mask is not None:
                seen = torch.nn.functional.pad(call.mask[:, 0, -1], (0, -call.mask.shape[-1] % page))
                later = later | ~seen.unflatten(1, (-1, page)).any(-1)[:, None, :pages]
            sinks = call.first_tokens(policy.sink_tokens)[:, None] // page
            return later, torch.where(sinks < last, sinks, -1)

        later, sinks = call.once(("pages", page, pages, policy.sink_tokens), choices)
        chosen = top_ids(chosen_first(scores.masked_fill(later, -torch.inf), sinks), policy.chosen_pages)
        if reduce == "none" and call.shape.group > 1:
            call.counts["added"] = _union(chosen, pages, call.shape.group) - policy.chosen_pages
        pages_read = torch.cat([chosen, last.expand(*chosen.shape[:2], 1)], dim=-1)
        tokens = pages_read[..., None] * page + torch.arange(page, device=last.device)
        there = (pages_read[..., None] >= 0) & (tokens < call.rows(1))
        tokens = torch.where(there, tokens, -1).flatten(2)
        if call.seen is not None:
            seen = call.seen[:, None].expand(-1, tokens.shape[1], -1)
            tokens = torch.where(seen.gather(2, tokens.clamp(min=0)), tokens, -1)
        call.scratch["tokens"] = tokens

    def attend_pages(call: Call) -> None:
        keys, values, tokens = call.by_head("keys"), call.by_head("values"), call.scratch.get("tokens")
        if tokens is None:  # everything fits the budget, or a dense layer
            rows = slice(None if call.mask is None else call.mask.shape[3])  # the last page may have more of them
            segment = Segment(keys[:, :, rows], values[:, :, rows], call.mask, call.rows(1))
        else:
            each = tokens.shape[1] // keys.shape[1]  # heads that choose, for a KV head
            keys, values = (x if each == 1 else x.repeat_interleave(each, dim=1) for x in (keys, values))
            segment = Segment(keys, values, ids=tokens)
        call.out = attend_segments(call.q, [segment], scale=call.scale, softcap=call.softcap, sink_logits=call.sinks)

    return {"append": append, "bound": bound, "score": score, "select": select, "attend": attend_pages}


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
