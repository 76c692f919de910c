"""The look-ahead window of the scheduler-aware order: who waits at a tier, and which keys they need.

It is the longest head of the queue, in order of arrival, whose blocks the tier can hold.
"""

from kvsim.engine.caches.eviction import needed_by, renew
from kvsim.engine.caches.index import put, remove
from kvsim.engine.caches.state import BEYOND, GONE, PLACES, UNSEEN, WITHIN, Prefixes
from kvsim.engine.state.cluster import NOBODY, Record


def wait(prefixes: Prefixes, number: int, index: int) -> None:
    """A request joins a replica's queue."""
    chain = prefixes.chains[index]
    cache = prefixes.caches[number, chain["part"]]
    for place in range(PLACES):
        if cache["tiers"][place] != NOBODY:
            tier = prefixes.tiers[cache["tiers"][place]]
            chain["window"][place], chain["next_beyond"][place] = BEYOND, NOBODY
            if tier["first_beyond"] == NOBODY:
                tier["first_beyond"] = index
            else:
                prefixes.chains[tier["last_beyond"]]["next_beyond"][place] = index
            tier["last_beyond"] = index
            _widen(prefixes, tier, place)


def leave(prefixes: Prefixes, number: int, index: int) -> None:
    """A request leaves a replica's queue."""
    chain = prefixes.chains[index]
    cache = prefixes.caches[number, chain["part"]]
    for place in range(PLACES):
        if cache["tiers"][place] != NOBODY:
            if chain["window"][place] == BEYOND:
                chain["window"][place] = GONE
            elif chain["window"][place] == WITHIN:
                tier = prefixes.tiers[cache["tiers"][place]]
                chain["window"][place] = UNSEEN
                _need(prefixes, tier, chain, -1)
                _widen(prefixes, tier, place)


def _widen(prefixes: Prefixes, tier: Record, place: int) -> None:
    """Take further requests into the window, while the tier can hold what they need."""
    while tier["first_beyond"] != NOBODY:
        chain = prefixes.chains[tier["first_beyond"]]
        if chain["window"][place] == BEYOND:
            needed = tier["needed"]
            for i in range(chain["first"], chain["first"] + chain["length"]):
                needed += needed_by(prefixes, tier, prefixes.keys[i]) == 0
            if needed > tier["capacity_blocks"]:
                return
            chain["window"][place] = WITHIN
            _need(prefixes, tier, chain, 1)
        tier["first_beyond"] = chain["next_beyond"][place]


def _need(prefixes: Prefixes, tier: Record, chain: Record, more: int) -> None:
    """A request enters or leaves the window: rank its keys anew."""
    base, first, last = tier["memory"] * prefixes.shelf["keys"], chain["first"], chain["first"] + chain["length"] - 1
    for i in range(first, last + 1):
        key = prefixes.keys[i]
        count = needed_by(prefixes, tier, key)
        if count == 0:
            tier["needed"] += 1
        if count + more:
            put(prefixes.needs, base + key, count + more)
        else:
            tier["needed"] -= 1
            remove(prefixes.needs, base + key)
    for i in range(last, first - 1, -1):
        renew(prefixes, tier, prefixes.keys[i])
