"""Structures, programs and times laid out as the arrays that prices are made from."""

from collections.abc import Sequence

import numpy as np

from kvsim.hardware.machine import HOST_LANES, LANES
from kvsim.iteration.arrays import Floats, Records
from kvsim.iteration.price import LAYERS, OP, PROGRAM, SLOT, STRUCTURE, TIME, WAIT, Prices
from kvsim.iteration.program import Program, Slot
from kvsim.plans.derive import Structure


def lay_out(
    structures: Sequence[Structure],
    stages: Sequence[range],
    combinations: Sequence[tuple[int, ...]],
    programs: Sequence[Sequence[Program]],
    model: tuple[Records, Records, Floats],
) -> Prices:
    """The arrays for combinations of structures, of each of which `programs` has one program for each stage.

    `model` are the fields `head`, `own` and `own_s` of `Prices`; they are kept, not copied.
    """
    ops: list[tuple[float, ...]] = []
    heads = []
    for structure in structures:
        uses_host = any(op.cost.lane in HOST_LANES for op in structure.ops)
        heads.append((len(ops), len(structure.ops), uses_host))
        for held in stages:
            for op, layers in zip(structure.ops, structure.multiplicity(held), strict=True):
                cost = op.cost
                rates_s = (cost.fixed_s, cost.work_s, cost.streamed_s, cost.scattered_s, cost.walked_s)
                ops.append((cost.lane, op.link, op.syncs, layers, *rates_s))
    keys = np.zeros((len(combinations), 1 + max(map(len, combinations), default=0)), dtype=np.int64)
    for index, combination in enumerate(combinations):
        keys[index, : 1 + len(combination)] = len(combination), *combination
    laid, runs, slots, waits, times = _programs([program for row in programs for program in row])
    every = [program for row in programs for program in row]
    head, own, own_s = model
    return Prices(
        structures=np.array(heads, dtype=STRUCTURE),
        ops=np.array(ops, dtype=OP),
        combinations=keys,
        programs=laid,
        layers=runs,
        slots=slots,
        waits=waits,
        times=times,
        head=head,
        own=own,
        own_s=own_s,
        seconds=np.zeros(max((len(program.layers) for program in every), default=1)),
        done_s=np.zeros(
            (1 + max((program.depth for program in every), default=1), max((p.slots for p in every), default=1))
        ),
        free_s=np.zeros(len(LANES)),
        before_s=np.zeros(len(LANES)),
        used=np.zeros(len(LANES), np.int64),
    )


def _programs(programs: Sequence[Program]) -> tuple[Records, Records, Records, Records, Records]:
    """The programs, and what they are made of: runs of equal layers, slots, waits and times."""
    found = []
    runs: list[tuple[int, int, int]] = []
    slots: list[tuple[float, ...]] = []
    waits: list[tuple[int, int]] = []
    times: list[tuple[float, ...]] = []

    def add(sequence: Sequence[Slot]) -> tuple[int, int]:
        for slot in sequence:
            slots.append((slot.time, slot.lane, len(waits), len(slot.waits), slot.slot, slot.sm_share))
            waits.extend(slot.waits)
        return len(slots) - len(sequence), len(sequence)

    for program in programs:
        own = [(repeat, *add(sequence)) for repeat, sequence in program.runs]
        where = (len(runs), len(own), *add(program.end), program.depth, len(times), len(program.layers))
        found.append((*where, program.layers_apart))
        runs += own
        times += [(n, i in program.elsewhere) for i, n in enumerate(program.layers.tolist())]
    return (
        np.array(found, dtype=PROGRAM),
        np.array(runs, dtype=LAYERS),
        np.array(slots, dtype=SLOT),
        np.array(waits, dtype=WAIT),
        np.array(times, dtype=TIME),
    )
