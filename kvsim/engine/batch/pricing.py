"""How long an iteration of a replica's batch takes: what `kvsim.iteration.price` needs for that is looked up."""

from kvsim.engine.batch.load import Scheduled
from kvsim.engine.state.cluster import WANT_PROGRAM, WANT_TIMES, Detour, Floats, Ints, Prices, Record
from kvsim.iteration.price import Batch, price


def price_batch(
    world: Record, prices: Prices, batch: Scheduled, share: float, stage: int, sharing: Floats, busy: Floats
) -> float:
    """Seconds of an iteration on a stage, where a share of the batch's loads is; sets the seconds of each of BUSY.

    The last stage has the head. May make detours.
    """
    logits = batch.logits if stage == world["stages"] - 1 else 0
    own, head = prices.own[batch.tokens * world["stages"] + stage], prices.head[logits]
    if not own["known"] or not head["known"]:
        world["wanted"][0], world["wanted"][1], world["wanted"][2] = WANT_TIMES, batch.tokens, logits
        raise Detour
    program = prices.programs[_program_of(world, prices, batch.loads) * world["stages"] + stage]
    own_s = prices.own_s[batch.tokens]
    return price(prices, Batch(program, own, own_s, batch.loads, share, stage, head, logits), sharing, busy)


def _program_of(world: Record, prices: Prices, loads: Ints) -> int:
    for index in range(len(prices.combinations)):
        if prices.combinations[index, 0] == len(loads):
            same = True
            for i in range(len(loads)):
                same = same and prices.combinations[index, 1 + i] == loads[i, 0]
            if same:
                return index
    world["wanted"][0], world["wanted"][1] = WANT_PROGRAM, len(loads)
    raise Detour
