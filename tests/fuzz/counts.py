"""Mutated recordings of counts: arrays of other shapes, types and values, forged headers, damaged archives."""

import io
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from fuzz import mutate
from fuzz.base import simulation
from fuzz.door import attempt_command

STEPS = np.array([[0, 0, 9, 9, 0, 9], [1, 0, 9, 9, 0, 9], [0, 0, 9, 9, 9, 1], [1, 0, 9, 9, 9, 1]], np.int64)
RECORDING: dict[str, Any] = {
    "steps": STEPS,
    "miss.row": np.array([2, 3], np.int64),
    "miss.value": np.array([[1, 0], [3, 4]], np.int64),
    "miss.maximum": np.array([[4, 4], [4, 4]], np.int64),
}
DTYPES = ("int64", "int32", "float64", "bool", "U3", "S2", "complex64", "M8[s]", "uint64", "O")


def attempt(rng: random.Random, folder: Path) -> str:
    """Write one mutated recording, and let shares of its counts price or simulate ShadowKV."""
    path = folder / "counts.npz"
    arrays = dict(RECORDING)
    for _ in range(rng.choice((0, 1, 1, 2))):
        name = rng.choice(list(arrays))
        arrays[name] = _changed(rng, arrays[name])
    if rng.random() < 0.2:
        arrays[mutate.text_like(rng, "miss.row").replace("\x00", "").encode(errors="replace").decode()] = STEPS
    if rng.random() < 0.2:
        del arrays[rng.choice(list(arrays))]
    stored = io.BytesIO()
    rng.choice((np.savez, np.savez_compressed))(stored, **arrays)
    content = stored.getvalue()
    if rng.random() < 0.3:
        content = _forged(rng, content)
    path.write_bytes(mutate.damaged(rng, content) if rng.random() < 0.4 else content)
    if rng.random() < 0.6:
        return attempt_command(["explain", "--policy", "shadowkv", "--context", "8k", "--counts", path.name], folder)
    return attempt_command([*simulation(rng, folder), "--policy", "shadowkv", "--counts", path.name], folder)


def _changed(rng: random.Random, array: Any) -> Any:
    kind = rng.randrange(6)
    if kind == 0:
        return array.astype(rng.choice(DTYPES))
    if kind == 1:
        return array.reshape(rng.choice(((-1,), (1, -1), (-1, 1), (1, 1, -1))))
    if kind == 2:
        return array[: rng.randrange(array.size + 1)] if array.ndim else array
    if kind == 3:
        return np.array(rng.choice((0, 2**63 - 1, -1)))
    changed = array.copy()
    changed.flat[rng.randrange(changed.size)] = rng.choice((-1, 0, 2**62, 2**63 - 1, -(2**63), 5))
    return changed if kind == 4 else np.asfortranarray(changed)


def _forged(rng: random.Random, content: bytes) -> bytes:
    """The archive with a word of an array's header replaced, and its sums made right again."""
    forged = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as stored, zipfile.ZipFile(forged, "w") as archive:
        for entry in stored.infolist():
            data = stored.read(entry)
            head, tail = data[:128].decode("latin-1"), data[128:]
            if rng.random() < 0.6:
                words = (
                    ("(4, 6)", "(4000000000000, 6)"),
                    ("<i8", "|O "),
                    ("<i8", ">i8"),
                    ("False", "True "),
                    ("{", "("),
                )
                head = head.replace(*rng.choice(words))[:128]
            archive.writestr(entry.filename, head.encode("latin-1") + tail)
    return forged.getvalue()
