"""The iteration of a pipeline that comes next, for who keeps the time.

Where sequences decode, micro-batches of an iteration begin before the one before it has ended: each when its tokens are
out. Who waits for them asks here what the next iteration will compute unless somebody comes until it begins.
"""

from typing import Any, NamedTuple

from kvsim.engine.desk import Engine
from kvsim.engine.micro_batches import MicroBatch
from kvsim.engine.state.cluster import ITERATING, Records

WRITTEN = ("notes", "gaps", "aways")  # rows are added to these, and `world` says how many there are


class Round(NamedTuple):
    """An iteration's micro-batches, and whether those of prompts need not wait until the one before has ended."""

    parts: list[MicroBatch]
    follows: bool


def next_round(engine: Engine, number: int, now_s: float) -> Round:
    """What a replica would compute if its iteration ended now; without micro-batches if it would wait for something."""
    before = _State(engine)
    engine.cluster.replicas[number]["round_end_s"] = now_s
    try:
        engine.step(number, now_s)
        cluster = engine.cluster
        if cluster.replicas[number]["phase"] != ITERATING:
            return Round([], follows=False)
        return Round(engine.micro_batches(number), bool(cluster.world["ready_s"] < now_s))
    finally:
        before.restore(engine)


class _State:
    """All that a step of an engine may change, but for the plans that it has derived, and their order: they hold."""

    def __init__(self, engine: Engine) -> None:
        cluster, prefixes = engine.cluster, engine.cluster.prefixes
        self._world = {name: cluster.world[name].copy() for name in cluster.world.dtype.names if name != "first_piece"}
        self._shelf = {name: prefixes.shelf[name].copy() for name in prefixes.shelf.dtype.names}
        self._before = cluster
        self._kept = engine.written_rows()
        self._arrays = _copies(cluster, ("world", "prefixes", "plans", "features", "rows", "sums", *WRITTEN))
        self._caches = _copies(prefixes, ("shelf",))
        self._sums = cluster.sums.copy()

    def restore(self, engine: Engine) -> None:
        """Let the engine be as it was."""
        engine.forget_rows(self._kept, self._before)
        cluster, sums = engine.cluster, self._sums
        for saved, state in ((self._world, cluster.world), (self._shelf, cluster.prefixes.shelf)):
            for name, value in saved.items():
                state[name] = value
        for saved, state in ((self._arrays, cluster), (self._caches, cluster.prefixes)):
            for name, value in saved.items():
                getattr(state, name)[...] = value
        cluster.sums[...] = 0  # there may be more structures by now
        cluster.sums[:, : sums.shape[1], :, : sums.shape[3]] = sums


def _copies(state: Any, but: tuple[str, ...]) -> dict[str, Records]:
    return {name: getattr(state, name).copy() for name in state._fields if name not in but}
