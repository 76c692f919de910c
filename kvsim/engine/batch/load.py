"""What an iteration computes: rows of amounts, one for each structure of sequences that decode and of prompts."""

from typing import NamedTuple

from kvsim.engine.batch.decoding import target_tokens
from kvsim.engine.batch.plans import PREFILL, amounts, find
from kvsim.engine.state.cluster import COUNT, DECODING, NO_QUOTA, NOBODY, PREFILLING, PROMPTS, VECTOR, Cluster, Ints


class Scheduled(NamedTuple):
    """What an iteration, or one of its micro-batches, computes."""

    loads: Ints  # (loads, columns): rows of the state, good until others are scheduled
    tokens: int  # new ones
    logits: int  # rows of the head


def first_load(cluster: Cluster) -> int:
    """The row of a batch's first load."""
    return PROMPTS + int(cluster.sums.shape[1])


def prompt_tokens(cluster: Cluster, number: int) -> int:
    """Tokens of prompts in an iteration."""
    tokens, index = 0, cluster.replicas[number]["first"][PREFILLING]
    while index != NOBODY:
        tokens += cluster.requests[index]["chunk_tokens"]
        index = cluster.requests[index]["after"]
    return int(tokens)


def share_of(total: int, part: int, parts: int) -> int:
    """How many of a total the first `part` of so many equal parts have."""
    return total * part // parts


def scheduled(cluster: Cluster, number: int, part: int, parts: int) -> Scheduled:
    """One of so many equal parts of what a replica's iteration computes. May make detours.

    Equal parts have as many sequences that decode and as many tokens of prompts as each other, but for one. Loads
    stand in the order of their structures, decode before prefill, so that equal batches take equal times whatever
    happened before.
    """
    replica, rows, plans = cluster.replicas[number], cluster.rows, cluster.plans
    n_structures, decoding = cluster.sums.shape[1], replica["length"][DECODING]
    tokens = (share_of(decoding, part + 1, parts) - share_of(decoding, part, parts)) * cluster.world["step_tokens"]
    logits, before, low, high = tokens, 0, 0, NO_QUOTA
    if parts > 1:
        chunks = prompt_tokens(cluster, number)
        low, high = share_of(chunks, part, parts), share_of(chunks, part + 1, parts)
    for structure in range(n_structures):
        for i in range(rows.shape[1]):
            rows[PROMPTS + structure, i] = 0
    index = replica["first"][PREFILLING]
    while index != NOBODY:
        request = cluster.requests[index]
        chunk, past = request["chunk_tokens"], request["past_tokens"]
        begin, end = max(0, low - before), min(chunk, high - before)
        before += chunk
        if end > begin:
            target = target_tokens(request)
            piece = find(plans, PREFILL, target, past + begin, end - begin)
            amounts(plans, piece, rows, VECTOR)
            row = PROMPTS + plans.pieces[piece]["structure"]
            for i in range(plans.pieces[piece]["columns"]):
                rows[row, i] += rows[VECTOR, i]
            tokens += end - begin
            logits += past + end == target
        index = request["after"]
    first, loads = first_load(cluster), _set_decoding_loads(cluster, number, 0)
    if parts > 1:
        loads = _keep_part(cluster, loads, decoding, part, parts)
    for structure in range(n_structures):
        if rows[PROMPTS + structure, COUNT]:
            row = first + loads
            for i in range(1, rows.shape[1]):
                rows[row, i] = rows[PROMPTS + structure, i]
            rows[row, 0] = structure
            loads += 1
    return Scheduled(rows[first : first + loads], tokens, logits)


def decoding_alone(cluster: Cluster, number: int, step: int) -> Scheduled:
    """What a replica's iteration after the next `step` computes where no prompt is under way."""
    first, tokens = first_load(cluster), cluster.replicas[number]["length"][DECODING] * cluster.world["step_tokens"]
    loads = _set_decoding_loads(cluster, number, step)
    return Scheduled(cluster.rows[first : first + loads], tokens, tokens)


def _set_decoding_loads(cluster: Cluster, number: int, step: int) -> int:
    """Set rows to the decoding sequences' loads in the iteration after the next `step`; how many these are."""
    sums, rows, row = cluster.sums, cluster.rows, first_load(cluster)
    for structure in range(sums.shape[1]):
        if sums[number, structure, 0, COUNT]:
            for i in range(1, sums.shape[3]):
                rows[row, i] = sums[number, structure, 0, i] + step * sums[number, structure, 1, i]
            rows[row, 0] = structure
            row += 1
    return row - first_load(cluster)


def _keep_part(cluster: Cluster, loads: int, decoding: int, part: int, parts: int) -> int:
    """Leave one of equal parts of the decoding sequences' loads, which add up to all; how many loads are left."""
    rows, first = cluster.rows, first_load(cluster)
    low, high = share_of(decoding, part, parts), share_of(decoding, part + 1, parts)
    for row in range(first, first + loads):
        for i in range(1, rows.shape[1]):
            rows[row, i] = share_of(rows[row, i], high, decoding) - share_of(rows[row, i], low, decoding)
    return loads if high > low else 0
