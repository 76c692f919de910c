"""Recorded counts: what data decided in each step of each layer, written by the runtime and replayed by the simulator.

The file is a NumPy archive (`.npz`) without pickles. `steps` has one row for each step of one sequence on one layer;
for each count `NAME.row` says which rows of `steps` drew it, `NAME.value` (n, heads) what each KV head drew, and
`NAME.maximum` (n, heads) the most that it could have drawn, 0 for heads that a layer lacks.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from traces.npz import read_npz
from traces.replacing import replacing

Whole = NDArray[np.int64]
# `first_prompt_tokens`: the prompt of the sequence's first turn, which settles what a policy does with it.
COLUMNS = ("sequence", "layer", "first_prompt_tokens", "prompt_tokens", "past_tokens", "new_tokens")
LEAST = (0, 0, 1, 1, 0, 1)  # that each column can hold
FIELDS = ("row", "value", "maximum")
AGAIN = "record one with `kvsim generate --counts-out FILE`"


class Drawn(NamedTuple):
    """All values of one count: `row` (n,) into `steps`, `value` and `maximum` (n, heads)."""

    row: Whole
    value: Whole
    maximum: Whole

    @property
    def share(self) -> float:
        """The mean value as a share of the maximum."""
        most = int(self.maximum.sum())
        return int(self.value.sum()) / most if most else 0.0


@dataclass(frozen=True, slots=True)
class Recording:
    """What a run did: `steps` (n, 6) int64 with the columns `COLUMNS`, and the counts by name."""

    steps: Whole
    counts: dict[str, Drawn] = field(default_factory=dict)

    def shares(self) -> dict[str, float]:
        """Each count's mean as a share of its maximum: what `--counts` takes."""
        return {name: drawn.share for name, drawn in self.counts.items()}

    def totals(self) -> list[dict[str, int]]:
        """For each row of `steps` its counts, summed over KV heads."""
        totals: list[dict[str, int]] = [{} for _ in range(len(self.steps))]
        for name, drawn in self.counts.items():
            for row, total in zip(drawn.row.tolist(), drawn.value.sum(axis=1).tolist(), strict=True):
                totals[row][name] = total
        return totals

    def save(self, path: Path) -> None:
        """Write the recording to `path`, whole or not at all."""
        arrays = {"steps": self.steps}
        for name, drawn in self.counts.items():
            arrays |= {f"{name}.{part}": array for part, array in zip(FIELDS, drawn, strict=True)}
        with replacing(path) as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path) -> "Recording":
        """Read a recording; ValueError, naming the file and what is wrong, when it is none."""
        try:
            found = read_npz(path)
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file; {AGAIN}") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: not a recording of counts ({error}); {AGAIN}") from None
        return cls._checked(path, found)

    @classmethod
    def _checked(cls, path: Path, found: dict[str, NDArray[Any]]) -> "Recording":
        steps = found.pop("steps", None)
        if steps is None or steps.dtype != np.int64 or steps.ndim != 2 or steps.shape[1] != len(COLUMNS):
            raise ValueError(f"{path}: 'steps' must be int64 rows of {', '.join(COLUMNS)}; {AGAIN}")
        if (steps < LEAST).any():
            raise ValueError(
                f"{path}: 'steps' has a number below {', '.join(map(str, LEAST))}, the least of its columns; {AGAIN}"
            )
        counts = {}
        for name in sorted({key.rpartition(".")[0] for key in found}):
            parts = [found.pop(f"{name}.{part}", None) for part in FIELDS]
            if any(part is None or part.dtype != np.int64 for part in parts):
                raise ValueError(f"{path}: count {name!r} needs int64 arrays {', '.join(FIELDS)}; {AGAIN}")
            counts[name] = drawn = Drawn(*parts)  # type: ignore[arg-type]  # checked above
            if not (drawn.row.ndim == 1 and drawn.value.ndim == 2 and len(drawn.row) == len(drawn.value)):
                raise ValueError(
                    f"{path}: count {name!r} needs a row of values for each of its rows of 'steps'; {AGAIN}"
                )
            if drawn.maximum.shape != drawn.value.shape:
                raise ValueError(f"{path}: count {name!r} needs a maximum for each value; {AGAIN}")
            if len(np.unique(drawn.row)) != len(drawn.row) or not np.isin(drawn.row, np.arange(len(steps))).all():
                raise ValueError(
                    f"{path}: count {name!r} names a row that 'steps' does not have, or one twice; {AGAIN}"
                )
            if (drawn.value < 0).any() or (drawn.value > drawn.maximum).any():
                raise ValueError(f"{path}: count {name!r} has values outside 0 and its maximum; {AGAIN}")
        if found:
            raise ValueError(f"{path}: {', '.join(map(repr, found))} belong to no count; {AGAIN}")
        return cls(steps, counts)
