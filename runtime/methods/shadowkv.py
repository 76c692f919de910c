"""ShadowKV: keys rebuilt from a low-rank product, values fetched from host memory, chunk by chunk."""

import torch
from torch import Tensor

from policies import Policy, ShadowKV
from runtime.call import Call, Gather, Method, Piece, Route
from runtime.dense import append_raw, attend_raw
from runtime.kernels.append import append_row
from runtime.kernels.attention import Segment, attend_segments
from runtime.kernels.landmarks import chunk_means, outlier_chunks
from runtime.kernels.lowrank import BLOCK_TOKENS, decompose, rebuild_chunks
from runtime.kernels.scores import landmark_scores
from runtime.kernels.select import replace_ascending, token_ids, top_ids
from runtime.rotary import Rotary, unrotate


def method(policy: Policy) -> Method:
    """Keep `policy`'s chunks of the prompt by landmark, low-rank keys and values on the host.

    Chunks are cut from token 0 on, padding included. Padding counts for nothing: not for a landmark, not as an outlier,
    not as a choice; where a row has fewer real chunks than the budget, slots stay empty.
    """
    if not isinstance(policy, ShadowKV):
        raise TypeError(f"not a shadowkv policy: {policy!r}")
    own = _Kernels(policy)
    kernels = {
        "append": own.append,
        "decompose": _decompose,
        "landmark": own.landmark,
        "outliers": own.set_outliers_aside,
        "fill": own.fill,
        "score": own.score,
        "select": own.select,
        "rebuild": own.rebuild,
        "attend": own.attend,
    }
    routes: dict[str, Route] = {"offload_values": own.offload_values, "fetch": own.fetch}
    return Method(
        kernels=kernels,
        routes=routes,
        fused=frozenset({"aggregate"}),
        unrotates=True,
        any_padding=True,
        captured={"append": own.append_captured, "attend": own.attend_captured},
    )


