"""Which entry of a cache tier goes first when it is full: LRU, LFU, FIFO, Belady's bound, and by the queue.

Keys of a prompt come as a chain, head first, and none may go before those that continue it: every order ranks an entry
at least as high as its continuation, and orders equals from tail to head. An entry has the rank of when it was touched
last, a level and a stamp within the level:

- LRU: levels are equal, and the stamp is the time of use.
- FIFO: the same, but use is no touch; an entry is as old as the youngest that continues it.
- LFU: the level is how many requests have asked for the key, also before it came (so a head is counted at least as
  often as what continues it).
- Belady (1966): the one used again last of all goes first, where requests are served in order of arrival; a bound,
  since it knows the future. What would go at once stays out.
- Scheduler-aware (CachedAttention, arXiv:2403.19708, 3.3): the level is how many requests of the look-ahead window
  need the key (`prefix_window`); nothing else displaces what it needs.

Where levels are equal, stamps alone tell the age (`CLOSED_ORDERS`), and ids are of prefixes, a tier that has a key has
all that come before it: each was touched after it, and while a chain comes in, whatever is not of it is older.

A heap finds the lowest rank. A rank that has risen is put right when its entry comes to the top, so a touch costs no
more than writing it down.
"""

from kvsim.engine.caches.index import get, put, remove
from kvsim.engine.caches.state import AWARE, BELADY, FIFO, LFU, LRU, Prefixes
from kvsim.engine.state.cluster import NOBODY, Ints, Record
from kvsim.scenario.choices import EVICTIONS

CLOSED_ORDERS = (EVICTIONS[LRU], EVICTIONS[FIFO])


def entry_of(prefixes: Prefixes, tier: Record, key: int) -> int:
    """The entry of a key in a tier; nobody where it has none."""
    return get(prefixes.table, tier["memory"] * prefixes.shelf["keys"] + key)


def needed_by(prefixes: Prefixes, tier: Record, key: int) -> int:
    """How many requests of a tier's look-ahead window need a key."""
    return max(0, get(prefixes.needs, tier["memory"] * prefixes.shelf["keys"] + key))


def learn(prefixes: Prefixes, chain: Record) -> None:
    """A request begins: what orders know of its keys beside their use."""
    order = prefixes.shelf["order"]
    if order == LFU:
        for i in range(chain["first"], chain["first"] + chain["length"]):
            prefixes.known[prefixes.keys[i]] += 1
    elif order == BELADY:  # where it has overtaken another one, the latest look ahead holds
        for i in range(chain["first"], chain["first"] + chain["length"]):
            key = prefixes.keys[i]
            prefixes.known[key] = max(prefixes.known[key], prefixes.after[i])


def use(prefixes: Prefixes, tier: Record, keys: Ints, first: int, length: int) -> None:
    """A request used these keys of a chain, those that are here."""
    if prefixes.shelf["order"] != FIFO:
        for i in range(first + length - 1, first - 1, -1):
            renew(prefixes, tier, keys[i])


def renew(prefixes: Prefixes, tier: Record, key: int) -> None:
    """Rank a key, if it is here, above what continues it: it is used, or something has been added to its chain."""
    index = entry_of(prefixes, tier, key)
    if index != NOBODY:
        _rank(prefixes, tier, index)


def _rank(prefixes: Prefixes, tier: Record, index: int) -> None:
    entry, order = prefixes.entries[index], prefixes.shelf["order"]
    level = 0
    if order == LFU:
        level = prefixes.known[entry["key"]]
    elif order == BELADY:
        level = -prefixes.known[entry["key"]]
    elif order == AWARE:
        level = needed_by(prefixes, tier, entry["key"])
    entry["level"] = level
    if order == BELADY:
        entry["stamp"] = entry["key"]
    else:
        prefixes.shelf["stamp"] += 1
        entry["stamp"] = prefixes.shelf["stamp"]
    if level < entry["heap_level"]:
        entry["heap_level"], entry["heap_stamp"] = level, entry["stamp"]
        _rise(prefixes, tier, index)


def add(prefixes: Prefixes, tier: Record, key: int, nbytes: int) -> None:
    """Take in a new entry."""
    place = tier["entries"]
    tier["entries"] += 1
    index = prefixes.heap[tier["first"] + place]
    entry = prefixes.entries[index]
    entry["key"], entry["nbytes"], entry["place"], entry["heap_level"] = key, nbytes, place, 1 << 62
    put(prefixes.table, tier["memory"] * prefixes.shelf["keys"] + key, index)
    _rank(prefixes, tier, index)


def evict(prefixes: Prefixes, tier: Record, newcomer: int) -> int:
    """Take out the entry that goes first, which is returned; nobody when all are worth more than the newcomer."""
    if tier["entries"] == 0:
        return NOBODY
    order, entries, heap, first = prefixes.shelf["order"], prefixes.entries, prefixes.heap, tier["first"]
    while True:
        index = heap[first]
        entry = entries[index]
        if entry["heap_level"] == entry["level"] and entry["heap_stamp"] == entry["stamp"]:
            break
        entry["heap_level"], entry["heap_stamp"] = entry["level"], entry["stamp"]
        _fall(prefixes, tier, index)
    if order == BELADY and prefixes.known[newcomer] >= -entry["level"]:
        return NOBODY
    if order == AWARE and entry["level"] and not needed_by(prefixes, tier, newcomer):
        return NOBODY
    tier["entries"] -= 1
    last = heap[first + tier["entries"]]
    heap[first + tier["entries"]] = index
    if last != index:
        heap[first] = last
        entries[last]["place"] = 0
        _fall(prefixes, tier, last)
    remove(prefixes.table, tier["memory"] * prefixes.shelf["keys"] + entry["key"])
    return int(index)


def _before(one: Record, other: Record) -> bool:
    if one["heap_level"] != other["heap_level"]:
        return bool(one["heap_level"] < other["heap_level"])
    return bool(one["heap_stamp"] < other["heap_stamp"])


def _rise(prefixes: Prefixes, tier: Record, index: int) -> None:
    entries, heap, first = prefixes.entries, prefixes.heap, tier["first"]
    place = entries[index]["place"]
    while place and _before(entries[index], entries[heap[first + (place - 1) // 2]]):
        above = (place - 1) // 2
        heap[first + place] = heap[first + above]
        entries[heap[first + place]]["place"] = place
        place = above
    heap[first + place] = index
    entries[index]["place"] = place


def _fall(prefixes: Prefixes, tier: Record, index: int) -> None:
    entries, heap, first, size = prefixes.entries, prefixes.heap, tier["first"], tier["entries"]
    place = entries[index]["place"]
    while 2 * place + 1 < size:
        below = 2 * place + 1
        if below + 1 < size and _before(entries[heap[first + below + 1]], entries[heap[first + below]]):
            below += 1
        if not _before(entries[heap[first + below]], entries[index]):
            break
        heap[first + place] = heap[first + below]
        entries[heap[first + place]]["place"] = place
        place = below
    heap[first + place] = index
    entries[index]["place"] = place
