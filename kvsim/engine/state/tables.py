"""Derived plans laid out as the arrays that the inner loop reads, which grow as it meets more, and room for times."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvsim.engine.batch.plans import FLOOR, INPUTS, MOST_FACTORS, PIECE, TERM, TEST
from kvsim.engine.state.cluster import N_TIERS, NOBODY, Floats, Ints, Plans, Record, Records
from kvsim.iteration.clock import Clock
from kvsim.iteration.price import HEAD, OWN, PARTS
from kvsim.plans.derive import Piece
from kvsim.plans.guessing import Guesser
from policies.symbolic import Polynomial

_ROOM = 64  # rows at first


class _Rows:
    """An array that grows at its end, by more the longer it is."""

    def __init__(self, dtype: Any) -> None:
        self._array, self._length = np.zeros(_ROOM, dtype), 0

    def __len__(self) -> int:
        return self._length

    def extend(self, rows: Sequence[Any] | Ints) -> None:
        end = self._length + len(rows)
        if end > len(self._array):
            self._array = np.concatenate([self.filled(), np.zeros(end, self._array.dtype)])
        self._array[self._length : end] = rows
        self._length = end

    def filled(self) -> Any:
        """What has been filled in: a part of the array itself."""
        return self._array[: self._length]


class PlanArrays:
    """Pieces in the order in which they were derived, each laid out once."""

    def __init__(self) -> None:
        self._pieces, self._floors, self._terms, self._tests = map(_Rows, (PIECE, FLOOR, TERM, TEST))
        self._matrix, self._after = _Rows(np.int64), _Rows(np.int64)
        self._newest, self._most = [NOBODY for _ in INPUTS], 3

    def add(self, piece: Piece, structure: int) -> None:
        """Lay out a piece; `structure` is the index of its structure."""
        floors = [(*self._add(floor.polynomial), floor.divisor) for floor in piece.floors]
        matrix, monomials = _counted(piece)
        where = (len(self._floors), len(floors), len(self._tests), len(piece.conditions), piece.columns + 1)
        kind = INPUTS.index(piece.inputs)
        after, self._newest[kind] = self._newest[kind], len(self._pieces)
        terms = self._add(dict.fromkeys(monomials, 1))
        self._pieces.extend([(piece.inputs, piece.affine, structure, after, *where, *terms, len(self._matrix))])
        self._after.extend([after])
        self._floors.extend(floors)
        self._tests.extend([(condition.equal, condition.truth) for condition in piece.conditions])
        self._matrix.extend(matrix.ravel())
        self._most = max(self._most, piece.inputs + len(piece.floors), 1 + len(piece.monomials))

    def plans(self, world: Record) -> Plans:
        """All pieces, the newest to be looked at first: what the loop has learned of their order is forgotten."""
        pieces = self._pieces.filled()
        pieces["after"] = self._after.filled()
        world["first_piece"] = self._newest
        return Plans(
            world=world,
            pieces=pieces,
            floors=self._floors.filled(),
            terms=self._terms.filled(),
            tests=self._tests.filled(),
            matrix=self._matrix.filled(),
            values=np.zeros((3, self._most), dtype=np.int64),
        )

    def _add(self, polynomial: Polynomial) -> tuple[int, int]:
        first = len(self._terms)
        for monomial, coefficient in polynomial.items():
            if len(monomial) > MOST_FACTORS:
                raise ValueError(f"a plan's amounts are products of {len(monomial)} token counts, above {MOST_FACTORS}")
            factors = (*monomial, *(0,) * (MOST_FACTORS - len(monomial)))
            self._terms.extend([(coefficient, len(monomial), factors)])
        return first, len(polynomial)


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


def own_arrays(clock: Clock, most_tokens: int, stages: int) -> tuple[Records, Floats, Records]:
    """Room for what the model's own layers take on each stage at up to so many tokens, and the head at as many rows.

    Nothing is filled in.
    """
    n_times = 1 + PARTS * len(dict.fromkeys(clock.model.layers))
    own = np.zeros((most_tokens + 1) * stages, dtype=OWN)
    return own, np.zeros((most_tokens + 1, n_times)), np.zeros(most_tokens + 1, dtype=HEAD)
