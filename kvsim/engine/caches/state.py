"""The state of prefix caches as arrays: tiers and their entries, the links below them, what each prompt asks for."""

from typing import NamedTuple

import numpy as np

from kvsim.iteration.arrays import Floats, Ints, Record, Records
from kvsim.scenario.choices import LEVELS

TIER_NAMES = ("hbm", "ddr", "nvme", "remote")
PLACES = len(TIER_NAMES)
NVME, REMOTE = 2, 3
SLOW = 2  # the first place below DDR
NONE, REQUESTS, NEXT_USE, QUEUE = range(len(LEVELS))  # what an eviction order ranks by before age
OLDER, NEWER = range(2)
UNSEEN, BEYOND, WITHIN, GONE = range(4)  # where a request stands towards a look-ahead window
KNOWN, PRESENT, MISSING, ADDED = range(4)

ENTRY = np.dtype(
    [
        (name, np.int64)
        for name in (
            "key",
            "nbytes",
            "level",  # its rank: the lowest level goes first, within a level the smallest stamp
            "stamp",
            "heap_level",  # the rank by which the heap is ordered, never above the former
            "heap_stamp",
            "place",  # in the heap
        )
    ]
)
TIER = np.dtype(  # of one part of a quota
    [
        (name, np.int64)
        for name in (
            "capacity_bytes",
            "used_bytes",
            "noted_bytes",  # of these, what its memory's record counts
            "lookup_blocks",
            "hit_blocks",
            "prefetched_blocks",
            "changes",
            "memory",  # its number among the memories of the cluster, those of other parts aside
            "first",  # of its entries and of its heap
            "ring",  # where its entries' ages begin and end
            "entries",
            "capacity_blocks",
            "needed",  # keys that the look-ahead window needs, and the waiting requests beyond it
            "first_beyond",
            "last_beyond",
            "first_ahead",  # waiting requests for which nothing has been fetched yet
            "last_ahead",
            "taken_bytes",  # by what has been fetched for waiting requests
        )
    ]
)
HELD = np.dtype(  # what a memory below DDR holds, of all parts
    [(name, np.int64) for name in ("nbytes", "peak_bytes")] + [(name, np.float64) for name in ("byte_s", "since_s")]
)
CACHE = np.dtype([("tiers", np.int64, (PLACES,))])  # what a replica finds, of one part of a quota
LINK = np.dtype(  # one direction of a device, which serves transfers in the order in which they come
    [(name, np.float64) for name in ("Bps", "latency_s", "free_s", "busy_s")] + [("moved_bytes", np.int64)]
)
CHAIN = np.dtype(  # what a prompt is kept as
    [
        (name, np.int64)
        for name in (
            "first",  # of its keys, head first
            "length",
            "blocks",  # of the prompt
            "blocks_per_key",
            "part",
            "next_ahead",
            "is_ahead",  # whether blocks have been fetched for it while it waits
            "ahead_bytes",
        )
    ]
    + [("window", np.int64, (PLACES,)), ("next_beyond", np.int64, (PLACES,))]
)
HIT = np.dtype(  # the cached head of a prompt
    [
        (name, np.int64)
        for name in (
            "version",  # of the cache when it was looked up
            "found",  # keys
            "tokens",
            "load_bytes",  # of one rank, over PCIe
            "slow",  # whether blocks must come up to DDR first
        )
    ]
    + [("landed_s", np.float64), ("blocks", np.int64, (PLACES,))]  # when those on their way will be in DDR; by tier
)
CANDIDATE = np.dtype(  # a replica as a router sees it
    [
        ("requests", np.int64),  # that it has and that have not left
        ("outstanding_tokens", np.int64),  # prompts and outputs of these
        ("cached_tokens", np.int64),  # of the prompt's head
        ("ttft_s", np.float64),  # estimated, if it takes the request
        ("prefill_s", np.float64),
    ]
)
SHELF = np.dtype(
    [
        (name, np.int64)
        for name in (
            "parts",
            "level",  # what the eviction order knows beside age, and whether use makes young
            "renewed_by_use",
            "back",
            "cheaper",
            "prefetch",
            "shared",  # whether a tier is everybody's
            "hosts",
            "replicas_per_host",
            "ranks",
            "block_tokens",
            "block_bytes",  # of all ranks
            "block_hbm_bytes",  # of these, what is in HBM while a sequence runs
            "keys",
            "closed",  # whether a tier that has a key has all that come before it in its prompt
            "stamp",
        )
    ]
    + [
        (name, np.float64) for name in ("pcie_up_s", "pcie_down_s")
    ]  # for each byte of a rank of all stages, alone on the host
    + [("widest_stage", np.float64)]  # the largest part of what a block has in HBM that a stage holds
)


class Prefixes(NamedTuple):
    """All prefix caches of a cluster; without any, its arrays are empty."""

    shelf: Record
    caches: Records  # (replicas, parts)
    tiers: Records
    held: Records  # of each memory
    entries: Records  # of all tiers; those that are free are the last ones of `heap`
    heap: Ints
    ages: Ints  # (entries and tiers, 2): a ring of each tier: the next older and newer entry, and itself in between
    table: Ints  # (places, 2): where a memory has a key (`prefix_index`)
    needs: Ints  # (places, 2): by how many requests of a look-ahead window a key is needed
    keys: Ints  # of all prompts
    chains: Records  # of each request
    hits: Records  # of each request, and one to look ahead
    known: Ints  # of each key: how many requests have asked for it, or when it is used next
    after: Ints  # for each of `keys` where the key is used next
    landing_s: Floats  # (hosts, keys): when what is on its way up to DDR will be there
    links: Records  # (hosts, slow tiers, directions)
    marks: Ints  # (2, keys of a prompt): scratch
    rest: Ints  # scratch: a part of a chain
    evicted: Ints  # (entries, 2): scratch: keys and bytes
    sinking: Ints  # (entries, 5): scratch: place, key, bytes, whether it comes from HBM, and was evicted
    candidates: Records  # scratch
