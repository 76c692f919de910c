"""Derived plans and compiled programs laid out as the arrays that the inner loop reads; they grow as it meets more."""

from collections.abc import Mapping, Sequence

import numpy as np

from kvsim.engine.batch.plans import FLOOR, INPUTS, MOST_FACTORS, PIECE, TERM, TEST
from kvsim.engine.batch.pricing import LAYERS, MODEL, OP, PROGRAM, SLOT, STRUCTURE, TIME, WAIT
from kvsim.engine.state.cluster import NOBODY, TIERS, Floats, Plans, Prices, Record, Records
from kvsim.iteration.makespan import Clock
from kvsim.iteration.program import Slot
from kvsim.plans.derive import Piece, Structure
from kvsim.plans.guessing import Guesser
from policies.symbolic import Polynomial


def plan_arrays(pieces: Sequence[Piece], structures: Mapping[int, int], world: Record) -> Plans:
    """Pieces in the order in which they were derived; `structures` gives each structure's index by its id."""
    records, matrices = [], []
    floors: list[tuple[int, int, int]] = []
    tests: list[tuple[bool, bool]] = []
    terms: list[tuple[int, int, tuple[int, ...]]] = []
    size, newest = 0, [NOBODY for _ in INPUTS]

    def add(polynomial: Polynomial) -> tuple[int, int]:
        for monomial, coefficient in polynomial.items():
            if len(monomial) > MOST_FACTORS:
                raise ValueError(f"a plan's amounts are products of {len(monomial)} token counts, above {MOST_FACTORS}")
            factors = (*monomial, *(0,) * (MOST_FACTORS - len(monomial)))
            terms.append((coefficient, len(monomial), factors))
        return len(terms) - len(polynomial), len(polynomial)

    for index, piece in enumerate(pieces):
        own = [(*add(floor.polynomial), floor.divisor) for floor in piece.floors]
        matrix, monomials = _counted(piece)
        matrices.append(matrix.ravel())
        where = (len(floors), len(own), len(tests), len(piece.conditions), piece.columns + 1)
        kind = INPUTS.index(piece.inputs)
        known = structures[id(piece.structure)]
        records.append(
            (piece.inputs, piece.affine, known, newest[kind], *where, *add(dict.fromkeys(monomials, 1)), size)
        )
        newest[kind] = index
        floors += own
        tests += [(condition.equal, condition.truth) for condition in piece.conditions]
        size += matrix.size
    world["first_piece"] = newest
    most = max((max(piece.inputs + len(piece.floors), 1 + len(piece.monomials)) for piece in pieces), default=0)
    return Plans(
        world=world,
        pieces=np.array(records, dtype=PIECE),
        floors=np.array(floors, dtype=FLOOR),
        terms=np.array(terms, dtype=TERM),
        tests=np.array(tests, dtype=TEST),
        matrix=np.concatenate([np.zeros(0, np.int64), *matrices]),
        values=np.zeros((3, max(3, most)), dtype=np.int64),
    )


def _counted(piece: Piece) -> tuple[np.ndarray[tuple[int, int], np.dtype[np.int64]], list[tuple[int, ...]]]:
    """A piece's matrix with its columns in the inner loop's order, a count of one sequence first; its monomials."""
    monomials = [(), *(m for m in piece.monomials if m)]
    matrix = np.zeros((len(piece.matrix) + 1, len(monomials)), dtype=np.int64)
    n = len(piece.conditions)
    rows = np.concatenate([np.arange(n), n + 1 + (np.arange(piece.columns) + TIERS) % piece.columns])
    for position, monomial in enumerate(piece.monomials):
        matrix[rows, monomials.index(monomial)] = piece.matrix[:, position]
    matrix[n, 0] = 1
    return matrix, monomials


def price_arrays(
    clock: Clock,
    stages: Sequence[range],
    structures: Sequence[Structure],
    combinations: Sequence[tuple[int, ...]],
    model: Records,
    model_s: Floats,
) -> Prices:
    """Costs of the structures, and programs for those combinations of them on each stage; the model's times are kept.

    Raises ValueError for a structure that works on all layers at once where stages have only theirs.
    """
    if len(stages) > 1 and any(structure.end for structure in structures):
        raise ValueError("the policy works on all layers at once after a prompt, and no stage has all; use pp=1")
    ops: list[tuple[float, ...]] = []
    heads = []
    for structure in structures:
        heads.append((len(ops), len(structure.ops), clock.uses_host([structure])))
        for held in stages:
            for op, layers in zip(structure.ops, structure.multiplicity(held), strict=True):
                rates_s = (op.cost.fixed_s, op.cost.work_s, op.cost.streamed_s, op.cost.scattered_s)
                ops.append((op.cost.lane, op.link, op.syncs, layers, *rates_s))
    programs = []
    runs: list[tuple[int, int, int]] = []
    times: list[tuple[float, ...]] = []
    slots: list[tuple[float, ...]] = []
    waits: list[tuple[int, int]] = []
    keys = np.zeros((len(combinations), 1 + max(map(len, combinations), default=0)), dtype=np.int64)

    def add(sequence: Sequence[Slot]) -> tuple[int, int]:
        for slot in sequence:
            slots.append((slot.time, slot.lane, len(waits), len(slot.waits), slot.slot, slot.sm_share))
            waits.extend(slot.waits)
        return len(slots) - len(sequence), len(sequence)

    deepest = most_slots = most_times = 1
    for index, combination in enumerate(combinations):
        keys[index, : 1 + len(combination)] = len(combination), *combination
        for held in stages:
            program = clock.program([structures[i] for i in combination], held)
            own = [(repeat, *add(sequence)) for repeat, sequence in program.runs]
            where = (len(runs), len(own), *add(program.end), program.depth, len(times), len(program.layers))
            programs.append((*where, program.layers_apart))
            runs += own
            times += [(n, i in program.elsewhere) for i, n in enumerate(program.layers.tolist())]
            deepest, most_slots = max(deepest, program.depth), max(most_slots, program.slots)
            most_times = max(most_times, len(program.layers))
    return Prices(
        structures=np.array(heads, dtype=STRUCTURE),
        ops=np.array(ops, dtype=OP),
        combinations=keys,
        programs=np.array(programs, dtype=PROGRAM),
        layers=np.array(runs, dtype=LAYERS),
        slots=np.array(slots, dtype=SLOT),
        waits=np.array(waits, dtype=WAIT),
        times=np.array(times, dtype=TIME),
        seconds=np.zeros(most_times),
        done_s=np.zeros((deepest + 1, most_slots)),
        model=model,
        model_s=model_s,
    )


def set_guesses(world: Record, guesser: Guesser | None) -> None:
    """How many tokens a decode step takes and emits, and what guessing them costs."""
    world["tokens_per_step"] = world["step_tokens"] = 1
    if guesser is not None:
        world["tokens_per_step"] = guesser.speculation.tokens_per_step
        world["step_tokens"] = guesser.speculation.verified_tokens
        world["guess_parts_s"], world["guess_weight_bytes"] = guesser.parts, guesser.read_bytes
        world["guess_sent_bytes"] = guesser.sent_bytes


def model_arrays(clock: Clock, most_tokens: int, stages: int) -> tuple[Records, Floats]:
    """Room for what the model's own layers take on each stage at up to so many tokens; nothing is filled in."""
    n_times = 1 + 4 * len(dict.fromkeys(clock.model.layers))
    return np.zeros((most_tokens + 1) * stages, dtype=MODEL), np.zeros((most_tokens + 1, n_times))
