"""What a replica's prefix cache does for one prompt: which of its blocks need no prefill, and what its state weighs.

A replica finds its own HBM tier, over the DDR and NVMe tiers of its host, over a pool of all hosts. A policy whose
state spans a whole prefix is reused only for the very same prompt, which then has one key. Written `through`, a
prompt's state goes to every tier; written `back`, it goes to the first one, and down from a tier when that evicts it.
"""

from kvsim.engine.caches.eviction import add, entry_of, evict, renew, use
from kvsim.engine.caches.links import send, would_take_s
from kvsim.engine.caches.state import ADDED, KNOWN, MISSING, PLACES, PRESENT, SLOW, Prefixes
from kvsim.engine.state.cluster import DDR, HBM, NOBODY, Ints, Record
from kvsim.hardware.machine import DOWN, UP


def match(prefixes: Prefixes, number: int, index: int, prompt_tokens: int, hit: Record) -> None:
    """Set a hit to the longest cached head of a request's prompt at a replica; at most all of it but one token."""
    chain = prefixes.chains[index]
    begin(hit)
    if prefixes.shelf["closed"]:
        _reach(prefixes, number, chain, hit)
    else:
        for i in range(chain["length"]):
            if not extend(prefixes, number, chain, prefixes.keys[chain["first"] + i], hit):
                break
    weigh(prefixes, chain, prompt_tokens, hit)


def _reach(prefixes: Prefixes, number: int, chain: Record, hit: Record) -> None:
    """Add to a hit what each closed tier holds beyond those above it, by bisection."""
    cache = prefixes.caches[number, chain["part"]]
    for place in range(PLACES):
        if cache["tiers"][place] == NOBODY:
            continue
        tier, here, beyond = prefixes.tiers[cache["tiers"][place]], hit["found"], chain["length"]
        while here < beyond:  # the first `here` keys are in a tier, the one at `beyond` is not in this one
            i = (here + beyond) // 2 if here > hit["found"] else here
            if entry_of(prefixes, tier, prefixes.keys[chain["first"] + i]) == NOBODY:
                beyond = i
            else:
                here = i + 1
        hit["blocks"][place] = (here - hit["found"]) * chain["blocks_per_key"]
        hit["found"] = here


def begin(hit: Record) -> None:
    """Set a hit to nothing."""
    hit["found"], hit["landed_s"] = 0, 0.0
    for place in range(PLACES):
        hit["blocks"][place] = 0


def extend(prefixes: Prefixes, number: int, chain: Record, key: int, hit: Record) -> bool:
    """Add the next key of a chain to a hit; False where no tier has it."""
    place = place_of(prefixes, number, chain["part"], key)
    if place == NOBODY:
        return False
    hit["found"] += 1
    hit["blocks"][place] += chain["blocks_per_key"]
    if place != HBM and prefixes.landing_s.shape[1]:
        host = number // prefixes.shelf["replicas_per_host"]
        hit["landed_s"] = max(hit["landed_s"], prefixes.landing_s[host, key])
    return True


def weigh(prefixes: Prefixes, chain: Record, prompt_tokens: int, hit: Record) -> None:
    """Set what a hit's keys amount to."""
    shelf, blocks = prefixes.shelf, hit["found"] * chain["blocks_per_key"]
    hit["tokens"] = min(blocks * shelf["block_tokens"], prompt_tokens - 1)
    hit["load_bytes"] = (blocks - hit["blocks"][HBM]) * shelf["block_hbm_bytes"] // shelf["ranks"]
    hit["slow"] = 0
    for place in range(SLOW, PLACES):
        if hit["blocks"][place]:
            hit["slow"] = 1


def place_of(prefixes: Prefixes, number: int, part: int, key: int) -> int:
    """The first tier of a replica's that has a key."""
    cache = prefixes.caches[number, part]
    for place in range(PLACES):
        tier = cache["tiers"][place]
        if tier != NOBODY and entry_of(prefixes, prefixes.tiers[tier], key) != NOBODY:
            return place
    return NOBODY


def fetch_s(prefixes: Prefixes, number: int, hit: Record, now_s: float) -> float:
    """How long it would take from now until a hit's blocks are in DDR."""
    longest_s = max(0.0, hit["landed_s"] - now_s)
    if hit["slow"]:
        host = number // prefixes.shelf["replicas_per_host"]
        for place in range(SLOW, PLACES):
            if hit["blocks"][place]:
                nbytes = hit["blocks"][place] * prefixes.shelf["block_bytes"]
                longest_s = max(longest_s, would_take_s(prefixes.links[host, place - SLOW, UP], nbytes, now_s))
    return float(longest_s)


