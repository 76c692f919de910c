"""How long a prompt's prefill takes by itself on a replica: what routers and the choice to load or compute ask."""

from kvsim.engine.batch.hops import send_s
from kvsim.engine.batch.load import Scheduled, first_load
from kvsim.engine.batch.plans import PREFILL, amounts, find
from kvsim.engine.batch.pricing import price_batch
from kvsim.engine.state.cluster import Cluster, Prices
from kvsim.hardware.machine import share_evenly


def prefill_s(cluster: Cluster, prices: Prices, prompt_tokens: int, cached_tokens: int) -> float:
    """Exact in one chunk; of several, the first and the last whole one are averaged. May make detours.

    (A chunk's time grows about evenly with what comes before it.)
    """
    if cluster.world["stages"] > 1:
        return _piped_s(cluster, prices, prompt_tokens, cached_tokens)
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
    logits = past_tokens + new_tokens == prompt_tokens
    return _stage_s(cluster, prices, _chunk(cluster, prompt_tokens, past_tokens, new_tokens, int(logits)), 0, 1)


def _piped_s(cluster: Cluster, prices: Prices, prompt_tokens: int, cached_tokens: int) -> float:
    """A prompt's prefill on stages: all micro-batches on the slowest, the first before it, the longest after it.

    The micro-batches of a chunk are averaged. One chunk of few tokens goes through as a whole if that is sooner.
    """
    world, chunk_tokens = cluster.world, cluster.world["max_num_batched_tokens"]
    new_tokens = prompt_tokens - cached_tokens
    whole, rest = new_tokens // chunk_tokens, new_tokens % chunk_tokens
    seconds, _, _ = _part_s(cluster, prices, prompt_tokens, cached_tokens, min(chunk_tokens, new_tokens), 0.0)
    longest_s = 0.0
    if whole:
        end = cached_tokens + (whole - 1) * chunk_tokens
        _, first_s, _ = _part_s(cluster, prices, prompt_tokens, cached_tokens, chunk_tokens, 0.5)
        _, last_s, _ = _part_s(cluster, prices, prompt_tokens, end, chunk_tokens, 0.5)
        seconds += whole * world["stages"] * (first_s + last_s) / 2
        _, _, longest_s = _part_s(cluster, prices, prompt_tokens, end, chunk_tokens, 1.0)
    if rest:
        _, slowest_s, _ = _part_s(cluster, prices, prompt_tokens, prompt_tokens - rest, rest, 0.5)
        seconds += min(world["stages"], rest) * slowest_s
        _, _, after_s = _part_s(cluster, prices, prompt_tokens, prompt_tokens - rest, rest, 1.0)
        longest_s = max(longest_s, after_s)
    seconds += longest_s
    if new_tokens <= chunk_tokens:
        before_s, slowest_s, after_s = _through_s(cluster, prices, prompt_tokens, cached_tokens, new_tokens, 1)
        seconds = min(seconds, before_s + slowest_s + after_s)
    return float(seconds + prices.head[1]["seconds"])


def _part_s(
    cluster: Cluster, prices: Prices, prompt_tokens: int, past_tokens: int, new_tokens: int, place: float
) -> tuple[float, float, float]:
    """What one of a chunk's micro-batches, from the first (0) to the last (1), takes around the slowest stage."""
    parts = min(cluster.world["stages"], new_tokens)
    size = -(-new_tokens // parts)
    return _through_s(cluster, prices, prompt_tokens, past_tokens + int(place * (new_tokens - size)), size, parts)


def _through_s(
    cluster: Cluster, prices: Prices, prompt_tokens: int, past_tokens: int, new_tokens: int, parts: int
) -> tuple[float, float, float]:
    """What one of so many micro-batches takes before, on and after the slowest stage; the head aside."""
    batch = _chunk(cluster, prompt_tokens, past_tokens, new_tokens, 0)
    before_s, slowest_s, after_s = 0.0, 0.0, send_s(cluster.world, new_tokens)
    for stage in range(cluster.world["stages"]):
        seconds = _stage_s(cluster, prices, batch, stage, parts)
        if seconds > slowest_s:
            if stage:
                before_s += slowest_s + after_s
                after_s = 0.0
            slowest_s = seconds
        else:
            after_s += seconds
    return before_s, slowest_s, after_s


def _chunk(cluster: Cluster, prompt_tokens: int, past_tokens: int, new_tokens: int, logits: int) -> Scheduled:
    """An iteration that computes no more than some tokens of a prompt."""
    plans, row = cluster.plans, first_load(cluster)
    piece = find(plans, PREFILL, prompt_tokens, past_tokens, new_tokens)
    amounts(plans, piece, cluster.rows, row)
    cluster.rows[row, 0] = plans.pieces[piece]["structure"]
    return Scheduled(cluster.rows[row : row + 1], new_tokens, logits)


def _stage_s(cluster: Cluster, prices: Prices, chunk: Scheduled, stage: int, parts: int) -> float:
    """Seconds of a chunk on a stage, alone on the host with as many stages as there are micro-batches."""
    world = cluster.world
    busy = min(world["gpus_on_host"], parts * world["tp"])
    on_switch = min(busy, world["gpus_per_switch"])
    share_evenly(world["sharing"], busy, on_switch, world["ddr_Bps"], world["switch_Bps"])
    return price_batch(world, prices, chunk, 1.0, stage, world["sharing"], world["busy_s"])
