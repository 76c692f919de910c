"""What tests may reach of the engine beside `simulate`; all else of it moves freely behind these names.

An `Engine` and the records of its `cluster` (layouts in `state/records.py`), the closed form of decode runs, the
routers' choices among candidates, one prefix cache by itself and its index, and which turns of a trace go on from
which. Nothing of kvsim imports this.
"""

from kvsim.engine.batch import runs
from kvsim.engine.caches import eviction, index, prefix_cache, prompts, reuse, window
from kvsim.engine.caches.foresight import Chains
from kvsim.engine.caches.state import CACHE, CANDIDATE, PLACES, SLOW, TIER
from kvsim.engine.caches.tiers import PrefixTiers, cache_arrays, links_of
from kvsim.engine.desk import Engine
from kvsim.engine.requests import routing
from kvsim.engine.sessions.turns import find_turns
from kvsim.engine.state.cluster import DDR, HBM, KEPT, MOST_PARTS, NOBODY, OPEN_SPANS, PARKED, WAITING
from kvsim.engine.state.records import PART, REPLICA, REQUEST

__all__ = [
    "CACHE",
    "CANDIDATE",
    "DDR",
    "HBM",
    "KEPT",
    "MOST_PARTS",
    "NOBODY",
    "OPEN_SPANS",
    "PARKED",
    "PART",
    "PLACES",
    "REPLICA",
    "REQUEST",
    "SLOW",
    "TIER",
    "WAITING",
    "Chains",
    "Engine",
    "PrefixTiers",
    "cache_arrays",
    "eviction",
    "find_turns",
    "index",
    "links_of",
    "prefix_cache",
    "prompts",
    "reuse",
    "routing",
    "runs",
    "window",
]
