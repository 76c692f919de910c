"""The tables of angles of a cache's layers, for policies that need keys before their rotation."""

from collections.abc import Sequence

from torch import Tensor

from runtime.probe import SeenLayer
from runtime.rotary import UNROTATED, Rotary


class Rotaries:
    """`of`: a table for each layer that has one; layers that the model hands the same angles share theirs."""

    def __init__(self, seen: Sequence[SeenLayer]) -> None:
        self._seen = seen
        self.of: dict[int, Rotary] = {}
        self._extended: list[tuple[Tensor, Rotary]] = []  # in this step

    def new(self, layer: int, capacity_tokens: int) -> Rotary:
        """An empty table of angles as the model hands them to a layer."""
        rotation = self._seen[layer].rotation
        if rotation is None:
            raise RuntimeError(f"how layer {layer} rotates keys is not known")  # which `offload` has refused
        return Rotary(capacity_tokens, rotation)

    def add_unrotated(self, layer: int, capacity_tokens: int) -> None:
        """Give a layer whose keys are not rotated its table, which no angles come to."""
        if self._seen[layer].rotation == UNROTATED:
            self.of[layer] = self.new(layer, capacity_tokens)

    def hear(self, layer: int, cos: Tensor, sin: Tensor, capacity_tokens: int, row: Tensor | None = None) -> None:
        """Take what the model rotates a layer's new tokens by, (batch or 1, new_tokens, dimensions), once a table.

        In a captured step the device knows at which `row`, and `advance` counts.
        """
        rotation = self._seen[layer].rotation
        if rotation == UNROTATED:
            return
        for known, rotary in self._extended:
            if known is cos and rotary.rotation == rotation:
                self.of[layer] = rotary
                return
        if layer not in self.of:
            self.of[layer] = self.new(layer, capacity_tokens)
        if row is None:
            self.of[layer].extend(cos, sin)
        else:
            self.of[layer].extend_at(cos, sin, row)
        self._extended.append((cos, self.of[layer]))

    def end_step(self) -> None:
        """The last layer has come: the next angles are those of other tokens."""
        self._extended.clear()

    def widen(self, batch: int) -> None:
        """Each of `batch` sequences may have angles of its own from here on."""
        for rotary in self._tables():
            rotary.widen(batch)

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the tables lie: who has noted an address is told by another that they were replaced."""
        return tuple(rotary.table[0].data_ptr() for rotary in self._tables())

    def advance(self) -> None:
        """A captured step has written the angles of one token to every table."""
        for rotary in self._tables():
            rotary.tokens += 1

    def _tables(self) -> list[Rotary]:
        """Every table that angles come to, once."""
        tables = {id(rotary): rotary for rotary in self.of.values()}
        return [rotary for rotary in tables.values() if rotary.rotation != UNROTATED]

    def drop(self, layer: int, gone: int, left: int) -> None:
        """A layer has taken back tokens, and has so many left; angles that layers share go once."""
        rotary = self.of.get(layer)
        if rotary is not None and rotary.tokens > left:
            rotary.drop(gone)

    def take(self, rows: Tensor) -> None:
        """Sequence i takes the angles of sequence `rows[i]`."""
        for rotary in {id(rotary): rotary for rotary in self.of.values()}.values():
            rotary.take(rows)

    def copy(self) -> "Rotaries":
        """Tables of their own with the same angles, shared as these are."""
        copy = Rotaries(self._seen)
        tables = {id(rotary): rotary.copy() for rotary in self.of.values()}
        copy.of = {layer: tables[id(rotary)] for layer, rotary in self.of.items()}
        return copy

    def clear(self) -> None:
        """Forget all tables."""
        self.of.clear()
        self._extended.clear()
