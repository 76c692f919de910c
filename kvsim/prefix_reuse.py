"""Load a cached prefix or compute it anew, whichever is sooner (Mooncake, FAST'25, section 2.2, as a decision)."""

from collections.abc import Callable, Sequence
from itertools import accumulate

from kvsim.prefix_cache import HBM, Hit, PrefixCache

REUSES = ("always", "cheaper")


def cheapest(
    cache: PrefixCache,
    blocks: Sequence[int],
    prompt_tokens: int,
    hit: Hit,
    now_s: float,
    chunk_tokens: int,
    *,
    load_s: Callable[[int], float],
    prefill_s: Callable[[int, int], float],
) -> Hit:
    """The head of a hit that makes the prompt's prefill end soonest, the longest of equals; the rest is computed.

    `load_s` is the time, queue included, in which so many bytes come up over PCIe, and `prefill_s` that of a prompt's
    prefill by its tokens and those cached, alone on the replica. What a further block saves grows with its place in the
    prompt, and what its load costs does not; so the best cut lies where the tier changes, or the number of chunks.
    """
    if hit.blocks[HBM] == sum(hit.blocks):
        return hit

    def total_s(head: Hit) -> float:
        wait_s = max(load_s(head.load_bytes), cache.fetch_s(head, now_s))
        return wait_s + prefill_s(prompt_tokens, head.tokens)

    heads = [cache.match(blocks, prompt_tokens, now_s, most=n) for n in _cuts(cache, hit, prompt_tokens, chunk_tokens)]
    return min([hit, *reversed(heads)], key=total_s)


def _cuts(cache: PrefixCache, hit: Hit, prompt_tokens: int, chunk_tokens: int) -> list[int]:
    """Numbers of entries after which a shorter head of a hit may end, ascending."""
    found = len(hit.keys)
    places = [cache.place(key) for key in hit.keys]
    changes = [i for i in range(1, found) if places[i] != places[i - 1]]
    entry_tokens = cache.block_tokens * (sum(hit.blocks) // found)
    chunks = accumulate([chunk_tokens] * (prompt_tokens // chunk_tokens))
    whole = [-(-(prompt_tokens - tokens) // entry_tokens) for tokens in chunks]
    return sorted({0, *changes, *(n for n in whole if 0 < n < found)})
