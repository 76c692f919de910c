"""Load a cached prefix or compute it anew, whichever is sooner (Mooncake, FAST'25, section 2.2, as a decision)."""

from kvsim.engine.batch.estimate import prefill_s
from kvsim.engine.batch.memory import copy_s
from kvsim.engine.caches.prefix_cache import begin, extend, fetch_s, place_of, weigh
from kvsim.engine.caches.state import Prefixes
from kvsim.engine.state.cluster import NOBODY, Cluster, Prices, Record
from kvsim.hardware.machine import UP


def shorten(cluster: Cluster, prices: Prices, number: int, index: int, now_s: float) -> None:
    """Cut a request's hit where its prefill ends soonest, the longest of equals; the rest is computed.

    What a further block saves grows with its place in the prompt, and what its load costs does not; so the best cut
    lies where the tier changes, or the number of chunks. May make detours.
    """
    prefixes, world, replica = cluster.prefixes, cluster.world, cluster.replicas[number]
    chain, head = prefixes.chains[index], prefixes.hits[len(cluster.requests)]
    prompt_tokens, found = cluster.requests[index]["prompt_tokens"], prefixes.hits[index]["found"]
    queue_s = max(0.0, replica["loader_free_s"] - now_s)
    best, best_s, widest = NOBODY, 0.0, prefixes.shelf["widest_stage"]
    begin(head)
    for n in range(found + 1):
        if n:
            extend(prefixes, number, chain, prefixes.keys[chain["first"] + n - 1], head)
        if is_cut(prefixes, number, chain, found, n, prompt_tokens, world["max_num_batched_tokens"]):
            weigh(prefixes, chain, prompt_tokens, head)
            load_s = queue_s + copy_s(world, replica, head["load_bytes"], widest, UP) if head["load_bytes"] else 0.0
            total_s = max(load_s, fetch_s(prefixes, number, head, now_s))
            total_s += prefill_s(cluster, prices, prompt_tokens, head["tokens"])
            if best == NOBODY or total_s <= best_s:
                best, best_s = n, total_s
    hit = prefixes.hits[index]
    begin(hit)
    for n in range(best):
        extend(prefixes, number, chain, prefixes.keys[chain["first"] + n], hit)
    weigh(prefixes, chain, prompt_tokens, hit)


def is_cut(
    prefixes: Prefixes, number: int, chain: Record, found: int, n: int, prompt_tokens: int, chunk_tokens: int
) -> bool:
    """Whether a head of `n` of the `found` keys may be the best: the tier changes there, or the number of chunks."""
    if n in (0, found):
        return True
    last = prefixes.keys[chain["first"] + n - 1]
    following, part = prefixes.keys[chain["first"] + n], chain["part"]
    if place_of(prefixes, number, part, last) != place_of(prefixes, number, part, following):
        return True
    # The smallest head after which the rest takes some number of chunks.
    key_tokens = prefixes.shelf["block_tokens"] * chain["blocks_per_key"]
    return bool(
        (prompt_tokens - n * key_tokens - 1) // chunk_tokens
        < (prompt_tokens - (n - 1) * key_tokens - 1) // chunk_tokens
    )
