"""Recorded counts: what data decided in each step of each layer, written by the runtime and replayed by the simulator.

The file is a NumPy archive (`.npz`) without pickles. `steps` has one row for each step of one sequence on one layer;
for each count `NAME.row` says which rows of `steps` drew it, `NAME.value` (n, heads) what each KV head drew, and
`NAME.maximum` (n,) the most that one head could have drawn.
"""

import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Whole = NDArray[np.int64]
COLUMNS = ("sequence", "layer", "prompt_tokens", "past_tokens", "new_tokens")
FIELDS = ("row", "value", "maximum")


class Drawn(NamedTuple):
    """All values of one count: `row` (n,) into `steps`, `value` (n, heads), `maximum` (n,) per head."""

    row: Whole
    value: Whole
    maximum: Whole

    @property
    def share(self) -> float:
        """The mean value as a share of the maximum."""
        most = int(self.maximum.sum()) * self.value.shape[1]
        return int(self.value.sum()) / most if most else 0.0


@dataclass(frozen=True, slots=True)
class Recording:
    """What a run did: `steps` (n, 5) int64 with the columns `COLUMNS`, and the counts by name."""

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
        """Write the recording to `path`."""
        arrays = {"steps": self.steps}
        for name, drawn in self.counts.items():
            arrays |= {f"{name}.{part}": array for part, array in zip(FIELDS, drawn, strict=True)}
        with path.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path) -> "Recording":
        """Read a recording; ValueError, naming the file and what is wrong, when it is none."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found = {name: arrays[name] for name in arrays.files}
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file; record one with `kvsim generate --counts-out FILE`") from None
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: not a recording of counts ({error})") from None
        return cls._checked(path, found)

    @classmethod
    def _checked(cls, path: Path, found: dict[str, np.ndarray]) -> "Recording":
        steps = found.pop("steps", None)
        if steps is None or steps.ndim != 2 or steps.shape[1] != len(COLUMNS) or steps.dtype != np.int64:
            raise ValueError(f"{path}: 'steps' must be int64 rows of {', '.join(COLUMNS)}")
        counts = {}
        for name in sorted({key.rpartition(".")[0] for key in found}):
            parts = [found.get(f"{name}.{part}") for part in FIELDS]
            if any(part is None or part.dtype != np.int64 for part in parts):
                raise ValueError(f"{path}: count {name!r} needs int64 arrays {', '.join(FIELDS)}")
            drawn = Drawn(*parts)  # type: ignore[arg-type]  # checked above
            if not (drawn.value.ndim == 2 and len(drawn.row) == len(drawn.value) == len(drawn.maximum)):
                raise ValueError(f"{path}: the arrays of count {name!r} do not have one row each per value")
            if drawn.row.size and not 0 <= drawn.row.min() <= drawn.row.max() < len(steps):
                raise ValueError(f"{path}: count {name!r} names a row that 'steps' does not have")
            if (drawn.value < 0).any() or (drawn.value > drawn.maximum[:, None]).any():
                raise ValueError(f"{path}: count {name!r} has values outside 0 and its maximum")
            counts[name] = drawn
        return cls(steps, counts)
