"""The entries of a tier by age: a ring from the oldest to the youngest, in which each step costs the same.

It closes through a place of the tier's own, whose newer neighbour is the oldest entry and whose older one the youngest.
"""

from kvsim.engine.caches.state import NEWER, OLDER, Prefixes
from kvsim.engine.state.cluster import Record


def join(prefixes: Prefixes, tier: Record, index: int) -> None:
    """Let an entry that is in no ring be the youngest of a tier."""
    ages, ring = prefixes.ages, tier["ring"]
    youngest = ages[ring, OLDER]
    ages[index, OLDER], ages[index, NEWER] = youngest, ring
    ages[youngest, NEWER], ages[ring, OLDER] = index, index


def part(prefixes: Prefixes, index: int) -> None:
    """Take an entry out of its ring."""
    ages = prefixes.ages
    older, newer = ages[index, OLDER], ages[index, NEWER]
    ages[older, NEWER], ages[newer, OLDER] = newer, older


def oldest(prefixes: Prefixes, tier: Record) -> int:
    """The oldest entry of a tier that has one."""
    return int(prefixes.ages[tier["ring"], NEWER])
