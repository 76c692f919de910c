"""How long one iteration of a batch takes: its operations on in-order lanes, layer after layer.

Lanes are what CUDA streams are: each runs its operations in the order in which the plan lists them, and an operation
starts when its lane is free and what it waits for is done. Over equal layers such a schedule settles into a constant
increment, so the layers that remain are charged at once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvsim.derive import AMOUNTS, LINKS, TIERS, OpShape, Structure, Vector
from kvsim.machine import ALONE, CPU, D2H, H2D, LANES, NVLINK, SM, Machine, Sharing
from policies.model import LayerShape, ModelShape

Floats = NDArray[np.float64]
BUSY = (*LANES, "work", "hbm")  # lanes, then the SMs' arithmetic and the HBM's transfers within the SM lane
WORK, HBM = len(LANES), len(LANES) + 1
SETTLED = 1e-9  # relative change of the increment per layer below which it counts as constant


class Load(NamedTuple):
    """The summed vectors of sequences whose plans share one structure."""

    structure: Structure
    amounts: Vector


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


class Prices(NamedTuple):
    """A structure's costs as arrays over its operations."""

    fixed_s: Floats
    rates_s: Floats  # (AMOUNTS x operations): seconds per unit of each column
    always: NDArray[np.bool_]
    lanes: Floats  # (lanes, operations): layers that run the operation on the lane
    inside: Floats  # (2, columns): layers whose SMs spend the column's time on arithmetic, and on HBM
    traffic: Vector  # (links, columns and tiers): bytes per link of all layers

    def seconds(self, amounts: Vector) -> tuple[Floats, Floats]:
        """For each operation the time that it takes, and for each column the time that it would take alone."""
        alone = amounts * self.rates_s
        arithmetic, transfers = alone[::AMOUNTS], alone[1::AMOUNTS] + alone[2::AMOUNTS]
        longer = np.maximum(arithmetic, transfers)
        return longer + self.fixed_s * (self.always | (longer > 0)), alone


class Iteration(NamedTuple):
    """One iteration's operations: their order, and for each what `Slot.time` indexes."""

    program: Program
    seconds: list[float]
    fixed_s: list[float]  # the part that is no transfer
    nbytes: list[int]


def _amounts(loads: Sequence[Load]) -> Vector:
    if not loads:
        return np.zeros(0, dtype=np.int64)
    return np.concatenate([load.amounts[: -len(TIERS)] for load in loads])


_NO_PRICES = Prices(
    fixed_s=np.zeros(0),
    rates_s=np.zeros(0),
    always=np.zeros(0, np.bool_),
    lanes=np.zeros((len(LANES), 0)),
    inside=np.zeros((2, 0)),
    traffic=np.zeros((len(LINKS), 0), np.int64),
)


