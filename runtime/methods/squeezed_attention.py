"""Squeezed Attention: a fixed prefix's keys in clusters, of which a query reads those that matter to it."""

from collections.abc import Iterator, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from policies import Policy, SqueezedAttention
from runtime.call import Call, Gather, Method, Piece
from runtime.dense import attend
from runtime.index.clusters import kmeans
from runtime.kernels.append import append_row
from runtime.kernels.attention import Segment, attend_segments, merge, partial_attention, partial_attention_at
from runtime.kernels.scores import centroid_scores
from runtime.kernels.select import top_ids, true_ids

PREFIX = {"fine": "", "coarse": "coarse_"}  # of a level's buffers


def method(policy: Policy) -> Method:
    """Cluster the prompt without sinks and observation window, read the keys above the threshold and all exact rows.

    Sinks are the first real tokens of a row. Key i of an index is the token `sink_tokens` + i; in a row that is padded
    by n tokens, the first n are padding or among the sinks, and in no cluster.
    """
    if not isinstance(policy, SqueezedAttention):
        raise TypeError(f"not a squeezed-attention policy: {policy!r}")
    building, looking_up = _building(policy), _looking_up(policy)
    return Method(
        kernels={**building.kernels, **looking_up.kernels},
        routes={**building.routes, **looking_up.routes},
        ends=building.ends,
        may_be_infinite=frozenset(("thresholds",)),  # -inf where all may pass
        captured=looking_up.captured,
    )


def _building(policy: SqueezedAttention) -> Method:
    """What a prompt needs: the clusters of its keys, thresholds from its last queries."""
    window, sinks, levels = policy.observation_tokens, policy.sink_tokens, policy.calibrated
    rounds = policy.kmeans_iterations - 1  # kmeans assigns once more than it has rounds
    keeps = {"fine": policy.keep, "coarse": policy.coarse_keep}

    def keep_queries(call: Call) -> None:
        tokens = torch.arange(max(call.step.past_tokens, call.step.tokens - window), call.step.tokens)
        queries = call.q[:, :, -len(tokens) :].transpose(1, 2)
        call.state["observed"][:, (tokens % window).to(queries.device)] = queries

    def cluster(call: Call) -> None:
        keys = _split(call, call.by_head("kv")[:, :, sinks : call.step.prompt_tokens - window])[0]
        ones = torch.ones(keys.shape[1:3], device=keys.device)
        for row, first in enumerate(_first_tokens(call)):
            _cluster(call, row, "fine", keys[row, :, first:].float(), ones[:, first:], rounds)

    def cluster_coarse(call: Call) -> None:
        for row, sizes in enumerate(call.state["sizes"]):
            _cluster(call, row, "coarse", call.by_head("centroids")[row].float(), sizes.float(), rounds)

    def calibrate(call: Call) -> None:
        last = torch.arange(call.step.prompt_tokens - window, call.step.prompt_tokens, device=call.q.device)
        queries = call.q[:, :, -window:]
        if "observed" in call.state and not call.step.whole_prompt:
            queries = call.state["observed"][:, last % window].transpose(1, 2)
        counted = None if call.seen is None else call.seen[:, last]
        scores = [_scores(policy, call, level, queries=queries, counted=counted) for level in levels]
        call.state["calibrated"].copy_(torch.cat(scores, dim=-1))

    def threshold(calls: Sequence[Call]) -> None:
        start = 0
        for index, level in enumerate(levels):
            sizes = [call.state[f"{PREFIX[level]}sizes"] for call in calls]
            end = start + sizes[0].shape[-1]
            scores = [call.state["calibrated"][..., start:end] for call in calls]
            pooled = [torch.cat([part.flatten(1) for part in parts], dim=1) for parts in (scores, sizes)]
            start = end
            for call in calls:
                call.state["thresholds"][:, index, 0] = _quantile(pooled[0], pooled[1].long(), keeps[level])

    def set_aside(call: Call) -> None:
        rows, exact = call.by_head("kv")[:, :, : call.step.prompt_tokens], call.by_head("exact")
        at = call.first_tokens(sinks).clamp(min=0)[:, None].expand(-1, rows.shape[1], -1)
        exact.flatten(3)[:, :, :sinks] = rows.flatten(3).gather(
            2, at[..., None].expand(-1, -1, -1, rows[0, 0, 0].numel())
        )
        exact[:, :, sinks : sinks + window] = rows[:, :, -window:]

    def offload(call: Call) -> list[Piece]:
        raw, prefix = call.by_head("kv"), call.by_head("prefix")
        rows = slice(sinks, sinks + prefix.shape[2])
        return [(prefix[b, h], raw[b, h, rows]) for b in range(len(raw)) for h in range(raw.shape[1])]

    return Method(
        kernels={
            "keep_queries": keep_queries,
            "cluster": cluster,
            "cluster_coarse": cluster_coarse,
            "calibrate": calibrate,
            "set_aside": set_aside,
        },
        routes={"offload": offload},
        ends={"threshold": threshold},
    )


