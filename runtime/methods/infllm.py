"""InfLLM: a window, sinks, and blocks in host memory that a layer looks up by representative keys."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from policies import InfLLM, Policy, Step
from runtime.call import Call, Method, Piece
from runtime.dense import join, split
from runtime.kernels.attention import attention_mass, merge, partial_attention, partial_attention_at
from runtime.kernels.select import top_ids
from runtime.rotary import rotate, unrotate


def method(policy: Policy) -> Method:
    """Attend to the window in true positions and to everything else at one distance; look blocks up as decode does."""
    if not isinstance(policy, InfLLM):
        raise TypeError(f"not an infllm policy: {policy!r}")
    layer = _Layer(policy)
    return Method(
        kernels={
            "score": layer.score,
            "select": layer.select,
            "attend_near": layer.attend_near,
            "attend": layer.attend,
            "weigh": layer.weigh,
            "append": layer.append,
            "represent": layer.represent,
        },
        routes={"ids_down": _ids_down, "fetch": _fetch, "evict": layer.evict},
        extends=True,
        execution_tokens=policy.execution_tokens,
        unrotates=True,
    )


class _Places(NamedTuple):
    """Where the tokens of a step are: those below `left` have left the window before it, those below `leaves` after.

    `local` has the last tokens before the step, each in row token % window. In `rest` the sinks come first, then the
    tail from token `base` on. Padding and, once more, the sinks of a padded sequence lie in the tail and in blocks as
    if they were tokens, so that all sequences close blocks together; they are masked there.
    """

    left: int
    leaves: int
    base: int  # the first token that was in no block before the step
    sinks: int  # rows of them in `rest`

    @property
    def tail(self) -> int:
        """Tokens in the tail before the step."""
        return max(0, self.left - self.base)


class _Layer:
    """The kernels of one policy. Row b of a batch has its first token, and sink, at index `call.first()[b]`."""

    def __init__(self, policy: InfLLM) -> None:
        self.policy, self.window = policy, policy.window_tokens

    def score(self, call: Call) -> None:
        """One score per block for all heads: the mean query at the window's far end against the representatives."""
        blocks = self.policy.blocks(call.step.past_tokens)
        query = self._far_query(call).float()
        if call.seen is None:
            mean = query.mean(dim=2)
        else:
            real = call.seen[:, None, call.step.past_tokens :, None]
            mean = (query * real).sum(dim=2) / real.sum(dim=2).clamp(min=1)
        representatives = call.state["representatives"][:, :blocks].flatten(2).float()
        scores = (representatives @ mean.flatten(1)[..., None])[..., 0]
        end = torch.arange(1, blocks + 1, device=scores.device) * self.policy.block_tokens
        call.scratch["scores"] = scores.masked_fill(end <= call.first()[:, None], -torch.inf)  # nothing but padding

    def select(self, call: Call) -> None:
        """The best blocks, and the slots that they have or, in place of those chosen longest ago, take."""
        scores, resident = call.scratch["scores"], call.state["resident"]
        ids = top_ids(scores, min(scores.shape[1], self.policy.top_k))
        held, stamps = resident.unbind(2)
        hits = (ids[:, :, None] == held[:, None]) & (stamps > 0)[:, None]  # a slot without a stamp is empty
        now, missed = call.step.tokens, (ids >= 0) & ~hits.any(dim=2)
        stamps = stamps.masked_fill(hits.any(dim=1), now)
        oldest = stamps.argsort(dim=1, stable=True)
        slots = torch.where(missed, oldest.gather(1, (missed.cumsum(dim=1) - 1).clamp(min=0)), hits.int().argmax(dim=2))
        # What is not missed lands in a column too many.
        target = torch.where(missed, slots, resident.shape[1])
        resident[..., 0] = _padded(held).scatter(1, target, ids)[:, :-1]
        resident[..., 1] = _padded(stamps).scatter(1, target, now)[:, :-1]
        call.state["chosen"][:, 0, 0] = torch.where(missed, ids, -1)
        call.state["chosen"][:, 0, 1] = torch.where(ids >= 0, slots, -1)
        call.scratch["ids"], call.counts["miss"] = ids, missed.sum(dim=1, keepdim=True)

    def attend_near(self, call: Call) -> None:
        """Every earlier token that is in no block: in the window as it is, outside at one distance."""
        places, parts = self._places(call), []
        for keys, values, mask in self._local(call):
            parts.append(partial_attention(call.q, keys, values, scale=call.scale, mask=mask, softcap=call.softcap))
        for rows, mask in self._outside(call, places) if places.leaves else ():
            keys, values = split(rows, rows.shape[1], call.shape.head_dim)
            query = self._far_query(call)
            parts.append(partial_attention(query, keys, values, scale=call.scale, mask=mask, softcap=call.softcap))
        call.scratch["outs"], call.scratch["lses"] = (torch.stack(x) for x in zip(*parts, strict=True))

    def attend(self, call: Call) -> None:
        """One softmax over what is near and the chosen blocks."""
        if "outs" not in call.scratch:
            self.attend_near(call)
        parts = list(zip(call.scratch["outs"], call.scratch["lses"], strict=True))
        if "ids" in call.scratch:
            cached = call.state["cached"].flatten(1, 2)
            keys, values = split(cached, cached.shape[1], call.shape.head_dim)
            rows = self._cached_rows(call)[:, None].expand(-1, keys.shape[1], -1)
            query = self._far_query(call)
            parts.append(partial_attention_at(query, keys, values, rows, scale=call.scale, softcap=call.softcap))
        call.out = merge(parts, sink_logits=call.sinks).to(call.q.dtype)
        total = torch.logsumexp(torch.stack([lse for _, lse in parts]), dim=0)
        call.scratch["lse"] = total if call.sinks is None else torch.logaddexp(total, call.sinks.float()[:, None])

    def weigh(self, call: Call) -> None:
        """Add what the step's queries gave to each token of their windows."""
        masses = [
            attention_mass(call.q, keys, call.scratch["lse"], scale=call.scale, mask=mask, softcap=call.softcap).mT
            for keys, _, mask in self._local(call)
        ]
        call.scratch["new_mass"] = masses[-1]
        for mass in masses[:-1]:
            call.state["mass"][:, : mass.shape[1]] += mass

    def append(self, call: Call) -> None:
        """New tokens enter the window; those that leave it become sinks, the tail, or blocks that close."""
        places, past, tokens = self._places(call), call.step.past_tokens, call.step.tokens
        if places.leaves > places.left:
            self._store_sinks(call, places)
            self._store_tail(call, places)
        kept = torch.arange(max(past, tokens - self.window), tokens, device=call.q.device)
        rows, new = kept % self.window, kept - past
        call.state["local"][:, rows] = join(call.new_k[:, :, new], call.new_v[:, :, new])
        call.state["mass"][:, rows] = call.scratch["new_mass"][:, new]

    def represent(self, call: Call) -> None:
        """A block's vector for each query head: the mean of its keys that local attention weighed most."""
        first_block, closing = self.policy.blocks(call.step.past_tokens), call.scratch["closing"]
        blocks, size, group = closing.shape[1], closing.shape[2], call.shape.group
        token = torch.arange(first_block * size, (first_block + blocks) * size, device=closing.device)
        real = (token >= call.first()[:, None]).unflatten(1, (blocks, size))
        mass = call.scratch["closing_mass"].masked_fill(~real[..., None], -torch.inf).mT
        best = top_ids(mass, self.policy.representative_tokens)  # (batch, blocks, heads, representative_tokens)
        keys, _ = split(closing.flatten(1, 2), blocks * size, call.shape.head_dim)
        keys = keys.unflatten(2, (blocks, size)).transpose(1, 2).repeat_interleave(group, dim=2).float()
        chosen = keys.gather(3, best.clamp(min=0)[..., None].expand(-1, -1, -1, -1, keys.shape[-1]))
        there = (best >= 0)[..., None]
        means = (chosen * there).sum(dim=3) / there.sum(dim=3).clamp(min=1)
        call.state["representatives"][:, first_block : first_block + blocks] = means.to(closing.dtype)

    def evict(self, call: Call) -> list[Piece]:
        """The blocks that closed leave for the host."""
        closing, first = call.scratch["closing"], self.policy.blocks(call.step.past_tokens)
        if closing.is_cuda:  # made on the stream of the model, read on this one
            closing.record_stream(torch.cuda.current_stream(closing.device))
        return [(call.state["blocks"][row, first : first + len(own)], own) for row, own in enumerate(closing)]

    def _places(self, call: Call) -> _Places:
        return self._at(call.step, call.state["rest"].shape[1])

    def _at(self, step: Step, rest_rows: int) -> _Places:
        sinks, blocks = self.policy.sink_tokens, self.policy.blocks(step.past_tokens)
        left, leaves = (max(0, tokens - self.window) for tokens in (step.past_tokens, step.tokens))
        return _Places(left, leaves, sinks + blocks * self.policy.block_tokens, min(sinks, rest_rows))

    def _local(self, call: Call) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Keys, values and mask of what was in the window, and of the new tokens, the last of the list."""
        past, tokens, held = call.step.past_tokens, call.step.tokens, min(call.step.past_tokens, self.window)
        row = torch.arange(held, device=call.q.device)
        before = past - 1 - (past - 1 - row) % self.window  # the token in each row
        new = torch.arange(past, tokens, device=call.q.device)
        first = call.first()[:, None, None, None]
        found = []
        old = split(call.state["local"], held, call.shape.head_dim)
        for token, (keys, values) in ((before, old), (new, (call.new_k, call.new_v))):
            if len(token):
                near = (token <= new[:, None]) & (token > new[:, None] - self.window)
                found.append((keys, values, near & (token >= first)))
        return found

    def _outside(self, call: Call, places: _Places) -> Sequence[tuple[Tensor, Tensor]]:
        """Rows and mask of what is outside the window and in no block: sinks and tail, and what leaves in this step."""
        first, device = call.first()[:, None], call.q.device
        found = []
        if places.left:
            sink = torch.arange(places.sinks, device=device) + first < places.left
            token = torch.arange(places.base, places.base + places.tail, device=device)
            tail = token >= first + self.policy.sink_tokens  # a padded sequence has its sinks above already
            rows = call.state["rest"][:, : places.sinks + places.tail]
            if rows.shape[1]:
                found.append((rows, torch.cat([sink, tail], dim=1)[:, None, None]))
        if places.leaves > places.left:
            token = torch.arange(places.left, places.leaves, device=device)
            query = torch.arange(call.step.past_tokens, call.step.tokens, device=device)[:, None]
            found.append(
                (self._leaving(call, places), (token <= query - self.window) & (token >= first[..., None, None]))
            )
        return found

    def _leaving(self, call: Call, places: _Places) -> Tensor:
        """What leaves the window in this step, keys turned back: (batch, tokens, *row_shape)."""
        if "leaving" not in call.scratch:
            past = call.step.past_tokens
            old = torch.arange(places.left, min(past, places.leaves), device=call.q.device)
            new = slice(0, max(0, places.leaves - past))
            fresh = join(call.new_k[:, :, new], call.new_v[:, :, new])
            rows = torch.cat([call.state["local"][:, old % self.window], fresh], dim=1)
            token = torch.arange(places.left, places.leaves, device=call.q.device)[None]
            keys, _ = split(rows, rows.shape[1], call.shape.head_dim)
            keys.copy_(unrotate(keys, *_angles(call, token), pairs=call.pairs))
            call.scratch["leaving"] = rows
        return call.scratch["leaving"]

    def _far_query(self, call: Call) -> Tensor:
        """The queries as if at the window's far end: at one distance from every key that is not rotated."""
        if "far_query" not in call.scratch:
            step, first = call.step, call.first()[:, None]
            own = torch.arange(step.past_tokens, step.tokens, device=call.q.device)[None]
            end = (first + self.window - 1).clamp(max=step.tokens - 1)  # a shorter sequence has nothing outside
            plain = unrotate(call.q, *_angles(call, own), pairs=call.pairs)
            call.scratch["far_query"] = rotate(plain, *_angles(call, end), pairs=call.pairs)
        return call.scratch["far_query"]

    def _cached_rows(self, call: Call) -> Tensor:
        """Which tokens of the block cache are attended to: (batch, tokens), -1 for none."""
        size = self.policy.block_tokens
        within = torch.arange(size, device=call.q.device)
        ids, slots = call.scratch["ids"][..., None], call.state["chosen"][:, 0, 1, :, None]
        real = (ids >= 0) & (ids * size + within >= call.first()[:, None, None])
        return torch.where(real, slots * size + within, -1).flatten(1)

    def _store_sinks(self, call: Call, places: _Places) -> None:
        if call.seen is None and places.left >= places.sinks:
            return  # all there
        leaving, rest = self._leaving(call, places), call.state["rest"][:, : places.sinks]
        at = torch.arange(places.sinks, device=rest.device) + call.first()[:, None] - places.left
        inside = (at >= 0) & (at < leaving.shape[1])
        wide = (..., *(None,) * (rest.dim() - 2))
        rows = leaving.gather(1, at.clamp(0, leaving.shape[1] - 1)[wide].expand_as(rest))
        rest.copy_(torch.where(inside[wide], rows, rest))

    def _store_tail(self, call: Call, places: _Places) -> None:
        """Rows and masses that leave join the tail; blocks that it fills are left in `closing`, `closing_mass`."""
        past, sinks, size = call.step.past_tokens, self.policy.sink_tokens, self.policy.block_tokens
        old = torch.arange(places.left, min(past, places.leaves), device=call.q.device) % self.window
        new_mass = call.scratch["new_mass"][:, : max(0, places.leaves - past)]
        rows, mass = self._leaving(call, places), torch.cat([call.state["mass"][:, old], new_mass], dim=1)
        begins = max(places.left, sinks) - places.left  # sinks have their own rows
        closed = self.policy.blocks(call.step.tokens) - self.policy.blocks(past)
        for name, tail, leaving in (
            ("closing", call.state["rest"][:, sinks:], rows[:, begins:]),
            ("closing_mass", call.state["mass"][:, self.window :], mass[:, begins:]),
        ):
            stays, at = leaving, places.tail
            if closed:
                pending = torch.cat([tail[:, : places.tail], leaving], dim=1)
                call.scratch[name] = pending[:, : closed * size].unflatten(1, (closed, size)).contiguous()
                stays, at = pending[:, closed * size :], 0
            tail[:, at : at + stays.shape[1]] = stays


def _ids_down(call: Call) -> list[Piece]:
    return [(call.state["chosen_host"], call.state["chosen"])]


def _fetch(call: Call) -> list[Piece]:
    cached, blocks = call.state["cached"], call.state["blocks"]
    missed = [zip(*row.tolist(), strict=True) for row in call.state["chosen_host"][:, 0]]
    return [(cached[b, slot], blocks[b, block]) for b, row in enumerate(missed) for block, slot in row if block >= 0]


def _padded(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values, (0, 1))


def _angles(call: Call, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Angles of tokens (batch or 1, n), for all heads: (batch, 1, n, rotated dimensions)."""
    if call.rotary is None:
        raise RuntimeError("infllm needs the model's rotary angles, and none were handed over")
    cos, sin = call.rotary.at(tokens)
    return cos[:, None], sin[:, None]
