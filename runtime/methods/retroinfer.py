"""RetroInfer: clusters in host memory; the best are read through a cache of blocks, the next estimated from means."""

import torch
from torch import Tensor

from policies import Policy, RetroInfer, Step
from policies.retroinfer_index import Clusters
from runtime.call import Call, Gather, Method, Piece
from runtime.dense import append_raw, attend_raw
from runtime.index.segments import Directions, Grouped, directions, grouped, nearest
from runtime.kernels.append import append_row
from runtime.kernels.attention import merge, partial_attention, partial_attention_at
from runtime.kernels.estimate import estimated_attention
from runtime.kernels.residency import take_slots
from runtime.kernels.scores import landmark_scores
from runtime.kernels.select import NONE, chosen_first, top_ids


def method(policy: Policy) -> Method:
    """Cluster the prompt's keys, and generated ones as they gather; read the best clusters, estimate the next.

    Sinks are the first real tokens of a row, wherever they stand. Padding is in no cluster: its rows lie behind those
    of all clusters that were made with them.
    """
    if not isinstance(policy, RetroInfer):
        raise TypeError(f"not a retroinfer policy: {policy!r}")
    near, building, reading = _Near(policy), _Building(policy), _Reading(policy)
    return Method(
        kernels={
            "append": near.append,
            "set_aside": near.set_aside,
            "cluster": building.cluster,
            "assign": building.assign,
            "sum_values": building.sum_values,
            "arrange": building.arrange,
            "score": reading.score,
            "select": reading.select,
            "estimate": reading.estimate,
            "attend": lambda call: _attend(call, near, reading),
        },
        routes={"offload": building.offload, "fetch": reading.fetch},
        fused=frozenset({"aggregate"}),
        captured={"append": near.append_captured} if policy.update_tokens > 1 else None,
        captured_tokens=policy.update_tokens - 1,  # then the ring comes round and the index grows
    )


def _searched(policy: RetroInfer, call: Call) -> Clusters:
    """The clusters that a step searches; a captured one comes before generated tokens are first clustered."""
    return policy.index(call.step if call.lengths is None else Step.decoding(call.step.prompt_tokens, 1))


def _attend(call: Call, near: "_Near", reading: "_Reading") -> None:
    """One softmax over the exact rows, the blocks that were read and the clusters that are estimated."""
    if call.step.prefilling:
        attend_raw(call)
        return
    if not _searched(reading.policy, call).estimated:  # the plan has no such operation, but what did not fit counts
        reading.estimate(call)
    estimated = call.state["estimated"][:, 0, :, None]
    parts = [near.partial(call), reading.partial(call), (estimated[..., :-1], estimated[..., -1])]
    call.out = merge(parts, sink_logits=call.sinks).to(call.q.dtype)