def _looking_up(policy: SqueezedAttention) -> Method:
    """What every step needs: the new rows stored, clusters scored, keys chosen, fetched and attended to."""
    window, levels, in_host = policy.observation_tokens, policy.calibrated, policy.tier == "ddr"
    sinks, budget = policy.sink_tokens, policy.budget_tokens

    def append(call: Call) -> None:
        step, decoding = call.step, not call.step.prefilling
        name = "exact" if in_host and decoding else "kv"
        first = sinks + window + step.generated_tokens - 1 if name == "exact" else step.past_tokens
        keys, values = _split(call, call.by_head(name)[:, :, first : first + step.new_tokens])
        keys.copy_(call.new_k)
        values.copy_(call.new_v)

    def append_captured(call: Call) -> None:
        name, ahead = ("exact", sinks + window - call.step.prompt_tokens) if in_host else ("kv", 0)
        append_row(*_split(call, call.by_head(name)), call.new_k, call.new_v, call.rows(ahead))

    def attend_captured(call: Call) -> None:
        rows = call.by_head("exact" if in_host else "kv")
        call.out = _attend_chosen(policy, call, rows.shape[2], call.rows(1))

    def score_coarse(call: Call) -> None:
        passed = _scores(policy, call, "coarse") > call.state["thresholds"][:, levels.index("coarse"), :, None]
        labels = call.state["coarse_labels"]
        survive = passed.gather(2, labels.clamp(min=0).long()) & (labels >= 0)
        call.scratch["survive"], call.counts["survive"] = survive, survive.sum(dim=-1)

    def score(call: Call) -> None:
        call.state["scores"].copy_(_scores(policy, call, "fine", among=call.scratch.get("survive")))

    def select(call: Call) -> None:
        labels = call.state["labels"]
        scores = call.state["scores"].gather(2, labels.clamp(min=0).long()).masked_fill(labels < 0, -torch.inf)
        if budget is None:
            passed = scores > call.state["thresholds"][:, levels.index("fine"), :, None]
            call.counts["keep"] = passed.sum(dim=-1)
            chosen = true_ids(passed)
        else:
            chosen = top_ids(scores, min(budget, scores.shape[-1]))
        call.by_head("chosen").copy_(chosen[..., None])

    def fetch(call: Call) -> Iterator[Gather]:
        """As many chosen rows at a time as can be staged; each wave is attended to before the next one comes."""
        chosen, staged = call.by_head("chosen")[..., 0], call.by_head("staged")
        slots = torch.arange(staged.shape[2], device=chosen.device).expand(*chosen.shape[:2], -1)
        waves = []
        for ids in chosen.split(staged.shape[2], dim=2):
            at = slots[:, :, : ids.shape[2]]
            # A fixed budget moves its rows even where a padded sequence has fewer keys.
            asked = ids if budget is None else ids.clamp(min=0)
            yield Gather(call.by_head("prefix").flatten(3), asked, staged.flatten(3), at)
            waves.append(_attend_at(call, staged, torch.where(ids < 0, -1, at)))
        call.scratch["far"], call.scratch["far_lse"] = (torch.stack(parts) for parts in zip(*waves, strict=True))

    def attend_all(call: Call) -> None:
        if call.step.prefilling:
            call.out = attend(call, *_split(call, call.by_head("kv")[:, :, : call.step.tokens]), call.mask)
        else:
            end = call.step.prompt_tokens - window
            rows = sinks + call.step.tokens - end if in_host else call.step.tokens
            call.out = _attend_chosen(policy, call, rows, None)

    return Method(
        kernels={
            "append": append,
            "score_coarse": score_coarse,
            "score": score,
            "select": select,
            "attend": attend_all,
        },
        routes={"fetch": fetch},
        captured={"append": append_captured, "attend": attend_captured},
    )


