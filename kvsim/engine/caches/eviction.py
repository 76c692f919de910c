"""Which entry of a cache tier goes first when it is full: the lowest level, and within a level the oldest.

Keys of a prompt come as a chain, head first, and none may go before those that continue it: every level of a key is at
least that of its continuation, and a chain is touched from tail to head. What an order knows beside age, its level
(`EVICTION_ORDERS` names the orders), is as of when the entry was touched last:

- none: levels are equal. LRU; and FIFO, where use is no touch: an entry is as old as the youngest that continues it.
- requests, LFU: how many requests have asked for the key, also before it came (so a head is counted at least as often
  as what continues it).
- next use, Belady (1966): the one used again last of all goes first, where requests are served in order of arrival; a
  bound, since it knows the future. What would go at once stays out.
- queue, CachedAttention (arXiv:2403.19708, 3.3): how many requests of the look-ahead window need the key
  (`window.py`); nothing else displaces what it needs.

Where levels are equal, and ids are of prefixes, a tier that has a key has all that come before it: each was touched
after it, and while a chain comes in, whatever is not of it is older. A list by age (`ages.py`) then has the order; else
a heap finds the lowest rank, of level and stamp. A rank that has risen is put right when its entry comes to the top, so
a touch costs no more than writing it down.
"""

from kvsim.engine.caches.ages import join, oldest, part
from kvsim.engine.caches.index import get, put, remove
from kvsim.engine.caches.state import NEXT_USE, NONE, QUEUE, REQUESTS, Prefixes
from kvsim.engine.state.cluster import NOBODY, Ints, Record


def entry_of(prefixes: Prefixes, tier: Record, key: int) -> int:
    """The entry of a key in a tier; nobody where it has none."""
    return get(prefixes.table, tier["memory"] * prefixes.shelf["keys"] + key)


def needed_by(prefixes: Prefixes, tier: Record, key: int) -> int:
    """How many requests of a tier's look-ahead window need a key."""
    return max(0, get(prefixes.needs, tier["memory"] * prefixes.shelf["keys"] + key))


def learn(prefixes: Prefixes, chain: Record) -> None:
    """A request begins: what orders know of its keys beside their use."""
    level = prefixes.shelf["level"]
    if level == REQUESTS:
        for i in range(chain["first"], chain["first"] + chain["length"]):
            prefixes.known[prefixes.keys[i]] += 1
    elif level == NEXT_USE:  # where it has overtaken another one, the latest look ahead holds
        for i in range(chain["first"], chain["first"] + chain["length"]):
            key = prefixes.keys[i]
            prefixes.known[key] = max(prefixes.known[key], prefixes.after[i])


def level_of(prefixes: Prefixes, tier: Record, key: int) -> int:
    """What an order knows of a key now: where it is lower, the entry goes sooner."""
    level = prefixes.shelf["level"]
    if level == REQUESTS:
        return int(prefixes.known[key])
    if level == NEXT_USE:
        return int(-prefixes.known[key])
    if level == QUEUE:
        return needed_by(prefixes, tier, key)
    return 0


def use(prefixes: Prefixes, tier: Record, keys: Ints, first: int, length: int) -> None:
    """A request used these keys of a chain, those that are here."""
    if prefixes.shelf["renewed_by_use"]:
        for i in range(first + length - 1, first - 1, -1):
            renew(prefixes, tier, keys[i])


def renew(prefixes: Prefixes, tier: Record, key: int) -> None:
    """Rank a key, if it is here, above what continues it: it is used, or something has been added to its chain."""
    index = entry_of(prefixes, tier, key)
    if index == NOBODY:
        return
    if prefixes.shelf["level"] == NONE:
        part(prefixes, index)
        join(prefixes, tier, index)
    else:
        _rank(prefixes, tier, index)


def _rank(prefixes: Prefixes, tier: Record, index: int) -> None:
    entry = prefixes.entries[index]
    entry["level"] = level_of(prefixes, tier, entry["key"])
    if prefixes.shelf["level"] == NEXT_USE:
        entry["stamp"] = entry["key"]
    else:
        prefixes.shelf["stamp"] += 1
        entry["stamp"] = prefixes.shelf["stamp"]
    if entry["level"] < entry["heap_level"]:
        entry["heap_level"], entry["heap_stamp"] = entry["level"], entry["stamp"]
        _rise(prefixes, tier, index)


def add(prefixes: Prefixes, tier: Record, key: int, nbytes: int) -> None:
    """Take in a new entry."""
    place = tier["entries"]
    tier["entries"] += 1
    index = prefixes.heap[tier["first"] + place]
    entry = prefixes.entries[index]
    entry["key"], entry["nbytes"] = key, nbytes
    put(prefixes.table, tier["memory"] * prefixes.shelf["keys"] + key, index)
    if prefixes.shelf["level"] == NONE:
        join(prefixes, tier, index)
    else:
        entry["place"], entry["heap_level"] = place, 1 << 62
        _rank(prefixes, tier, index)


def evict(prefixes: Prefixes, tier: Record, newcomer: int) -> int:
    """Take out the entry that goes first, which is returned; nobody when all are worth more than the newcomer."""
    if tier["entries"] == 0:
        return NOBODY
    if prefixes.shelf["level"] == NONE:
        index = oldest(prefixes, tier)
        part(prefixes, index)
        tier["entries"] -= 1
    else:
        index = _lowest(prefixes, tier)
        if _is_worth_more(prefixes, tier, prefixes.entries[index]["level"], newcomer):
            return NOBODY
        _take_top(prefixes, tier)
    prefixes.heap[tier["first"] + tier["entries"]] = index
    remove(prefixes.table, tier["memory"] * prefixes.shelf["keys"] + prefixes.entries[index]["key"])
    return index


def _is_worth_more(prefixes: Prefixes, tier: Record, level: int, newcomer: int) -> bool:
    """Whether the entry that goes first, of this level, is to stay and the newcomer out."""
    if prefixes.shelf["level"] == NEXT_USE:
        return bool(prefixes.known[newcomer] >= -level)
    return bool(prefixes.shelf["level"] == QUEUE and level and not needed_by(prefixes, tier, newcomer))


def _lowest(prefixes: Prefixes, tier: Record) -> int:
    """The entry of the lowest rank, at the top of the heap, once that is put right there."""
    while True:
        index = prefixes.heap[tier["first"]]
        entry = prefixes.entries[index]
        if entry["heap_level"] == entry["level"] and entry["heap_stamp"] == entry["stamp"]:
            return int(index)
        entry["heap_level"], entry["heap_stamp"] = entry["level"], entry["stamp"]
        _fall(prefixes, tier, index)


def _take_top(prefixes: Prefixes, tier: Record) -> None:
    """Take the heap's top away; the last entry takes its place, and falls."""
    tier["entries"] -= 1
    heap, first = prefixes.heap, tier["first"]
    last = heap[first + tier["entries"]]
    if tier["entries"]:
        heap[first] = last
        prefixes.entries[last]["place"] = 0
        _fall(prefixes, tier, last)


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
