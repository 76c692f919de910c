"""How long a prompt's prefill takes by itself on a replica: what routers and the choice to load or compute ask."""

from kvsim.engine.batch import first_load
from kvsim.engine.plans import PREFILL, amounts, find
from kvsim.engine.pricing import price
from kvsim.engine.state import Cluster, Prices


def prefill_s(cluster: Cluster, prices: Prices, prompt_tokens: int, cached_tokens: int) -> float:
    """Exact in one chunk; of several, the first and the last whole one are averaged. May make detours.

    (A chunk's time grows about evenly with what comes before it.)
    """
    chunk_tokens = cluster.world["max_num_batched_tokens"]
    whole, rest = (prompt_tokens - cached_tokens) // chunk_tokens, (prompt_tokens - cached_tokens) % chunk_tokens
    seconds = 0.0
    if rest:
        seconds = _chunk_s(cluster, prices, prompt_tokens, prompt_tokens - rest, rest)
    if whole:
        first_s = _chunk_s(cluster, prices, prompt_tokens, cached_tokens, chunk_tokens)
        last = cached_tokens + (whole - 1) * chunk_tokens
        last_s = _chunk_s(cluster, prices, prompt_tokens, last, chunk_tokens)
        seconds += whole * (first_s + last_s) / 2
    return seconds


def _chunk_s(cluster: Cluster, prices: Prices, prompt_tokens: int, past_tokens: int, new_tokens: int) -> float:
    world, rows, plans, row = cluster.world, cluster.rows, cluster.plans, first_load(cluster)
    piece = find(plans, PREFILL, prompt_tokens, past_tokens, new_tokens)
    amounts(plans, piece, rows, row)
    rows[row, 0], world["loads"] = plans.pieces[piece]["structure"], 1
    logits = past_tokens + new_tokens == prompt_tokens
    on_switch = min(world["tp"], world["gpus_per_switch"])
    seconds = 0.0
    for stage in range(world["stages"]):
        seconds += price(world, prices, rows, row, stage, 1.0, new_tokens, int(logits), world["tp"], on_switch)
    return seconds
