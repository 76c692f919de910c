"""A policy's plans as polynomials in the token counts: derived once for each shape of plan, evaluated for any sequence.

A vector of integers describes one step of one sequence: for each operation of each group of equal layers its work
(FLOPs, or elements searched), its bytes in contiguous rows and its bytes in scattered rows, then the bytes stored per
tier. Vectors of sequences whose plans have the same structure add up to that of their batch.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvsim.hardware.machine import Cost, Machine, access_bytes
from kvsim.plans.guessing import Guesser
from policies import LayerPlan, ModelShape, Policy, Step, plan_end, plan_layers
from policies.layer import LayerShape
from policies.plan import Buffer, Compute, Copy, Op, Processor, Tier, Work, stored_bytes
from policies.symbolic import Condition, Floor, Monomial, Polynomial, Tape, evaluate, polynomial_of, total

Vector = NDArray[np.int64]
AMOUNTS = 3  # columns of an operation: work, contiguous bytes, scattered bytes
TIERS = (Tier.HBM, Tier.DDR, Tier.NVME)
LINKS = ("hbm->sm", "ddr->cpu", "ddr->hbm", "hbm->ddr")  # what plans use; collectives and swaps add to these
END = 1 << 30  # later than any step


class OpShape(NamedTuple):
    """An operation without its amounts."""

    name: str
    after: tuple[str, ...]
    cost: Cost
    link: int  # index into LINKS
    syncs: bool


class Structure(NamedTuple):
    """What a plan does, without amounts: operations per group of equal layers, and after the last layer."""

    groups: tuple[tuple[OpShape, ...], ...]
    group_of: tuple[int, ...]  # for each layer
    end: tuple[OpShape, ...]

    @property
    def ops(self) -> tuple[OpShape, ...]:
        """All operations in the order of a vector's columns."""
        return tuple(op for group in (*self.groups, self.end) for op in group)

    @property
    def columns(self) -> int:
        """How long its vectors are."""
        return AMOUNTS * len(self.ops) + len(TIERS)

    def multiplicity(self, layers: range | None = None) -> list[int]:
        """How many of all layers, or of these, run each operation of `ops`."""
        own = self.group_of if layers is None else self.group_of[layers.start : layers.stop]
        counts = [own.count(g) for g in range(len(self.groups))]
        return [n for n, group in zip((*counts, 1), (*self.groups, self.end), strict=True) for _ in group]


class Segment(NamedTuple):
    """A run of decode steps whose vector is `start` + i * `slope`, up to and excluding generated token `until`."""

    piece: "Piece"
    start: Vector
    slope: Vector
    until: int


_BEYOND = 2**63
_TOO_LARGE = (
    "the plan of one layer takes more than 2**63 bytes or FLOPs; lower the context, or the policy's largest parameter"
)


