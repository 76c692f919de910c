"""How many of a host's GPUs use a link at a time, by chance, and what that leaves each of them.

Neighbours are independent of each other: each uses the link for a share of the time. What a transfer that lasts has of
it is the mean over how many do. (Max-min fair shares of equal users; `kvsim.hardware.fairshare` settles the rest.)
"""

from kvsim.hardware.machine import ALONE, CROWDED, FLOOR, Floats

MOST_GPUS = 64  # of a host that are told apart: if more use a link at a time, these many do


def begin(chances: Floats) -> int:
    """Nobody uses a link: `chances` are those of so many GPUs that do, by their number; the largest number, none."""
    chances[0] = 1.0
    return 0


def add(chances: Floats, most: int, gpus: int, use: float) -> int:
    """So many GPUs use it as well, all of them at the same time, for a share of the time; the largest number now."""
    if gpus == 0 or use == 0:
        return most
    larger = min(MOST_GPUS, most + gpus)
    for i in range(most + 1, larger + 1):
        chances[i] = 0.0
    for i in range(most, -1, -1):
        moved = chances[i] * use
        chances[i] -= moved
        chances[min(MOST_GPUS, i + gpus)] += moved
    return larger


def mean_share(chances: Floats, most: int, own: int) -> float:
    """The share of a link that each of `own` GPUs has, on average, when they use it."""
    share = 0.0
    for i in range(most + 1):
        share += chances[i] / (own + i)
    return share


def crowd(sharing: Floats, lane: int, chances: Floats, most: int, own: int, link_Bps: float, most_Bps: float) -> None:
    """Raise a lane's floors to those of a link that `own` GPUs use with others, none faster than `most_Bps`.

    Sets CROWDED and ALONE of `sharing` where this link leaves less than the one before.
    """
    alone_Bps, others, rate = min(most_Bps, link_Bps / own), 1 - chances[0], 0.0
    for i in range(1, most + 1):
        rate += chances[i] * min(most_Bps, link_Bps / (own + i))
    sharing[FLOOR, lane] = max(sharing[FLOOR, lane], 1 / alone_Bps)
    if others > 0 and others / rate > sharing[CROWDED, lane]:
        sharing[CROWDED, lane], sharing[ALONE, lane] = others / rate, chances[0]
