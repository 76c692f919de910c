"""Derived plans laid out as the arrays that the inner loop reads, which grow as it meets more, and room for times."""

from collections.abc import Mapping, Sequence

import numpy as np

from kvsim.engine.batch.plans import FLOOR, INPUTS, MOST_FACTORS, PIECE, TERM, TEST
from kvsim.engine.state.cluster import N_TIERS, NOBODY, Floats, Plans, Record, Records
from kvsim.iteration.clock import Clock
from kvsim.iteration.price import OWN, PARTS
from kvsim.plans.derive import Piece
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
    rows = np.concatenate([np.arange(n), n + 1 + (np.arange(piece.columns) + N_TIERS) % piece.columns])
    for position, monomial in enumerate(piece.monomials):
        matrix[rows, monomials.index(monomial)] = piece.matrix[:, position]
    matrix[n, 0] = 1
    return matrix, monomials


def set_guesses(world: Record, guesser: Guesser | None) -> None:
    """How many tokens a decode step takes and emits, and what guessing them costs."""
    world["tokens_per_step"] = world["step_tokens"] = 1
    if guesser is not None:
        world["tokens_per_step"] = guesser.speculation.tokens_per_step
        world["step_tokens"] = guesser.speculation.verified_tokens
        world["guess_parts_s"], world["guess_weight_bytes"] = guesser.parts, guesser.read_bytes
        world["guess_sent_bytes"] = guesser.sent_bytes


def own_arrays(clock: Clock, most_tokens: int, stages: int) -> tuple[Records, Floats]:
    """Room for what the model's own layers take on each stage at up to so many tokens; nothing is filled in."""
    n_times = 1 + PARTS * len(dict.fromkeys(clock.model.layers))
    return np.zeros((most_tokens + 1) * stages, dtype=OWN), np.zeros((most_tokens + 1, n_times))