class Piece:
    """Plans of one structure wherever `conditions` hold: polynomials in the inputs, and in floors of such, as a matrix.

    Its rows are the conditions and then the columns of a vector; it multiplies the values of `monomials`.
    """

    def __init__(
        self,
        structure: Structure,
        inputs: int,
        floors: list[Floor],
        conditions: list[Condition],
        columns: list[Polynomial],
    ) -> None:
        self.structure, self.inputs, self.floors, self.conditions = structure, inputs, floors, conditions
        self._before = len(conditions)
        rows = [condition.polynomial for condition in conditions] + columns
        self.monomials: list[Monomial] = sorted({monomial for row in rows for monomial in row})
        if any(abs(factor) >= _BEYOND for row in rows for factor in row.values()):
            raise ValueError(_TOO_LARGE)
        self.matrix = np.array([[row.get(m, 0) for m in self.monomials] for row in rows], dtype=np.int64)
        self.matrix = self.matrix.reshape(len(rows), -1)
        self._largest = np.abs(self.matrix).max(axis=0, initial=0).astype(np.float64)
        self._tests = [(condition.equal, condition.truth) for condition in conditions]
        last = inputs - 1
        growing = [monomial for monomial in self.monomials if last in monomial]
        self.affine = all(monomial.count(last) == 1 for monomial in growing)
        self._rates: Vector | None = None  # of all rows in the last input, where they are the same everywhere
        if growing in ([], [(last,)]):
            self._rates = self.matrix[:, self.monomials.index((last,))] if growing else np.zeros(len(rows), np.int64)
        self._moving_floors = [i for i, floor in enumerate(floors) if any(last in m for m in floor.polynomial)]

    @property
    def columns(self) -> int:
        """How long its vectors are."""
        return len(self.matrix) - len(self.conditions)

    def rates(self, variables: list[int], rows: Vector) -> Vector:
        """How much each row grows with the last input, floors aside; rows must be affine in it."""
        if self._rates is not None:
            return self._rates
        last = self.inputs - 1
        return self.rows([*variables[:last], variables[last] + 1, *variables[self.inputs :]]) - rows

    def variables(self, inputs: tuple[int, ...]) -> list[int]:
        """Inputs and floors."""
        values = list(inputs)
        for floor in self.floors:
            values.append(evaluate(floor.polynomial, values) // floor.divisor)
        return values

    def rows(self, variables: list[int]) -> Vector:
        """The values of all rows, conditions first; ValueError where one would not fit 64 bits."""
        basis = []
        for monomial in self.monomials:
            if len(monomial) == 1:
                basis.append(variables[monomial[0]])
                continue
            value = 1
            for index in monomial:
                value *= variables[index]
            basis.append(value)
        if self._largest @ np.abs(np.array(basis, dtype=np.float64)) >= _BEYOND:
            raise ValueError(_TOO_LARGE)
        return self.matrix @ np.array(basis, dtype=np.int64)

    def holds(self, rows: Vector) -> bool:
        """Whether the plan with these rows is of this piece."""
        for value, (equal, truth) in zip(rows[: self._before].tolist(), self._tests, strict=True):
            if (value == 0 if equal else value < 0) is not truth:
                return False
        return True

    def vector(self, rows: Vector) -> Vector:
        """The amounts among the rows."""
        return rows[self._before :]

    def steps_until_change(self, now: list[int], rows: Vector, rates: Vector) -> int:
        """After how many more units of the last input a condition or a floor changes.

        `now` and `rows` are the variables and rows here, `rates` how much each row grows. Rows must be affine in the
        last input.
        """
        nearest, last = END, self.inputs - 1
        then = [*now[:last], now[last] + 1, *now[self.inputs :]] if self._moving_floors else now
        for i in self._moving_floors:
            floor = self.floors[i]
            here = evaluate(floor.polynomial, now)
            rate, edge = evaluate(floor.polynomial, then) - here, now[self.inputs + i] * floor.divisor
            if rate > 0:
                nearest = min(nearest, -(-(edge + floor.divisor - here) // rate))
            elif rate < 0:
                nearest = min(nearest, (here - edge) // -rate + 1)
        for i in np.flatnonzero(rates[: self._before]).tolist():
            here, rate = int(rows[i]), int(rates[i])
            _, equal, truth = self.conditions[i]
            if equal:
                if truth:
                    return 1
                if -here % rate == 0 and -here // rate > 0:
                    nearest = min(nearest, -here // rate)
            elif truth and rate > 0:
                nearest = min(nearest, -(here // rate))
            elif not truth and rate < 0:
                nearest = min(nearest, here // -rate + 1)
        return nearest


class Pieces:
    """Pieces that were derived before, for tables of one policy, rank, machine, shares and guesses to find again."""

    def __init__(self) -> None:
        self.decode: list[Piece] = []
        self.prefill: list[Piece] = []
        self.structures: dict[Structure, Structure] = {}
        self.drawn: set[str] = set()


class PlanTable:
    """The plans of one policy on one rank of a model, on one machine, with data-dependent counts at their means.

    `shares` replaces the default mean of a count, as a share of its maximum; `drawn` collects the counts met so far.
    With a `guesser`, a decode step verifies its guesses, and the attention of its draft ends every step.
    """

    def __init__(
        self,
        policy: Policy,
        model: ModelShape,
        machine: Machine,
        shares: Mapping[str, float],
        guesser: Guesser | None = None,
        known: Pieces | None = None,
    ) -> None:
        self.policy, self.model, self.machine, self.shares = policy, model, machine, shares
        self._guesser = guesser
        self._known = Pieces() if known is None else known
        self._decode: list[Piece] = []
        self._prefill: list[Piece] = []
        self.drawn: set[str] = set()
        self._asked: tuple[int, int, int] | None = None
        self._answer: tuple[Structure, Vector]

    @property
    def _new_tokens(self) -> int:
        """Of a decode step."""
        return 1 if self._guesser is None else self._guesser.speculation.verified_tokens

    @property
    def pieces(self) -> list[Piece]:
        """What has been derived so far."""
        return [*self._decode, *self._prefill]

    def prefill(self, prompt_tokens: int, past_tokens: int, new_tokens: int) -> tuple[Structure, Vector]:
        """The amounts of one chunk of a prompt."""
        inputs = (prompt_tokens, past_tokens, new_tokens)
        if inputs != self._asked:  # admission looks at a chunk that is often charged next
            piece, _, rows = self._find(self._prefill, inputs)
            self._asked, self._answer = inputs, (piece.structure, piece.vector(rows))
        return self._answer

    def decode(self, prompt_tokens: int, generated_tokens: int) -> Segment:
        """The decode steps from `generated_tokens` on for as long as their amounts grow evenly."""
        piece, now, rows = self._find(self._decode, (prompt_tokens, generated_tokens))
        start = piece.vector(rows)
        if not piece.affine:
            return Segment(piece, start, np.zeros_like(start), generated_tokens + 1)
        rates = piece.rates(now, rows)
        until = min(END, generated_tokens + piece.steps_until_change(now, rows, rates))
        return Segment(piece, start, piece.vector(rates), until)

    def warm(self, prompt_tokens: Sequence[int], chunk_tokens: int) -> None:
        """Derive ahead of time the plans that prompts of these lengths will meet, in chunks of at most this size."""
        for prompt in prompt_tokens:
            chunk = min(chunk_tokens, prompt)
            self.decode(prompt, 1)
            for past in {0, (prompt - chunk) // 2, prompt - chunk, max(0, prompt - 1)}:
                self.prefill(prompt, past, min(chunk, prompt - past))

    def _find(self, pieces: list[Piece], inputs: tuple[int, ...]) -> tuple[Piece, list[int], Vector]:
        for position, piece in enumerate(pieces):
            variables = piece.variables(inputs)
            rows = piece.rows(variables)
            if piece.holds(rows):
                if position:  # neighbours in time are alike: look here first next time
                    pieces.insert(0, pieces.pop(position))
                return piece, variables, rows
        piece = self.derive(inputs)
        pieces.insert(0, piece)
        variables = piece.variables(inputs)
        return piece, variables, piece.rows(variables)

    def derive(self, inputs: tuple[int, ...]) -> Piece:
        """The piece that holds at a decode step's two inputs or a chunk's three: known from before, or derived anew.

        Which one it is makes no difference: where the same conditions hold, the same piece is derived.
        """
        known = self._known.decode if len(inputs) == 2 else self._known.prefill
        piece = next((one for one in known if one.holds(one.rows(one.variables(inputs)))), None)
        if piece is None:
            piece = self._anew(inputs)
            known.append(piece)
        self.drawn |= self._known.drawn
        return piece

    def _anew(self, inputs: tuple[int, ...]) -> Piece:
        tape = Tape(inputs)
        if len(inputs) == 2:
            prompt, generated = tape.symbols()
            step = Step(prompt_tokens=prompt, past_tokens=prompt + generated - 1, new_tokens=self._new_tokens)
        else:
            prompt, past, new = tape.symbols()
            step = Step(prompt_tokens=prompt, past_tokens=past, new_tokens=new)
        plans = plan_layers(self.policy, self.model, step)
        groups: list[tuple[tuple[OpShape, ...], list[Polynomial]]] = []
        group_of: list[int] = []
        prefill = len(inputs) == 3
        known: dict[int, int] = {}  # the group of a plan that several layers share
        for plan, layer in zip(plans, self.model.layers, strict=True):
            if id(plan) not in known:
                group = self._amounts(plan, layer, prefill=prefill)
                if group not in groups:
                    groups.append(group)
                known[id(plan)] = groups.index(group)
            group_of.append(known[id(plan)])
        end = plan_end(self.policy, self.model, step) if step.last_chunk else ()
        held = stored_bytes([plan.buffers for plan in plans])
        end_shapes, end_columns = self._amounts(
            LayerPlan(self.policy, (), end, ()), self.model.layers[0], prefill=prefill
        )
        stored = [polynomial_of(held[tier]) for tier in TIERS]
        if self._guesser is not None and self._guesser.drafts:
            flops, nbytes, cache = self._guesser.amounts(step)
            end_shapes += (OpShape("draft", (), self._guesser.cost, LINKS.index("hbm->sm"), syncs=False),)
            end_columns += [flops, nbytes, {}]
            stored[0] = total(stored[0], cache)
        structure = Structure(tuple(shapes for shapes, _ in groups), tuple(group_of), end_shapes)
        structure = self._known.structures.setdefault(structure, structure)
        columns = [column for _, group in groups for column in group] + end_columns
        columns += stored
        return Piece(structure, len(inputs), tape.floors, tape.conditions, columns)

    def _amounts(
        self, plan: LayerPlan, layer: LayerShape, *, prefill: bool
    ) -> tuple[tuple[OpShape, ...], list[Polynomial]]:
        buffers = {b.name: b for b in plan.buffers}
        totals = {c.name: c.expected(self.shares.get(c.name)) for c in plan.counts}
        self._known.drawn |= set(totals)
        shapes, columns = [], []
        for op in plan.ops:
            work, contiguous, scattered, link = _amounts_of(op, buffers, totals)
            columns += [polynomial_of(work), polynomial_of(contiguous), polynomial_of(scattered)]
            cost = self.machine.cost(op, buffers, layer, self.model.kv_dtype, prefill=prefill)
            shapes.append(OpShape(op.name, op.after, cost, link, not isinstance(op, Copy | Compute)))
        return tuple(shapes), columns


def _amounts_of(op: Op, buffers: Mapping[str, Buffer], totals: Mapping[str, int]) -> tuple[int, int, int, int]:
    if isinstance(op, Copy):
        link = LINKS.index(f"{buffers[op.src].tier}->{buffers[op.dst].tier}")
        return 0, op.rows.at(totals) * buffers[op.src].row_bytes, 0, link
    if isinstance(op, Compute):
        accesses = (*op.reads, *op.writes)
        link = LINKS.index("hbm->sm" if op.processor is Processor.SM else "ddr->cpu")
        rows = op.rows.at(totals)
        work = rows if op.work is Work.TOPK else rows * op.flops_per_row
        contiguous = access_bytes(tuple(a for a in accesses if not a.scattered), buffers, totals)
        return work, contiguous, access_bytes(tuple(a for a in accesses if a.scattered), buffers, totals), link
    return 0, 0, 0, 0