def accept(prefixes: Prefixes, number: int, index: int, hit: Record, now_s: float) -> float:
    """A prompt reuses its cached head: count it, and bring slow blocks up to DDR, which sets when all have landed.

    How long the first byte of a slow one takes.
    """
    chain = prefixes.chains[index]
    cache, lookups = prefixes.caches[number, chain["part"]], chain["blocks"]
    for place in range(PLACES):
        if cache["tiers"][place] != NOBODY:
            tier = prefixes.tiers[cache["tiers"][place]]
            tier["lookup_blocks"] += lookups
            tier["hit_blocks"] += hit["blocks"][place]
            lookups -= hit["blocks"][place]
            use(prefixes, tier, prefixes.keys, chain["first"], hit["found"])
    latency_s = 0.0
    if hit["slow"]:
        hit["landed_s"] = max(hit["landed_s"], fetch(prefixes, number, chain, hit["found"], now_s))
        host = number // prefixes.shelf["replicas_per_host"]
        for place in range(SLOW, PLACES):
            if hit["blocks"][place]:
                latency_s = max(latency_s, prefixes.links[host, place - SLOW, UP]["latency_s"])
    return float(latency_s)


def fetch(prefixes: Prefixes, number: int, chain: Record, found: int, now_s: float) -> float:
    """Bring those of a chain's first keys that are in slow tiers alone up to DDR; when the last will be there."""
    shelf, keys, coming = prefixes.shelf, prefixes.keys, prefixes.marks[1]
    cache, host, first = prefixes.caches[number, chain["part"]], number // shelf["replicas_per_host"], chain["first"]
    nbytes = chain["blocks_per_key"] * shelf["block_bytes"]
    landed_s, moved, length = 0.0, 0, 0
    for i in range(found):
        coming[i] = place_of(prefixes, number, chain["part"], keys[first + i])
    for place in range(SLOW, PLACES):
        count = 0
        for i in range(found):
            count += coming[i] == place
        moved += count
        if count:
            done_s = send(prefixes.links[host, place - SLOW, UP], count * nbytes, now_s)
            landed_s = max(landed_s, done_s)
            for i in range(found):
                if coming[i] == place:
                    prefixes.landing_s[host, keys[first + i]] = done_s
    if moved and cache["tiers"][DDR] != NOBODY:
        ddr = prefixes.tiers[cache["tiers"][DDR]]
        for i in range(found):
            if coming[i] >= SLOW or entry_of(prefixes, ddr, keys[first + i]) != NOBODY:
                prefixes.rest[length] = keys[first + i]
                length += 1
        _keep(prefixes, number, chain["part"], DDR, prefixes.rest, 0, length, nbytes, now_s, False)
    return float(landed_s)


def store(prefixes: Prefixes, number: int, index: int, now_s: float) -> int:
    """Keep the state of a request's finished prompt; the bytes of one rank that go down over PCIe."""
    chain, shelf = prefixes.chains[index], prefixes.shelf
    cache, host = prefixes.caches[number, chain["part"]], number // shelf["replicas_per_host"]
    first, length, nbytes = chain["first"], chain["length"], chain["blocks_per_key"] * shelf["block_bytes"]
    if shelf["back"]:
        place = _below(cache, NOBODY)
        return _keep(prefixes, number, chain["part"], place, prefixes.keys, first, length, nbytes, now_s, True)
    staged, count = prefixes.marks[1], 0
    for i in range(length):
        staged[i] = 0
    for place in range(PLACES):
        if cache["tiers"][place] == NOBODY:
            continue
        tier = prefixes.tiers[cache["tiers"][place]]
        added, _ = put_chain(prefixes, tier, prefixes.keys, first, length, nbytes)
        if place == HBM or not added:
            continue
        for i in range(length):
            if prefixes.marks[0, i] == ADDED and not staged[i]:
                ddr = cache["tiers"][DDR]
                key = prefixes.keys[first + i]
                if place == DDR or ddr == NOBODY or entry_of(prefixes, prefixes.tiers[ddr], key) == NOBODY:
                    staged[i] = 1
                    count += 1
        if place > DDR:
            send(prefixes.links[host, place - SLOW, DOWN], added * nbytes, now_s)
    return _hbm_bytes(shelf, count * nbytes)


