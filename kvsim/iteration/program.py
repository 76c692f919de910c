"""The order in which one iteration's operations are issued to the lanes, layer after layer, and what each waits for."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvsim.hardware.machine import NVLINK, SM
from kvsim.iteration.arrays import Floats
from kvsim.plans.derive import OpShape, Structure
from policies.model import ModelShape


class Slot(NamedTuple):
    """One operation of a layer's program: where its time stands, its lane, and the slots that it waits for."""

    time: int
    lane: int
    sm_share: float
    waits: tuple[tuple[int, int], ...]  # (layers back, slot)
    slot: int


class Program(NamedTuple):
    """The order of work for one set of structures: runs of equal layers, then what follows the last."""

    runs: tuple[tuple[int, tuple[Slot, ...]], ...]
    end: tuple[Slot, ...]
    slots: int
    depth: int  # how many layers back a wait may reach
    layers: Floats  # how many layers run each operation, by `Slot.time`
    elsewhere: tuple[int, ...]  # operations that are not on the SMs, by `Slot.time`
    layers_apart: bool  # no layer begins before the one before it has ended on every lane


def compile_program(model: ModelShape, structures: Sequence[Structure], tp: int, layers: range) -> Program:
    """The order of work of an iteration in which these layers run the operations of all `structures`.

    Times are indexed by `Slot.time`: one that is always 0, then for each distinct layer shape, in order of appearance,
    its projections, output projection, MLP and all-reduce, then the operations of each structure.
    """
    shapes = list(dict.fromkeys(model.layers))
    slots: dict[tuple[int, str], int] = {}
    depth = 1
    known: dict[tuple[int, ...], tuple[Slot, ...]] = {}
    runs: list[tuple[int, tuple[Slot, ...]]] = []
    for index in layers:
        layer = model.layers[index]
        kind = (shapes.index(layer), *(s.group_of[index] for s in structures))
        if kind not in known:
            known[kind], reach = _slots(_layer_ops(structures, kind, len(shapes), tp), slots)
            depth = max(depth, reach)
        if runs and runs[-1][1] is known[kind]:
            runs[-1] = (runs[-1][0] + 1, known[kind])
        else:
            runs.append((1, known[kind]))
    end, offset = [], 1 + 4 * len(shapes)
    for structure in structures:
        offset += len(structure.ops)
        end += [Slot(offset - len(structure.end) + i, op.cost.lane, 0.0, (), 0) for i, op in enumerate(structure.end)]
    counts = np.zeros(offset)
    for n, program in (*runs, (1, tuple(end))):
        for slot in program:
            counts[slot.time] += n
    everything = [slot for _, program in runs for slot in program] + end
    elsewhere = tuple(sorted({slot.time for slot in everything if slot.lane != SM}))
    apart = all(_stands_apart(layer) for layer in known.values())
    return Program(tuple(runs), tuple(end), len(slots), depth, counts, elsewhere, apart)


def _stands_apart(layer: Sequence[Slot]) -> bool:
    """Whether all operations of a layer lie between its first and its last one, so that layers follow one another.

    Each waits for another of its layer, and is itself awaited or runs on the last one's lane, which is in order.
    """
    within = all(slot.waits and not any(back for back, _ in slot.waits) for slot in layer[1:])
    awaited = {other for slot in layer for _, other in slot.waits}
    return within and all(slot.slot in awaited or slot.lane == layer[-1].lane for slot in layer)


class _Op(NamedTuple):
    name: str
    time: int
    lane: int
    sm_share: float
    after: tuple[tuple[str, int], ...]
    scope: int  # the structure that the name belongs to; -1: the model


def _layer_ops(structures: Sequence[Structure], kind: tuple[int, ...], shapes: int, tp: int) -> list[_Op]:
    base, offset = 1 + 4 * kind[0], 1 + 4 * shapes
    ops = [_Op("qkv", base, SM, 0.0, (("mlp@-1", -1),), -1)]
    for s, (structure, group) in enumerate(zip(structures, kind[1:], strict=True)):
        first = offset + sum(len(g) for g in structure.groups[:group])
        ops += [_policy_op(op, first + i, s) for i, op in enumerate(structure.groups[group])]
        offset += len(structure.ops)
    ops.append(_Op("out", base + 1, SM, 0.0, tuple(("attend", s) for s in range(len(structures))), -1))
    if tp == 1:  # nothing to reduce: the MLP follows the projection on the same lane
        return [*ops, _Op("mlp", base + 2, SM, 0.0, (("out", -1),), -1)]
    return [
        *ops,
        _Op("reduce_out", base + 3, NVLINK, 0.0, (("out", -1),), -1),
        _Op("mlp_local", base + 2, SM, 0.0, (("reduce_out", -1),), -1),
        _Op("mlp", base + 3, NVLINK, 0.0, (("mlp_local", -1),), -1),
    ]


def _policy_op(op: OpShape, time: int, scope: int) -> _Op:
    after = tuple((name, -1 if name.partition("@")[0] in ("qkv", "mlp") else scope) for name in op.after)
    return _Op(op.name, time, op.cost.lane, op.cost.sm_share, after, scope)


def _slots(ops: Sequence[_Op], slots: dict[tuple[int, str], int]) -> tuple[tuple[Slot, ...], int]:
    reach, program = 1, []
    for op in ops:
        waits = []
        for name, scope in op.after:
            base, _, back = name.partition("@")
            layers_back = -int(back) if back else 0
            reach = max(reach, layers_back)
            waits.append((layers_back, slots.setdefault((scope, base), len(slots))))
        slot = slots.setdefault((op.scope, op.name), len(slots))
        program.append(Slot(op.time, op.lane, op.sm_share, tuple(waits), slot))
    return tuple(program), reach
