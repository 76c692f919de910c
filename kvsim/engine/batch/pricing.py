"""How long an iteration of a replica's batch takes: what `kvsim.iteration.price` needs for that is looked up.

The batch are the rows that `load.py` has set.
"""

from kvsim.engine.state.cluster import WANT_PROGRAM, WANT_TIMES, Detour, Floats, Ints, Prices, Record
from kvsim.iteration.price import Batch, price


def price_batch(
    world: Record,
    prices: Prices,
    rows: Ints,
    first: int,
    stage: int,
    share: float,
    tokens: int,
    logits: int,
    sharing: Floats,
) -> float:
    """Seconds of an iteration of `tokens` new tokens and `logits` rows of the head on a stage; sets `busy_s`.

    The batch are a share of the `loads` rows from the first on; the last stage has the head. May make detours.
    """
    own = prices.own[tokens * world["stages"] + stage]
    if not own["known"]:
        world["wanted"][0], world["wanted"][1] = WANT_TIMES, tokens
        raise Detour
    loads = rows[first : first + world["loads"]]
    program = prices.programs[_program_of(world, prices, loads) * world["stages"] + stage]
    if stage < world["stages"] - 1:
        logits = 0
    batch = Batch(program, own, prices.own_s[tokens], loads, share, stage, logits)
    return price(prices, batch, sharing, world["busy_s"])


def _program_of(world: Record, prices: Prices, loads: Ints) -> int:
    for index in range(len(prices.combinations)):
        if prices.combinations[index, 0] == len(loads):
            same = True
            for i in range(len(loads)):
                same = same and prices.combinations[index, 1 + i] == loads[i, 0]
            if same:
                return index
    world["wanted"][0] = WANT_PROGRAM
    raise Detour