def _hbm_bytes(shelf: Record, nbytes: int) -> int:
    """What of so many bytes of entries is in HBM while a sequence runs, on each rank."""
    return int(nbytes // shelf["block_bytes"] * shelf["block_hbm_bytes"] // shelf["ranks"])


def _below(cache: Record, place: int) -> int:
    """The next tier below one; nobody below the last."""
    for lower in range(place + 1, PLACES):
        if cache["tiers"][lower] != NOBODY:
            return lower
    return NOBODY


def _keep(
    prefixes: Prefixes,
    number: int,
    part: int,
    place: int,
    keys: Ints,
    first: int,
    length: int,
    nbytes: int,
    now_s: float,
    from_hbm: bool,
) -> int:
    """Put a chain into one tier, and below what it evicts or does not take; the bytes that go down over PCIe."""
    cache, down_bytes = prefixes.caches[number, part], 0
    while True:
        tier = prefixes.tiers[cache["tiers"][place]]
        added, evicted = put_chain(prefixes, tier, keys, first, length, nbytes)
        down_bytes += _book(prefixes, number, place, added, nbytes, now_s, from_hbm)
        lower = _below(cache, place)
        if not prefixes.shelf["back"] or lower == NOBODY:
            return down_bytes
        down_bytes += _sink(prefixes, number, cache, place, evicted, now_s)
        refused = 0
        for i in range(first, first + length):
            if entry_of(prefixes, tier, keys[i]) == NOBODY:
                prefixes.rest[refused] = keys[i]
                refused += 1
        if not refused:
            return down_bytes
        place, keys, first, length = lower, prefixes.rest, 0, refused


def _sink(prefixes: Prefixes, number: int, cache: Record, place: int, evicted: int, now_s: float) -> int:
    """Put what a tier has evicted, tails first, into the one below, and so on; bytes that go down over PCIe."""
    sinking, one = prefixes.sinking, prefixes.sinking[0]
    size, down_bytes = _sunk(prefixes, 1, evicted, _below(cache, place), place == HBM), 0
    while size > 1:
        size -= 1
        place, nbytes, from_hbm = sinking[size, 0], sinking[size, 2], sinking[size, 3] != 0
        one[0] = sinking[size, 1]
        tier, lower = prefixes.tiers[cache["tiers"][place]], _below(cache, place)
        added, evicted = put_chain(prefixes, tier, one, 0, 1, nbytes)
        down_bytes += _book(prefixes, number, place, added, nbytes, now_s, from_hbm)
        if sinking[size, 4]:
            renew(prefixes, tier, one[0])  # a head above the tails that came before it
        if lower == NOBODY:
            continue
        if entry_of(prefixes, tier, one[0]) == NOBODY:
            sinking[size, 0], sinking[size, 4] = lower, 0
            size += 1
        size = _sunk(prefixes, size, evicted, lower, place == HBM)
    return down_bytes


def _sunk(prefixes: Prefixes, size: int, evicted: int, lower: int, from_hbm: bool) -> int:
    """Put so many evicted entries on top of the stack of what sinks, the first on top; its size then."""
    for i in range(evicted - 1, -1, -1):
        row = prefixes.sinking[size]
        row[0], row[1], row[2] = lower, prefixes.evicted[i, 0], prefixes.evicted[i, 1]
        row[3], row[4] = from_hbm, 1
        size += 1
    return size


def _book(prefixes: Prefixes, number: int, place: int, added: int, nbytes: int, now_s: float, from_hbm: bool) -> int:
    """Let entries that have been added to a tier go down its link; the bytes that go down over PCIe."""
    shelf = prefixes.shelf
    if place == HBM or not added:
        return 0
    if place > DDR:
        host = number // shelf["replicas_per_host"]
        send(prefixes.links[host, place - SLOW, DOWN], added * nbytes, now_s)
    return _hbm_bytes(shelf, added * nbytes) if from_hbm else 0


def put_chain(prefixes: Prefixes, tier: Record, keys: Ints, first: int, length: int, nbytes: int) -> tuple[int, int]:
    """Keep a chain's entries of one size in a tier, its head where not all fit; how many were added and evicted.

    Sets which of them were added (`marks`), from the tail, and what was evicted (`evicted`), in order.
    """
    marks, added, evicted = prefixes.marks[0], 0, 0
    fitting, missing = min(length, tier["capacity_bytes"] // nbytes) if length else 0, 0
    for i in range(length):
        marks[i] = KNOWN
        if i < fitting:
            here = entry_of(prefixes, tier, keys[first + i]) != NOBODY
            marks[i] = PRESENT if here else MISSING
            missing += not here
    if not missing:
        use(prefixes, tier, keys, first, fitting)
        return 0, 0
    for i in range(fitting - 1, -1, -1):
        if marks[i] == PRESENT:  # lest they make room for their own tail
            renew(prefixes, tier, keys[first + i])
    for i in range(fitting - 1, -1, -1):
        if marks[i] != MISSING:
            continue
        key, evicted = keys[first + i], _evict_for(prefixes, tier, keys[first + i], nbytes, evicted)
        fits = tier["capacity_bytes"] - tier["used_bytes"] >= nbytes
        if fits and entry_of(prefixes, tier, key) == NOBODY:  # an id may stand twice in a prompt
            add(prefixes, tier, key, nbytes)
            tier["used_bytes"] += nbytes
            marks[i] = ADDED
            added += 1
    if missing < fitting:
        for i in range(fitting - 1, -1, -1):
            renew(prefixes, tier, keys[first + i])
    tier["changes"] += added > 0 or evicted > 0
    return added, evicted


def _evict_for(prefixes: Prefixes, tier: Record, newcomer: int, nbytes: int, evicted: int) -> int:
    """Evict until so many bytes are free, or what is there is worth more than the newcomer; how many are evicted then.

    There were some already, in `prefixes.evicted`.
    """
    while tier["capacity_bytes"] - tier["used_bytes"] < nbytes:
        victim = evict(prefixes, tier, newcomer)
        if victim == NOBODY:
            break
        entry = prefixes.entries[victim]
        prefixes.evicted[evicted, 0], prefixes.evicted[evicted, 1] = entry["key"], entry["nbytes"]
        evicted += 1
        tier["used_bytes"] -= entry["nbytes"]
    return evicted