def _attend_chosen(policy: SqueezedAttention, call: Call, rows: int, tokens: Tensor | None) -> Tensor:
    """Attention to the chosen keys, the sinks, the window and what was generated, each once.

    Of the exact rows the first `rows` of a head are looked at, and of them those that `tokens` tokens fill; None: all.
    """
    sinks, end = policy.sink_tokens, call.step.prompt_tokens - policy.observation_tokens
    first = call.first_tokens(sinks)
    first = torch.where(first < end, first, -1)  # those of a short row are in the window
    seen = None if call.seen is None else call.seen[:, end:]
    if policy.tier == "ddr":
        exact = call.by_head("exact")[:, :, :rows]
        seen = None if seen is None else torch.cat([first >= 0, seen], dim=1)[:, :rows]
        held = None if tokens is None else tokens + (sinks - end)
        far = zip(call.scratch["far"], call.scratch["far_lse"], strict=True)
        mask = None if seen is None else seen[:, None, None]
        if held is not None:
            there = torch.arange(rows, device=held.device) < held
            mask = there if mask is None else mask & there
        near = partial_attention(call.q, *_split(call, exact), scale=call.scale, mask=mask, softcap=call.softcap)
        return merge([near, *far], sink_logits=call.sinks).to(call.q.dtype)
    kv, chosen = call.by_head("kv"), call.by_head("chosen")[..., 0]
    ids = [first[:, None].expand(-1, chosen.shape[1], -1), torch.where(chosen < 0, -1, chosen + sinks)]
    mask = None if seen is None else seen[:, None, None, : rows - end]
    segments = [
        Segment(*_split(call, kv[:, :, end:rows]), mask, None if tokens is None else tokens - end),
        Segment(*_split(call, kv), ids=torch.cat(ids, dim=2)),
    ]
    return attend_segments(call.q, segments, scale=call.scale, softcap=call.softcap, sink_logits=call.sinks)


def _split(call: Call, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of rows (batch, kv_heads, tokens, *row_shape), as views."""
    flat = rows.flatten(3)
    return flat[..., : call.shape.head_dim], flat[..., call.shape.head_dim :]


def _attend_at(call: Call, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return partial_attention_at(call.q, *_split(call, rows), ids, scale=call.scale, softcap=call.softcap)


def _first_tokens(call: Call) -> list[int]:
    """The first real token of each row; waits for the device where there is padding."""
    return [0] * len(call.q) if call.seen is None else [int(first) for first in call.first()]


def _cluster(call: Call, row: int, level: str, points: Tensor, weights: Tensor, rounds: int) -> None:
    """Cluster the directions of points (kv_heads, n, head_dim), the last of the level, into its buffers.

    A centroid is the mean of its members as they are, by weights (kv_heads, n): the mean of original keys on either
    level. Points of no weight and those before have no label.
    """
    labels, sizes = (call.state[f"{PREFIX[level]}{name}"][row] for name in ("labels", "sizes"))
    centroids = call.by_head(f"{PREFIX[level]}centroids")[row]
    n, lists = points.shape[1], centroids.shape[1]
    labels.fill_(-1)
    sums = torch.zeros(centroids.shape, device=points.device)
    counts = torch.zeros(sizes.shape, device=points.device, dtype=torch.float64)  # exact beyond 2**24 keys
    if n:
        directions = torch.nn.functional.normalize(points, dim=-1)
        members = kmeans(directions, min(lists, n), rounds=rounds, seed=0).members
        labels[:, -n:] = torch.where(weights > 0, members, -1)
        sums.scatter_add_(1, members[..., None].expand_as(points), points * weights[..., None])
        counts.scatter_add_(1, members, weights.double())
    centroids.copy_(sums / counts.clamp(min=1)[..., None])
    sizes.copy_(counts)


def _scores(
    policy: SqueezedAttention,
    call: Call,
    level: str,
    *,
    queries: Tensor | None = None,
    counted: Tensor | None = None,
    among: Tensor | None = None,
) -> Tensor:
    """Log scores of a level's clusters, or of those `among` it, which then share all weight."""
    sizes = call.state[f"{PREFIX[level]}sizes"]
    return centroid_scores(
        call.q if queries is None else queries,
        call.by_head(f"{PREFIX[level]}centroids"),
        sizes if among is None else sizes.masked_fill(~among, 0),
        scale=call.scale,
        softcap=call.softcap,
        counted=counted,
        group_score="max" if policy.group_score == "max" else "mean",
    )


def _quantile(scores: Tensor, weights: Tensor, share: float) -> Tensor:
    """The least threshold that at most `share` of all keys exceed: (batch,); -inf when all may pass.

    scores and weights (batch, n): as many keys as the weight says have the score.
    """
    exact = Fraction(str(share))
    ordered, order = scores.sort(dim=1, descending=True)
    passing = weights.gather(1, order).cumsum(dim=1)
    most = (2 * passing[:, -1:] * exact.numerator + exact.denominator) // (2 * exact.denominator)  # as `part_of`
    beyond = passing > most
    least = ordered.gather(1, beyond.int().argmax(dim=1, keepdim=True))
    return torch.where(beyond.any(dim=1), least[:, 0], -torch.inf)