class _Near:
    """The exact rows: the sinks, then a ring of the window and what was generated since tokens were last clustered."""

    def __init__(self, policy: RetroInfer) -> None:
        self.policy, self.sinks, self.window = policy, policy.sink_tokens, policy.window_tokens
        self.ring = policy.window_tokens + policy.update_tokens

    def append(self, call: Call) -> None:
        if call.step.prefilling:
            append_raw(call)
            return
        row = self.sinks + (self.window + call.step.generated_tokens - 1) % self.ring
        call.by_head("k_exact")[:, :, row : row + 1].copy_(call.new_k)
        call.by_head("v_exact")[:, :, row : row + 1].copy_(call.new_v)

    def append_captured(self, call: Call) -> None:
        row = call.rows(self._ahead(call))
        append_row(call.by_head("k_exact"), call.by_head("v_exact"), call.new_k, call.new_v, row)

    def set_aside(self, call: Call) -> None:
        prompt = call.step.prompt_tokens
        sinks = call.first_tokens(self.sinks).clamp(min=0)[:, None, :, None]
        for raw, kept in (("raw_keys", "k_exact"), ("raw_values", "v_exact")):
            rows, exact = call.by_head(raw), call.by_head(kept)
            exact[:, :, : self.sinks] = rows.gather(2, sinks.expand(-1, rows.shape[1], -1, rows.shape[3]))
            exact[:, :, self.sinks : self.sinks + self.window] = rows[:, :, prompt - self.window : prompt]

    def partial(self, call: Call) -> tuple[Tensor, Tensor]:
        """Attention to the exact rows, each token once."""
        keys, values = (call.by_head(name) for name in ("k_exact", "v_exact"))
        if call.lengths is None:
            held = min(self.ring, self.window + call.step.generated_tokens)
            keys, values = keys[:, :, : self.sinks + held], values[:, :, : self.sinks + held]
            mask = self._mask(call, held)
        else:
            mask = self._mask_captured(call, keys.shape[2])
        return partial_attention(call.q, keys, values, scale=call.scale, mask=mask, softcap=call.softcap)

    def oldest(self, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values of the tokens that leave the ring, in their order, and which of them are to be clustered."""
        first = self._clustered(call)
        rows = self.sinks + (first + torch.arange(self.policy.update_tokens, device=call.q.device)) % self.ring
        tokens = call.step.prompt_tokens - self.window + first + torch.arange(len(rows), device=call.q.device)
        keys, values = (call.by_head(name).index_select(2, rows) for name in ("k_exact", "v_exact"))
        return keys, values, self.live(call, tokens)

    def live(self, call: Call, tokens: Tensor) -> Tensor | None:
        """Which of the tokens (n,) are neither padding nor sinks: bool (batch, n); None where all are."""
        if call.seen is None:
            return None
        first = (call.first() + self.sinks).clamp(max=call.step.prompt_tokens)
        return tokens >= first[:, None]

    def _mask(self, call: Call, held: int) -> Tensor | None:
        """Which of the sinks and of `held` rows of the ring may be attended to: (batch, 1, 1, rows); None for all."""
        gathered, first = self.window + call.step.generated_tokens, self._clustered(call)
        if call.seen is None and not first:
            return None
        age = (torch.arange(held, device=call.q.device) - first) % self.ring  # since the oldest that is not clustered
        tokens = call.step.prompt_tokens - self.window + first + age
        return self._with_sinks(call, tokens, (age < gathered - first)[None])

    def _mask_captured(self, call: Call, rows: int) -> Tensor:
        """The same of all rows that there are, in a step that knows no length and comes before any is clustered."""
        row = torch.arange(self.sinks, rows, device=call.q.device)
        held = row[None] < call.rows(self._ahead(call) + 1)
        return self._with_sinks(call, row - self._ahead(call), held)

    def _with_sinks(self, call: Call, tokens: Tensor, there: Tensor) -> Tensor:
        """The sinks, and of the ring's rows, which have these tokens, those that are there and no padding."""
        live = self.live(call, tokens)
        there = (there if live is None else there & live).expand(len(call.q), -1)
        return torch.cat([call.first_tokens(self.sinks) >= 0, there], dim=1)[:, None, None]

    def _ahead(self, call: Call) -> int:
        """By how many rows the exact ones outnumber the tokens of the sequence, until any are clustered."""
        return self.sinks + self.window - call.step.prompt_tokens

    def _clustered(self, call: Call) -> int:
        """Tokens since the prompt's window that earlier steps have clustered."""
        return self.policy.update_tokens * self.policy.updates_before(call.step)


class _Building:
    """The clusters of a prompt, and of the tokens that leave the ring: keys and values in their order for the host."""

    def __init__(self, policy: RetroInfer) -> None:
        self.policy, self.near = policy, _Near(policy)

    def cluster(self, call: Call) -> None:
        """All rounds but the last, within segments, on the keys less their mean."""
        keys, values, live = self._leaving(call)
        index = self._added(call)
        centred = keys.float()
        if live is None:
            centred = centred - centred.mean(dim=2, keepdim=True)
        else:
            dead = ~live[:, None, :, None]
            total = centred.masked_fill(dead, 0).sum(dim=2, keepdim=True)
            centred = (centred - total / live.sum(dim=1).clamp(min=1)[:, None, None, None]).masked_fill(dead, 0)
        rounds = self.policy.kmeans_iterations - 1
        found = directions(centred, live, index.clusters, index.segment_clusters, rounds)
        call.scratch |= {"keys": keys, "values": values, "centred": centred, "units": found.units}
        call.scratch |= {name: x for name, x in (("live", live), ("filled", found.filled)) if x is not None}

    def assign(self, call: Call) -> None:
        """The last round: each key to the nearest of all clusters, whose mean key is kept as it is."""
        live, filled = call.scratch.get("live"), call.scratch.get("filled")
        members = nearest(call.scratch["centred"], live, Directions(call.scratch["units"], filled))
        groups = grouped(members, call.scratch["units"].shape[2])
        at = self._clusters(call)
        means = groups.sums(call.scratch["keys"]) / groups.sizes.clamp(min=1)[..., None]
        call.by_head("centroids")[:, :, at] = means.to(call.state["centroids"].dtype)
        call.state["sizes"][:, :, at] = groups.sizes.int()
        call.state["starts"][:, :, at] = (self._rows_before(call) + groups.sizes.cumsum(dim=-1) - groups.sizes).int()
        call.scratch |= {"order": groups.order, "members": groups.sizes}

    def sum_values(self, call: Call) -> None:
        sums = Grouped(call.scratch["order"], call.scratch["members"]).sums(call.scratch["values"])
        call.by_head("value_sums")[:, :, self._clusters(call)] = sums.to(call.state["value_sums"].dtype)

    def arrange(self, call: Call) -> None:
        staged, order = self._staged(call), call.scratch["order"][..., None]
        dim = call.shape.head_dim
        for part, at in (("keys", slice(dim)), ("values", slice(dim, None))):
            rows = call.scratch[part]
            staged[..., at] = rows.gather(2, order.expand_as(rows))

    def offload(self, call: Call) -> list[Piece]:
        staged, first = self._staged(call), self._rows_before(call)
        host = call.by_head("clusters").flatten(3)[:, :, first : first + staged.shape[2]]
        return [(host[b, h], staged[b, h]) for b in range(len(staged)) for h in range(staged.shape[1])]

    def _leaving(self, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
        if not call.step.prefilling:
            return self.near.oldest(call)
        at = slice(self.near.sinks, call.step.prompt_tokens - self.near.window)
        keys, values = (call.by_head(name)[:, :, at] for name in ("raw_keys", "raw_values"))
        return keys, values, self.near.live(call, torch.arange(at.start, at.stop, device=keys.device))

    def _added(self, call: Call) -> Clusters:
        """The index that this step makes: the prompt's, or that of what leaves the ring."""
        if call.step.prefilling:
            return self.policy.index(call.step)
        added = self.policy.update_tokens // self.policy.cluster_tokens
        return Clusters(self.policy.update_tokens, added, added)

    def _clusters(self, call: Call) -> slice:
        """Which clusters it has among all of a head."""
        before = 0 if call.step.prefilling else self.policy.index(call.step).clusters
        return slice(before, before + self._added(call).clusters)

    def _rows_before(self, call: Call) -> int:
        return 0 if call.step.prefilling else self.policy.index(call.step).tokens

    def _staged(self, call: Call) -> Tensor:
        """(batch, kv_heads, tokens, head_dim + v_head_dim)."""
        return call.by_head("arranged" if call.step.prefilling else "leaving").flatten(3)


class _Reading:
    """What a step reads: clusters by rank, through the cache of blocks; nothing here waits for the device."""

    def __init__(self, policy: RetroInfer) -> None:
        self.policy, self.block = policy, policy.block_tokens

    def score(self, call: Call) -> None:
        """Softmax over the mean keys of all clusters, summed over a group's heads; empty clusters score -inf."""
        clusters = _searched(self.policy, call).clusters
        scores = landmark_scores(
            call.q,
            call.by_head("centroids")[:, :, :clusters],
            scale=call.scale,
            reduce="sum",
            valid=call.state["sizes"][..., :clusters] > 0,
            softcap=call.softcap,
        )
        call.state["head_scores"].copy_(scores)

    def select(self, call: Call) -> None:
        """The best clusters as blocks, as many as fit in rank order, and the slots that these take; then the next."""
        index, scores = _searched(self.policy, call), call.state["head_scores"]
        best = _by_rank(top_ids(scores, index.retrieved), scores)
        next_best = top_ids(-chosen_first(-scores, best), index.estimated)  # the best are last then, at -inf
        at = best.clamp(min=0)
        sizes, starts = (call.state[name].gather(2, at).long() for name in ("sizes", "starts"))
        blocks = ((sizes + self.block - 1) // self.block).masked_fill(best < 0, 0)
        room, ends = self.policy.slots(index), blocks.cumsum(dim=-1)
        fits = ends <= room
        read = (blocks * fits).sum(dim=-1)
        number = torch.arange(room, device=scores.device).expand(*read.shape, -1)
        rank = torch.searchsorted(ends, number.contiguous(), right=True).clamp(max=index.retrieved - 1)
        within = (number - (ends - blocks).gather(2, rank)) * self.block
        wanted = torch.where(number < read[..., None], starts.gather(2, rank) + within, NONE)
        missed, slots = take_slots(call.by_head("resident"), wanted)
        chosen = call.by_head("chosen")
        chosen[..., 0] = torch.where(missed, wanted, NONE)
        chosen[..., 1] = slots
        chosen[..., 2] = (sizes.gather(2, rank) - within).clamp(max=self.block)
        call.scratch["estimated_ids"] = torch.cat([next_best, torch.where(fits, NONE, best)], dim=-1)
        call.counts |= {"read": read, "miss": missed.sum(dim=-1)}

    def fetch(self, call: Call) -> list[Gather]:
        """A block is as many rows of the host as it has tokens, from any row on."""
        host, chosen = call.by_head("clusters").flatten(3), call.by_head("chosen")
        width = host.shape[3]
        rows = host.as_strided((*host.shape[:2], host.shape[2] - self.block + 1, self.block * width), host.stride())
        return [Gather(rows, chosen[..., 0], call.by_head("cached").flatten(3), chosen[..., 1])]

    def estimate(self, call: Call) -> None:
        out, lse = estimated_attention(
            call.q,
            call.by_head("centroids"),
            call.by_head("value_sums"),
            call.state["sizes"],
            call.scratch["estimated_ids"],
            scale=call.scale,
            softcap=call.softcap,
        )
        call.state["estimated"][:, 0, :, :-1] = out[:, :, 0]
        call.state["estimated"][:, 0, :, -1:] = lse

    def partial(self, call: Call) -> tuple[Tensor, Tensor]:
        """Exact attention to the blocks, where they lie in the cache."""
        rows, chosen = call.by_head("cached").flatten(4).flatten(2, 3), call.by_head("chosen")
        within = torch.arange(self.block, device=rows.device)
        slots, tokens = chosen[..., 1, None], chosen[..., 2, None]
        ids = torch.where((slots >= 0) & (within < tokens), slots * self.block + within, NONE).flatten(2)
        keys, values = rows[..., : call.shape.head_dim], rows[..., call.shape.head_dim :]
        return partial_attention_at(call.q, keys, values, ids, scale=call.scale, softcap=call.softcap)


def _by_rank(ids: Tensor, scores: Tensor) -> Tensor:
    """Ids with the best score first, equal scores in the order of ids, -1 last."""
    of = scores.gather(2, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)
    return ids.gather(2, of.argsort(dim=-1, descending=True, stable=True))