class Clock:
    """Times of batches of one rank of a model on one machine."""

    def __init__(self, model: ModelShape, machine: Machine) -> None:
        self.model, self.machine = model, machine
        self._programs: dict[tuple[int, ...], Program] = {}
        self._compilations: dict[tuple[Sharing, tuple[int, ...]], tuple[Program, Prices]] = {}
        self._prices: dict[int, Prices] = {}
        self._kept: list[Structure] = []  # ids above stay valid while these live
        self._shapes: list[LayerShape] = list(dict.fromkeys(model.layers))
        self._head_bytes = model.head_bytes
        one, two = (machine.head_s(model, logits) for logits in (1, 2))
        self._head_s = (2 * one - two, two - one)  # once, and for each position
        self._model_times: dict[int, tuple[Floats, Floats, int]] = {}

    def traffic(self, load: Load) -> Vector:
        """Bytes per link of LINKS that a load moves, over all layers."""
        return self.prices(load.structure).traffic @ load.amounts

    def iteration(
        self, loads: Sequence[Load], tokens: int, logits: int, sharing: Sharing | None = None
    ) -> tuple[float, Floats]:
        """Duration of one iteration and the seconds that it keeps each of BUSY occupied.

        Every layer runs for `tokens` new tokens under `loads`, then the head for `logits` rows; `sharing` says who else
        uses the host, by default only the replica's own ranks.
        """
        model_times, busy, _ = self._model(tokens)
        busy = busy.copy()
        head_s = self.head_s(logits) if logits else 0.0
        if logits:
            busy[SM] += head_s
            busy[HBM] += self._head_s[0]
        times = model_times
        program, prices = self._compiled([load.structure for load in loads], sharing or self.machine.sharing)
        if loads:
            seconds, alone = prices.seconds(_amounts(loads))
            busy[: len(LANES)] += prices.lanes @ seconds
            busy[len(LANES) :] += prices.inside @ alone
            times = np.concatenate([model_times, seconds])
        return _run(program, times) + head_s, busy

    def work(self, loads: Sequence[Load], tokens: int) -> Iteration:
        """The operations of an iteration as if alone on the host, for whoever schedules and shares by itself."""
        model_times, _, _ = self._model(tokens)
        program, prices = self._compiled([load.structure for load in loads], ALONE)
        amounts = _amounts(loads)
        before, nothing = [0.0] * len(model_times), [0] * len(model_times)
        return Iteration(
            program,
            [*model_times.tolist(), *prices.seconds(amounts)[0].tolist()],
            before + prices.fixed_s.tolist(),
            nothing + (amounts[1::AMOUNTS] + amounts[2::AMOUNTS]).tolist(),
        )

    def head_s(self, logits: int) -> float:
        """Time of the output head for `logits` positions, at least one."""
        return self._head_s[0] + logits * self._head_s[1]

    def _model(self, tokens: int) -> tuple[Floats, Floats, int]:
        found = self._model_times.get(tokens)
        if found is None:
            model, machine = self.model, self.machine
            times, busy, weights = [0.0], np.zeros(len(BUSY)), 0
            reduce_s = machine.allreduce_s(model, tokens)
            for shape in self._shapes:
                parts = machine.layer_s(model, shape, tokens)
                times += [*parts, reduce_s]
                n = model.layers.count(shape)
                busy[SM] += n * sum(parts)
                busy[NVLINK] += n * 2 * reduce_s
                weights += n * model_bytes(model, shape, tokens)
            busy[HBM] = weights / machine.gpu.rates.hbm_Bps
            busy[WORK] = 2 * (model.active_params - model.head_params) * tokens / machine.gpu.rates.flops("bf16")
            found = self._model_times[tokens] = (np.array(times), busy, weights)
        return found

    def prices(self, structure: Structure) -> Prices:
        """The structure's costs as arrays."""
        prices = self._prices.get(id(structure))
        if prices is None:
            self._kept.append(structure)
            costs = [op.cost for op in structure.ops]
            lanes = np.zeros((len(LANES), len(costs)))
            traffic = np.zeros((len(LINKS), AMOUNTS * len(costs) + len(TIERS)), dtype=np.int64)
            for i, (op, n) in enumerate(zip(structure.ops, structure.multiplicity(), strict=True)):
                lanes[op.cost.lane, i] = n
                traffic[op.link, AMOUNTS * i + 1 : AMOUNTS * i + AMOUNTS] = n
            rates_s = [seconds for c in costs for seconds in (c.work_s, c.streamed_s, c.scattered_s)]
            inside = np.zeros((2, AMOUNTS * len(costs)))
            inside[0, ::AMOUNTS] = inside[1, 1::AMOUNTS] = inside[1, 2::AMOUNTS] = lanes[SM]
            prices = Prices(
                fixed_s=np.array([c.fixed_s for c in costs], dtype=np.float64),
                rates_s=np.array(rates_s, dtype=np.float64),
                always=np.array([op.syncs for op in structure.ops], dtype=np.bool_),
                lanes=lanes,
                inside=inside,
                traffic=traffic,
            )
            self._prices[id(structure)] = prices
        return prices

    def weight_bytes(self, tokens: int, logits: int) -> int:
        """Bytes of weights that one iteration reads."""
        return self._model(tokens)[2] + (self._head_bytes if logits else 0)

    def _compiled(self, structures: Sequence[Structure], sharing: Sharing) -> tuple[Program, Prices]:
        key = tuple(id(s) for s in structures)
        found = self._compilations.get((sharing, key))
        if found is None:
            self._kept += structures
            program = self._programs.get(key)
            if program is None:
                program = self._programs[key] = self._compile(structures)
            prices = [self.prices(s) for s in structures]
            joined = Prices(*(np.concatenate(c, axis=-1) for c in zip(*prices, strict=True))) if prices else _NO_PRICES
            found = self._compilations[sharing, key] = (program, self._shared(joined, sharing))
        return found

    def _shared(self, prices: Prices, sharing: Sharing) -> Prices:
        """Prices when others use the host: copies go no faster than a fair share, the CPU is divided evenly."""
        copies, cpu = prices.lanes[[H2D, D2H]].any(axis=0), prices.lanes[CPU] > 0
        floor_s = self.machine.copy_floor_s(sharing)

        def shared(seconds: Floats) -> Floats:
            return np.where(copies, np.maximum(seconds, floor_s), np.where(cpu, sharing.host * seconds, seconds))

        work_s, streamed_s, scattered_s = prices.rates_s.reshape(-1, AMOUNTS).T
        work_s = np.where(cpu, sharing.host * work_s, work_s)
        rates_s = np.stack([work_s, shared(streamed_s), shared(scattered_s)], axis=1)
        return prices._replace(rates_s=rates_s.reshape(-1))

    def uses_host(self, structures: Sequence[Structure]) -> bool:
        """Whether any operation of these structures runs on PCIe or on the CPU."""
        return any(op.cost.lane in (H2D, D2H, CPU) for s in structures for op in s.ops)

    def _compile(self, structures: Sequence[Structure]) -> Program:
        slots: dict[tuple[int, str], int] = {}
        depth = 1
        known: dict[tuple[int, ...], tuple[Slot, ...]] = {}
        runs: list[tuple[int, tuple[Slot, ...]]] = []
        for index, layer in enumerate(self.model.layers):
            kind = (self._shapes.index(layer), *(s.group_of[index] for s in structures))
            if kind not in known:
                known[kind], reach = _slots(self._layer_ops(structures, kind), slots)
                depth = max(depth, reach)
            if runs and runs[-1][1] is known[kind]:
                runs[-1] = (runs[-1][0] + 1, known[kind])
            else:
                runs.append((1, known[kind]))
        end, offset = [], 1 + 4 * len(self._shapes)
        for structure in structures:
            offset += len(structure.ops)
            end += [
                Slot(offset - len(structure.end) + i, op.cost.lane, 0.0, (), 0) for i, op in enumerate(structure.end)
            ]
        counts = np.zeros(offset)
        for n, program in (*runs, (1, tuple(end))):
            for slot in program:
                counts[slot.time] += n
        everything = [slot for _, program in runs for slot in program] + end
        elsewhere = tuple(sorted({slot.time for slot in everything if slot.lane != SM}))
        return Program(tuple(runs), tuple(end), len(slots), depth, counts, elsewhere)

    def _layer_ops(self, structures: Sequence[Structure], kind: tuple[int, ...]) -> list["_Op"]:
        base, offset = 1 + 4 * kind[0], 1 + 4 * len(self._shapes)
        ops = [_Op("qkv", base, SM, 0.0, (("mlp@-1", -1),), -1)]
        for s, (structure, group) in enumerate(zip(structures, kind[1:], strict=True)):
            first = offset + sum(len(g) for g in structure.groups[:group])
            ops += [_policy_op(op, first + i, s) for i, op in enumerate(structure.groups[group])]
            offset += len(structure.ops)
        ops.append(_Op("out", base + 1, SM, 0.0, tuple(("attend", s) for s in range(len(structures))), -1))
        if self.machine.tp == 1:  # nothing to reduce: the MLP follows the projection on the same lane
            return [*ops, _Op("mlp", base + 2, SM, 0.0, (("out", -1),), -1)]
        return [
            *ops,
            _Op("reduce_out", base + 3, NVLINK, 0.0, (("out", -1),), -1),
            _Op("mlp_local", base + 2, SM, 0.0, (("reduce_out", -1),), -1),
            _Op("mlp", base + 3, NVLINK, 0.0, (("mlp_local", -1),), -1),
        ]


