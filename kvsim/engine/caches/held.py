"""How full the memories below DDR are: at their fullest, and in the mean. (Above, replicas count what they hold.)"""

from kvsim.engine.caches.state import PLACES, SLOW, Prefixes
from kvsim.engine.state.cluster import NOBODY


def note_held(prefixes: Prefixes, number: int, part: int, now_s: float) -> None:
    """Note what a replica may have changed in the slow tiers of a part."""
    for place in range(SLOW, PLACES):
        index = prefixes.caches[number, part]["tiers"][place]
        if index == NOBODY:
            continue
        tier = prefixes.tiers[index]
        if tier["used_bytes"] != tier["noted_bytes"]:
            held = prefixes.held[tier["memory"]]
            held["byte_s"] += held["nbytes"] * (now_s - held["since_s"])
            held["since_s"] = now_s
            held["nbytes"] += tier["used_bytes"] - tier["noted_bytes"]
            held["peak_bytes"] = max(held["peak_bytes"], held["nbytes"])
            tier["noted_bytes"] = tier["used_bytes"]
