"""The sequences of a replica that decode: what they amount to together, and when one of them ends or changes."""

import heapq
from dataclasses import dataclass

from kvsim.derive import TIERS, PlanTable, Structure, Vector
from kvsim.makespan import Load
from kvsim.sequence import Sequence


@dataclass(slots=True, eq=False)
class Total:
    """The summed amounts of the next iteration of all sequences with one structure, and their growth per iteration."""

    structure: Structure
    amounts: Vector
    slopes: Vector
    sequences: int


class DecodingBatch:
    """A set of sequences that do each decode iteration together; amounts are sums, kept up to date as they grow."""

    def __init__(self, table: PlanTable) -> None:
        self.table = table
        self.iteration = 0  # decode iterations so far
        self.sequences: dict[int, Sequence] = {}  # by index, in the order in which they joined
        self.totals: dict[int, Total] = {}  # by the id of their structure, which the table keeps alive
        self._due: list[tuple[int, int, Sequence]] = []  # iterations at which a sequence ends or changes its slope
        self._serial = 0  # breaks ties in `_due`

    def __len__(self) -> int:
        return len(self.sequences)

    def join(self, sequence: Sequence, generated: int) -> None:
        """Let a sequence decode from its generated token number `generated` on."""
        self.sequences[sequence.index] = sequence
        self._add(sequence, generated)

    def remove(self, sequence: Sequence) -> None:
        """Let a sequence decode no further."""
        del self.sequences[sequence.index]
        self._subtract(sequence)

    def advance(self, steps: int) -> list[Sequence]:
        """All have done `steps` iterations, at most those until the next change: remove and return who is complete."""
        self.iteration += steps
        for total in self.totals.values():
            total.amounts += steps * total.slopes
        complete = []
        while self._due and self._due[0][0] <= self.iteration:
            due, _, sequence = heapq.heappop(self._due)
            if sequence.index not in self.sequences or due != sequence.due:
                continue  # preempted since
            generated = sequence.generated_tokens(self.iteration)
            if generated > sequence.last_generated_tokens:
                self.remove(sequence)
                complete.append(sequence)
            else:  # it keeps its place in the order
                self._subtract(sequence)
                self._add(sequence, generated)
        return complete

    def steps_until_change(self, most: int) -> int:
        """Iterations until a sequence ends or its amounts grow otherwise, but at most `most`."""
        return min(most, self._due[0][0] - self.iteration) if self._due else most

    def loads(self, steps: int = 0) -> list[Load]:
        """What the iteration after the next `steps` has to do."""
        totals = self.totals.values()
        return [Load(t.structure, t.amounts + steps * t.slopes if steps else t.amounts) for t in totals]

    def stored_bytes(self) -> list[int]:
        """Bytes per tier that the next iteration holds."""
        return self._over_tiers([total.amounts for total in self.totals.values()])

    def growth_bytes(self) -> list[int]:
        """Bytes per tier that each further iteration adds."""
        return self._over_tiers([total.slopes for total in self.totals.values()])

    def _over_tiers(self, vectors: list[Vector]) -> list[int]:
        stored: list[list[int]] = [vector[-len(TIERS) :].tolist() for vector in vectors]
        if len(stored) == 1:
            return stored[0]
        return [sum(column) for column in zip(*stored, strict=True)] or [0] * len(TIERS)

    def _add(self, sequence: Sequence, generated: int) -> None:
        segment = self.table.decode(sequence.target_tokens, generated)
        sequence.structure = structure = segment.piece.structure
        sequence.start, sequence.slope = segment.start, segment.slope
        sequence.joined, sequence.generated_at_join = self.iteration, generated
        total = self.totals.get(id(structure))
        if total is None:
            self.totals[id(structure)] = Total(structure, segment.start.copy(), segment.slope.copy(), 1)
        else:
            total.amounts += segment.start
            total.slopes += segment.slope
            total.sequences += 1
        sequence.due = self.iteration + min(segment.until, sequence.last_generated_tokens + 1) - generated
        self._serial += 1
        heapq.heappush(self._due, (sequence.due, self._serial, sequence))

    def _subtract(self, sequence: Sequence) -> None:
        total = self.totals[id(sequence.structure)]
        total.amounts -= sequence.amounts(self.iteration)
        total.slopes -= sequence.slope
        total.sequences -= 1
        if not total.sequences:
            del self.totals[id(sequence.structure)]
