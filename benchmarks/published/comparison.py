"""A published figure beside what kvsim finds for it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One figure; `source` is R (read in the paper or its repository), R2 (read second-hand) or C (recomputed)."""

    what: str
    unit: str
    published: float
    source: str
    kvsim: float
    assumption: str = ""

    @property
    def error_percent(self) -> float:
        """How far kvsim is above the published figure."""
        return 100 * (self.kvsim / self.published - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """The comparisons with one paper, and in prose what they assume."""

    title: str
    prose: str
    comparisons: tuple[Comparison, ...]
