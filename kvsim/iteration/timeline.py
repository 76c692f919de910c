"""Every operation within a window of simulated time: on which lane of which replica it ran, from when to when."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvsim.hardware.machine import LANES, SM, Sharing
from kvsim.iteration.makespan import Clock, Load
from kvsim.iteration.program import Floats, Program
from kvsim.plans.derive import Structure

MOST_OPERATIONS = 250_000  # a viewer takes more, but not with ease
BESIDE = ("stall", "load", "store", "handoff")  # lanes beside those of the machine; all but the first only in `op`
STALL, LOAD, STORE, HANDOFF = range(len(LANES), len(LANES) + len(BESIDE))
OWN = ("qkv", "out", "mlp", "all-reduce")  # what the model itself runs, for each shape of layer


class Span(NamedTuple):
    """An iteration or a run of decode iterations that a replica has begun."""

    began_s: float
    stall_s: float  # swaps that it waits for first
    steps: Sequence[tuple[int, float, float]]  # so many iterations: seconds of the first, and how many each adds
    loads: Sequence[Load]  # of the first one
    growth: Sequence[Load]  # and what each further one adds
    tokens: int
    logits: int
    sharing: Sharing
    guess_s: float  # after the head, in each of them


class Scheduled(NamedTuple):
    """One operation of an iteration, in seconds since that began."""

    time: int  # which operation, by `Slot.time`
    lane: int
    layer: int
    begin_s: float
    end_s: float


class Timeline:
    """Collects the operations of a window; those at its edges whole."""

    def __init__(self, clock: Clock, window_s: tuple[float, float]) -> None:
        self.clock, self.window_s = clock, window_s
        self._spans: dict[int, Span] = {}
        self._names: dict[str, int] = {}
        self._rows: list[tuple[int, int, int, int, float, float]] = []

    def begin(self, number: int, span: Span) -> None:
        """A replica begins something, so what it did before is over."""
        self._close(number, span.began_s)
        self._spans[number] = span

    def add(self, number: int, lane: int, name: str, layer: int, begin_s: float, end_s: float) -> None:
        """Record one operation if it overlaps the window; ValueError when that has too many."""
        from_s, to_s = self.window_s
        if end_s <= begin_s or end_s <= from_s or begin_s >= to_s:
            return
        if len(self._rows) == MOST_OPERATIONS:
            raise ValueError(
                f"perfetto={from_s:g}-{to_s:g}: {MOST_OPERATIONS:,} operations, the most that are recorded, end at "
                f"{begin_s:.6g} s; choose a window that ends earlier"
            )
        self._rows.append((number, lane, self._names.setdefault(name, len(self._names)), layer, begin_s, end_s))

    def columns(self) -> dict[str, NDArray[Any]]:
        """What has been recorded, in order of replica, lane and time: replica, lane, operation, layer, times."""
        for number in [*self._spans]:
            self._close(number, np.inf)
        rows = np.array(
            self._rows,
            dtype=[(n, np.int32) for n in ("replica", "lane", "operation", "layer")]
            + [(n, np.float64) for n in ("begin_s", "end_s")],
        )
        rows = rows[np.lexsort((rows["begin_s"], rows["lane"], rows["replica"]))]
        names = np.array([*self._names], dtype=object)
        lanes = np.array([*LANES, *BESIDE], dtype=object)
        return {
            "replica": rows["replica"],
            "lane": lanes[rows["lane"]],
            "operation": names[rows["operation"]],
            "layer": rows["layer"],
            "begin_s": rows["begin_s"],
            "end_s": rows["end_s"],
        }

    def _close(self, number: int, end_s: float) -> None:
        span = self._spans.pop(number, None)
        if span is None:
            return
        from_s, to_s = self.window_s
        at_s, done = span.began_s + span.stall_s, 0
        self.add(number, STALL, "waits for swaps", 0, span.began_s, at_s)
        for steps, first_s, slope_s in span.steps:
            for step in range(steps):
                seconds = first_s + step * slope_s
                if at_s + seconds / 2 > end_s or at_s >= to_s:
                    return
                if at_s + seconds > from_s:
                    self._iteration(number, span, done, at_s, seconds)
                at_s += seconds
                done += 1

    def _iteration(self, number: int, span: Span, step: int, began_s: float, seconds: float) -> None:
        loads = span.loads
        if step:
            loads = [
                Load(load.structure, load.amounts + step * growth.amounts)
                for load, growth in zip(loads, span.growth, strict=True)
            ]
        work = self.clock.work(loads, span.tokens, span.sharing)
        names = operation_names(self.clock, [load.structure for load in loads])
        rows = schedule(work.program, np.array(work.seconds))
        head_s = self.clock.head_s(span.logits) if span.logits else 0.0
        makespan_s = max(row.end_s for row in rows)
        # Runs are priced in closed form, to 1e-7: stretched so that one iteration ends where the next begins.
        stretch = seconds / (makespan_s + head_s + span.guess_s)
        for time, lane, layer, begin_s, end_s in rows:
            self.add(number, lane, names[time], layer, began_s + stretch * begin_s, began_s + stretch * end_s)
        headed_s = began_s + seconds - stretch * span.guess_s
        self.add(number, SM, "head", 0, began_s + stretch * makespan_s, headed_s)
        self.add(number, SM, "guess", 0, headed_s, began_s + seconds)


def operation_names(clock: Clock, structures: Sequence[Structure]) -> list[str]:
    """What `Slot.time` counts in a program of these structures, by name."""
    shapes = len(dict.fromkeys(clock.model.layers))
    return ["", *OWN * shapes, *(op.name for structure in structures for op in structure.ops)]


def schedule(program: Program, seconds: Floats) -> list[Scheduled]:
    """Every operation of an iteration that takes time, layer by layer, none skipped.

    What the SMs lose to a kernel that copies stands on their lane as the copy does on its own.
    """
    times, rows, layer = seconds.tolist(), [], 0
    free = [0.0] * len(LANES)
    done = [[0.0] * program.slots for _ in range(program.depth + 1)]
    for repeat, slots in program.runs:
        for _ in range(repeat):
            done.insert(0, done.pop())
            done[0][:] = [0.0] * program.slots
            for slot in slots:
                start = max([free[slot.lane], *(done[back][other] for back, other in slot.waits)])
                end = done[0][slot.slot] = start + times[slot.time]
                if times[slot.time]:
                    free[slot.lane] = end
                    rows.append(Scheduled(slot.time, slot.lane, layer, start, end))
                    lost_s = slot.sm_share * times[slot.time]
                    if lost_s:
                        rows.append(Scheduled(slot.time, SM, layer, free[SM], free[SM] + lost_s))
                        free[SM] += lost_s
            layer += 1
    for slot in program.end:
        start = max(free)
        free[slot.lane] = start + times[slot.time]
        if times[slot.time]:
            rows.append(Scheduled(slot.time, slot.lane, layer - 1, start, free[slot.lane]))
    return rows