class _Kernels:
    """The kernels that depend on the policy's parameters; nothing is kept from call to call."""

    def __init__(self, policy: ShadowKV) -> None:
        self.policy, self.chunk_tokens, self.exact_chunks = policy, policy.chunk_tokens, policy.exact_chunks

    def append(self, call: Call) -> None:
        if call.step.prefilling:
            append_raw(call)
            return
        row = self._exact_rows(call) - 1
        call.by_head("k_exact")[:, :, row : row + 1].copy_(call.new_k)
        call.by_head("v_exact")[:, :, row : row + 1].copy_(call.new_v)

    # -- the end of a prompt -------------------------------------------------------------------------------------

    def landmark(self, call: Call) -> None:
        keys, seen = self._indexed_keys(call)
        call.scratch["means"] = chunk_means(keys, self.chunk_tokens, seen)

    def set_outliers_aside(self, call: Call) -> None:
        keys, seen = self._indexed_keys(call)
        means, ids = call.scratch["means"], call.state["chunk_ids"]
        sinks = call.first_tokens(self.policy.sink_tokens) // self.chunk_tokens
        worst = outlier_chunks(keys, means, self.exact_chunks, seen, always=sinks)
        chunks = means.shape[2]
        others = means.new_ones((*means.shape[:2], chunks + 1), dtype=torch.bool)
        others = others.scatter_(2, torch.where(worst < 0, chunks, worst), False)[..., :chunks]
        if seen is not None:
            others &= seen.unflatten(2, (chunks, self.chunk_tokens)).any(dim=3)
        ids[..., : self.exact_chunks] = worst
        ids[..., self.exact_chunks :] = top_ids(torch.where(others, 0.0, -torch.inf), chunks - self.exact_chunks)
        call.by_head("landmarks").copy_(_rows(means, ids[..., self.exact_chunks :]))

    def fill(self, call: Call) -> None:
        """Exact rows, and in the slots the exact chunks that the last query of the prompt picks."""
        tail = torch.arange(self._indexed_tokens(call), call.step.tokens, device=call.q.device)
        outlier = token_ids(call.state["chunk_ids"][..., : self.exact_chunks], self.chunk_tokens)
        exact = torch.cat([outlier, tail.expand(*outlier.shape[:2], -1)], dim=2)
        picked = self._picked(call, self._scores(call, call.q[:, :, -1:]))
        call.state["slot_ids"].copy_(picked)
        slots = token_ids(picked, self.chunk_tokens)
        for raw, kept in (("raw_keys", "k"), ("raw_values", "v")):
            rows = call.by_head(raw)
            call.by_head(f"{kept}_exact")[:, :, : exact.shape[2]].copy_(_rows(rows, exact))
            call.by_head(f"{kept}_slots").flatten(2, 3).copy_(_rows(rows, slots))

    def offload_values(self, call: Call) -> list[Piece]:
        values = call.by_head("raw_values")[:, :, : self._indexed_tokens(call)]
        return [(call.by_head("values_host"), values.unflatten(2, (-1, self.chunk_tokens)))]

    # -- decode: nothing here waits for the GPU ------------------------------------------------------------------

    def score(self, call: Call) -> None:
        call.scratch["scores"] = self._scores(call, call.q)

    def select(self, call: Call) -> None:
        picked = self._picked(call, call.scratch["scores"])
        missed, slots, n_missed = replace_ascending(call.state["slot_ids"], picked)
        call.scratch["missed"], call.scratch["slots"], call.counts["miss"] = missed, slots, n_missed

    def fetch(self, call: Call) -> list[Gather]:
        values, slots = call.by_head("values_host").flatten(3), call.by_head("v_slots").flatten(3)
        return [Gather(values, call.scratch["missed"], slots, call.scratch["slots"])]

    def rebuild(self, call: Call) -> None:
        rebuild_chunks(
            call.state["u"],
            call.state["sv"],
            _rotary(call).table,
            call.scratch["missed"],
            call.by_head("k_slots").flatten(3),
            call.scratch["slots"],
            chunk_tokens=self.chunk_tokens,
            pairs=call.pairs,
        )

    def attend(self, call: Call) -> None:
        if call.step.prefilling:
            attend_raw(call)
            return
        rows = self._exact_rows(call)
        self._attend(call, call.by_head("k_exact")[:, :, :rows], call.by_head("v_exact")[:, :, :rows], None)

    def append_captured(self, call: Call) -> None:
        row = call.rows(self._exact_ahead(call))
        append_row(call.by_head("k_exact"), call.by_head("v_exact"), call.new_k, call.new_v, row)

    def attend_captured(self, call: Call) -> None:
        held = call.rows(self._exact_ahead(call) + 1)
        self._attend(call, call.by_head("k_exact"), call.by_head("v_exact"), held)

    def _attend(self, call: Call, k_exact: Tensor, v_exact: Tensor, held: Tensor | None) -> None:
        exact_mask, slots_mask = self._masks(call)
        k_slots, v_slots = (call.by_head(name).flatten(2, 3) for name in ("k_slots", "v_slots"))
        segments = [Segment(k_exact, v_exact, exact_mask, held), Segment(k_slots, v_slots, slots_mask)]
        call.out = attend_segments(call.q, segments, scale=call.scale, softcap=call.softcap, sink_logits=call.sinks)

    # ------------------------------------------------------------------------------------------------------------

    def _indexed_tokens(self, call: Call) -> int:
        return self.policy.chunks(call.step.prompt_tokens) * self.chunk_tokens

    def _exact_rows(self, call: Call) -> int:
        """Exact rows of a head once this step's token is among them: exact chunks, then what follows all chunks."""
        return self._exact_ahead(call) + call.step.tokens

    def _exact_ahead(self, call: Call) -> int:
        """By how many exact rows of a head outnumber the tokens of the sequence; less than none as a rule."""
        return self.exact_chunks * self.chunk_tokens - self._indexed_tokens(call)

    def _indexed_keys(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """Rotated keys of all chunks, and which of their tokens are no padding: (batch, 1, tokens)."""
        tokens, seen = self._indexed_tokens(call), call.seen
        keys = call.by_head("raw_keys")[:, :, :tokens]
        return keys, None if seen is None else seen[:, None, :tokens]

    def _scores(self, call: Call, q: Tensor) -> Tensor:
        """Softmax over the landmarks, then the largest of a group's heads; chunks of padding score -inf."""
        valid = None if call.mask is None else call.state["chunk_ids"][..., self.exact_chunks :] >= 0
        return landmark_scores(q, call.by_head("landmarks"), scale=call.scale, valid=valid)

    def _picked(self, call: Call, scores: Tensor) -> Tensor:
        """Ids of the best chunks, ascending; -1 where there are too few."""
        return top_ids(scores, self.policy.budget_chunks, call.state["chunk_ids"][..., self.exact_chunks :])

    def _masks(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        """Which exact rows and which rows of slots may be attended to: (batch, kv_heads, 1, rows); None for all."""
        seen = call.seen
        if seen is None:
            return None, None
        outlier = token_ids(call.state["chunk_ids"][..., : self.exact_chunks], self.chunk_tokens)
        slots = token_ids(call.state["slot_ids"], self.chunk_tokens)
        tail = seen[:, None, self._indexed_tokens(call) :].expand(-1, outlier.shape[1], -1)
        exact = torch.cat([_real(seen, outlier), tail], dim=2)
        return exact[:, :, None], _real(seen, slots)[:, :, None]


def _decompose(call: Call) -> None:
    """The keys before their rotation as a product of rank `sv.shape[2]`; padding is left out as zeros."""
    keys, rotary, seen = call.by_head("raw_keys"), _rotary(call), call.seen
    before = torch.empty_like(keys)
    for first in range(0, keys.shape[2], BLOCK_TOKENS):
        tokens = torch.arange(first, min(first + BLOCK_TOKENS, keys.shape[2]), device=keys.device)
        cos, sin = rotary.at(tokens[None])
        before[:, :, tokens] = unrotate(keys[:, :, tokens], cos[:, None], sin[:, None], pairs=call.pairs)
    if seen is not None:
        before.masked_fill_(~seen[:, None, :, None], 0)
    u, sv = decompose(before, call.state["sv"].shape[2])
    call.state["u"].copy_(u)
    call.state["sv"].copy_(sv)


def _rotary(call: Call) -> Rotary:
    if call.rotary is None:
        raise RuntimeError("shadowkv needs the angles of its tokens, and the cache has handed over none")
    return call.rotary


def _rows(of: Tensor, ids: Tensor) -> Tensor:
    """`of[b, h, ids[b, h, i]]`: (batch, kv_heads, n, width); for id -1 any row."""
    return of.gather(2, ids.clamp(min=0)[..., None].expand(-1, -1, -1, of.shape[3]))


def _real(seen: Tensor, tokens: Tensor) -> Tensor:
    """Which of the tokens (batch, kv_heads, n) exist and are no padding, given `seen` (batch, tokens)."""
    there = seen[:, None].expand(-1, tokens.shape[1], -1).gather(2, tokens.clamp(min=0))
    return there & (tokens >= 0)
