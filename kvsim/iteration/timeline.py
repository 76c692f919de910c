"""Every operation within a window of simulated time: on which lane of which replica it ran, from when to when."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvsim.hardware.machine import LANES, SM
from kvsim.iteration.arrays import Floats
from kvsim.iteration.clock import Clock, Load
from kvsim.iteration.price import Prices, begin_layer, clear, run_last, run_op
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
    sharing: Floats  # of the host (`kvsim.hardware.machine.Machine.sharing`)
    guess_s: float  # after the head, in each of them


class Piece(NamedTuple):
    """What a stage of a pipeline computes of one micro-batch."""

    stage: int
    layers: range
    begin_s: float
    seconds: float  # with the head and guesses that follow its layers
    loads: Sequence[Load]
    tokens: int
    logits: int
    sharing: Floats
    guess_s: float


class Round(NamedTuple):
    """A run of decode iterations that a pipeline has begun: where its micro-batches are in each of them."""

    began_s: float
    steps: Sequence[tuple[int, float, float]]  # as those of a span, swaps in the first one's seconds
    pieces: Sequence[Piece]  # of the first iteration, in seconds before its end
    growth: Sequence[Sequence[Load]]  # of each piece, what each further iteration adds


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
        self._spans: dict[int, Span | Round] = {}
        self._names: dict[str, int] = {}
        self._rows: list[tuple[int, int, int, int, int, float, float]] = []

    def begin(self, number: int, span: Span | Round) -> None:
        """A replica begins something, so what it did before is over."""
        self._close(number, span.began_s)
        self._spans[number] = span

    def end(self, number: int, now_s: float) -> None:
        """What a replica did is over."""
        self._close(number, now_s)

    def add(self, number: int, lane: int, name: str, layer: int, begin_s: float, end_s: float, stage: int = 0) -> None:
        """Record one operation if it overlaps the window; ValueError when that has too many."""
        from_s, to_s = self.window_s
        if end_s <= begin_s or end_s <= from_s or begin_s >= to_s:
            return
        if len(self._rows) == MOST_OPERATIONS:
            raise ValueError(
                f"perfetto={from_s:g}-{to_s:g}: {MOST_OPERATIONS:,} operations, the most that are recorded, end at "
                f"{begin_s:.6g} s; choose a window that ends earlier"
            )
        self._rows.append((number, stage, lane, self._names.setdefault(name, len(self._names)), layer, begin_s, end_s))

    def columns(self) -> dict[str, NDArray[Any]]:
        """What has been recorded, in order of replica, stage, lane and time: these, operation, layer, times."""
        for number in [*self._spans]:
            self._close(number, np.inf)
        rows = np.array(
            self._rows,
            dtype=[(n, np.int32) for n in ("replica", "stage", "lane", "operation", "layer")]
            + [(n, np.float64) for n in ("begin_s", "end_s")],
        )
        rows = rows[np.lexsort((rows["begin_s"], rows["lane"], rows["stage"], rows["replica"]))]
        names = np.array([*self._names], dtype=object)
        lanes = np.array([*LANES, *BESIDE], dtype=object)
        return {
            "replica": rows["replica"],
            "stage": rows["stage"],
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
        if isinstance(span, Round):
            self._round(number, span, end_s)
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
        rows = schedule(work.prices)
        head_s = self.clock.head_s(span.logits)
        makespan_s = max(row.end_s for row in rows)
        # Runs are priced in closed form, to 1e-7: stretched so that one iteration ends where the next begins.
        stretch = seconds / (makespan_s + head_s + span.guess_s)
        for time, lane, layer, begin_s, end_s in rows:
            self.add(number, lane, names[time], layer, began_s + stretch * begin_s, began_s + stretch * end_s)
        headed_s = began_s + seconds - stretch * span.guess_s
        self.add(number, SM, "head", 0, began_s + stretch * makespan_s, headed_s)
        self.add(number, SM, "guess", 0, headed_s, began_s + seconds)

    def _round(self, number: int, span: Round, end_s: float) -> None:
        """Iterations of a run up to where it was cut; they overlap, so that each is laid out from its end."""
        at_s, done, whole_s = span.began_s, 0, span.steps[0][1]
        for steps, first_s, slope_s in span.steps:
            for step in range(steps):
                seconds = first_s + step * slope_s
                if at_s + seconds / 2 > end_s:
                    return
                at_s += seconds
                for piece, growth in zip(span.pieces, span.growth, strict=True):
                    factor = seconds / whole_s
                    loads = [
                        Load(load.structure, load.amounts + done * more.amounts)
                        for load, more in zip(piece.loads, growth, strict=True)
                    ]
                    begin_s = at_s + factor * piece.begin_s
                    self.piece(number, piece._replace(begin_s=begin_s, seconds=factor * piece.seconds, loads=loads))
                done += 1

    def piece(self, number: int, piece: Piece) -> None:
        """Record what a stage computes of a micro-batch."""
        from_s, to_s = self.window_s
        if piece.begin_s >= to_s or piece.begin_s + piece.seconds <= from_s:
            return
        work = self.clock.work(piece.loads, piece.tokens, piece.sharing, piece.layers)
        names = operation_names(self.clock, [load.structure for load in piece.loads])
        rows, head_s = schedule(work.prices), self.clock.head_s(piece.logits)
        layers_s = max(row.end_s for row in rows)
        stretch = piece.seconds / (layers_s + head_s + piece.guess_s)
        began_s, end_s = piece.begin_s, piece.begin_s + piece.seconds
        for time, lane, layer, first_s, last_s in rows:
            ends = began_s + stretch * first_s, began_s + stretch * last_s
            self.add(number, lane, names[time], piece.layers.start + layer, *ends, piece.stage)
        headed_s = end_s - stretch * piece.guess_s
        self.add(number, SM, "head", 0, began_s + stretch * layers_s, headed_s, piece.stage)
        self.add(number, SM, "guess", 0, headed_s, end_s, piece.stage)


def operation_names(clock: Clock, structures: Sequence[Structure]) -> list[str]:
    """What `Slot.time` counts in a program of these structures, by name."""
    shapes = len(dict.fromkeys(clock.model.layers))
    return ["", *OWN * shapes, *(op.name for structure in structures for op in structure.ops)]


def schedule(prices: Prices) -> list[Scheduled]:
    """Every operation that takes time of the iteration that was priced last, layer by layer, none skipped.

    `prices` has one program. What the SMs lose to a kernel that copies stands on their lane as the copy does on its
    own.
    """
    (program,), rows, layer, newest = prices.programs, [], 0, 0
    ring = int(program["depth"]) + 1
    clear(prices, ring)
    for run in prices.layers:
        for _ in range(run["repeat"]):
            newest = begin_layer(prices, newest, ring)
            for slot in prices.slots[run["slots"] : run["slots"] + run["n_slots"]]:
                time, lane, free_s = int(slot["time"]), int(slot["lane"]), float(prices.free_s[SM])
                begin_s, seconds = run_op(prices, slot, newest, ring), float(prices.seconds[time])
                if seconds:
                    rows.append(Scheduled(time, lane, layer, begin_s, begin_s + seconds))
                    if slot["sm_share"]:
                        rows.append(Scheduled(time, SM, layer, free_s, float(prices.free_s[SM])))
            layer += 1
    for slot in prices.slots[program["end"] : program["end"] + program["n_end"]]:
        time = int(slot["time"])
        begin_s, seconds = run_last(prices, slot), float(prices.seconds[time])
        if seconds:
            rows.append(Scheduled(time, int(slot["lane"]), layer - 1, begin_s, begin_s + seconds))
    return rows
