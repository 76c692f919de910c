"""The micro-batches of a pipeline's iterations as who watches or keeps the time wants them: what is where, and when."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from kvsim.engine.batch.crowd import LARGE, SMALL
from kvsim.engine.batch.load import decoding_alone, scheduled, share_of
from kvsim.engine.batch.meeting import BEGIN
from kvsim.engine.pipeline import circulate, lap, micro_batches
from kvsim.engine.speculation import guess
from kvsim.engine.state.cluster import COUNT, DECODING, N_TIERS, STORED, Cluster, Ints, Prices
from kvsim.iteration.busy import BUSY
from kvsim.iteration.clock import Load
from kvsim.iteration.timeline import Piece, Round
from kvsim.plans.derive import Structure


class MicroBatch(NamedTuple):
    """What one micro-batch computes, and the seconds of guessing that follow it."""

    loads: list[Load]
    tokens: int
    logits: int
    decodes: int  # sequences
    prompt_tokens: int
    guess_s: float

    def same(self, other: "MicroBatch") -> bool:
        """Whether another computes the same."""
        return self[1:] == other[1:] and len(self.loads) == len(other.loads) and all(
            one.structure is two.structure and np.array_equal(one.amounts, two.amounts)
            for one, two in zip(self.loads, other.loads, strict=True)
        )  # fmt: skip


def load_of(structures: Sequence[Structure], structure: int, row: Ints) -> Load:
    """A row of the state, for a clock."""
    shape = structures[structure]
    return Load(shape, np.roll(row[STORED : STORED + shape.columns], -N_TIERS))


def of_iteration(cluster: Cluster, structures: Sequence[Structure], number: int) -> list[MicroBatch]:
    """Those of the iteration that a replica has under way."""
    world, replica, found = cluster.world, cluster.replicas[number], []
    parts, decoding = int(replica["round_parts"]), int(replica["length"][DECODING])
    for part in range(parts):
        batch = scheduled(cluster, number, part, parts)
        decodes = share_of(decoding, part + 1, parts) - share_of(decoding, part, parts)
        prompt_tokens = int(batch.tokens - decodes * world["step_tokens"])
        loads = [load_of(structures, int(row[0]), row) for row in batch.loads]
        guess_s = guess(world, np.zeros(len(BUSY)), decodes, prompt_tokens)
        found.append(MicroBatch(loads, int(batch.tokens), int(batch.logits), decodes, prompt_tokens, guess_s))
    return found


def pieces_of(
    cluster: Cluster,
    structures: Sequence[Structure],
    number: int,
    stages: Sequence[range],
    head_s: Callable[[int], float],
) -> list[Piece]:
    """Where and when the micro-batches of the iteration that was priced last are; `head_s` prices heads."""
    found = []
    for part, batch in enumerate(of_iteration(cluster, structures, number)):
        for stage, layers in enumerate(stages):
            last = stage == len(stages) - 1
            begin_s, end_s = (float(cluster.spans[end, stage, part]) for end in range(2))
            tail_s = head_s(batch.logits) + batch.guess_s if last else 0.0
            sharing = cluster.stages[number, stage]["sharing"].copy()
            logits, guess_s = (batch.logits, batch.guess_s) if last else (0, 0.0)
            seconds = end_s - begin_s + tail_s
            found.append(Piece(stage, layers, begin_s, seconds, batch.loads, batch.tokens, logits, sharing, guess_s))
    return found


def round_of(
    cluster: Cluster, prices: Prices, structures: Sequence[Structure], number: int, stages: Sequence[range]
) -> Round:
    """The run that a replica has begun: as micro-batches go round once they follow one another as they will."""
    world, replica, kept = cluster.world, cluster.replicas[number], cluster.stages[number].copy()
    decoding = int(replica["decoding_now"])
    parts = micro_batches(world, decoding)
    circulate(cluster, prices, number, decoding_alone(cluster, number, 0).loads, np.zeros(len(BUSY)))
    lap(cluster, number, parts)
    out_s, sums = float(world["exit_s"][parts - 1]), cluster.sums[number]
    used, pieces, growth = np.flatnonzero(sums[:, 0, COUNT]), [], []
    for part in range(parts):
        size = share_of(decoding, part + 1, parts) - share_of(decoding, part, parts)
        kind = LARGE if size > decoding // parts else SMALL
        first, more = (
            [load_of(structures, s, np.rint(sums[s, i] * (size / decoding)).astype(np.int64)) for s in used.tolist()]
            for i in range(2)
        )
        tokens = int(size * world["step_tokens"])
        for stage, layers in enumerate(stages):
            last, own = stage == len(stages) - 1, cluster.stages[number, stage]
            begin_s, seconds = float(cluster.spans[BEGIN, stage, part]) - out_s, float(own["part_s"][kind])
            sharing = (own["of_large"] if kind == LARGE else own["sharing"]).copy()
            guess_s = guess(world, np.zeros(len(BUSY)), size, 0) if last else 0.0
            logits = tokens if last else 0
            pieces.append(Piece(stage, layers, begin_s, seconds, first, tokens, logits, sharing, guess_s))
            growth.append(more)
    cluster.stages[number] = kept  # looking changes nothing
    steps = [
        (int(part["steps"]), float(part["first_s"]), float(part["slope_s"]))
        for part in cluster.parts[number][: replica["n_parts"]]
    ]
    return Round(float(replica["began_s"] + replica["run_stall_s"]), steps, pieces, growth)