class _Op(NamedTuple):
    name: str
    time: int
    lane: int
    sm_share: float
    after: tuple[tuple[str, int], ...]
    scope: int  # the structure that the name belongs to; -1: the model


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


def _run(program: Program, seconds: Floats) -> float:
    times = seconds.tolist()
    if not any(times[i] for i in program.elsewhere):  # one queue: nothing overlaps
        return float(program.layers @ seconds)
    free = [0.0] * len(LANES)
    done = [[0.0] * program.slots for _ in range(program.depth + 1)]  # finish times, this layer first
    for repeat, slots in program.runs:
        used = sorted({slot.lane for slot in slots if times[slot.time]})
        before: list[float] = []
        increment = -1.0
        layer = 0
        while layer < repeat:
            done.insert(0, done.pop())
            done[0][:] = [0.0] * program.slots
            _advance(slots, times, free, done)
            layer += 1
            state = [free[lane] for lane in used]
            if before:
                steps = [now - then for now, then in zip(state, before, strict=True)]
                if max(steps) - min(steps) <= SETTLED * max(steps) and abs(steps[0] - increment) <= SETTLED * increment:
                    skipped = (repeat - layer) * steps[0]
                    for lane in used:
                        free[lane] += skipped
                    for row in done:
                        row[:] = [t + skipped if t else 0.0 for t in row]
                    break
                increment = steps[0]
            before = state
    for slot in program.end:
        free[slot.lane] = max(free) + times[slot.time]
    return max(free)


def model_bytes(model: ModelShape, layer: LayerShape, tokens: int) -> int:
    """Bytes of weights that one layer reads for a batch of `tokens`."""
    return model.bytes_of(layer.qkv_params + layer.out_params) + model.mlp_bytes_touched(layer, tokens)


def _advance(slots: Sequence[Slot], times: Sequence[float], free: list[float], done: Sequence[list[float]]) -> None:
    now = done[0]
    for time, lane, sm_share, waits, slot in slots:
        start = free[lane]
        for back, other in waits:
            ready = done[back][other]
            start = max(start, ready)
        seconds = times[time]
        finish = start + seconds
        if seconds:
            free[lane] = finish
            if sm_share:
                free[SM] += sm_share * seconds
        now[slot] = finish
