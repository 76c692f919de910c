"""What tells one run from another: digests of what it was given, and of what came out."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from kvsim.version import __version__

TIMING = ("wall_s", "cpu_s", "setup_cpu_s")
"""The block of a summary that differs between two runs of the same inputs; everything else is the same bytes."""
IDENTITY = ("run_id", "inputs_sha256", "version")
"""What all files of one run share: in `summary.json`, in the metadata of the tables, in the page and the trace."""

_RUN_ID_DIGITS = 16


def identity(summary: Mapping[str, Any]) -> dict[str, str]:
    """The `IDENTITY` of a run, by its summary: the inputs without versions, and all figures without `TIMING`."""
    inputs = {name: value for name, value in summary["inputs"].items() if name != "versions"}
    figures = {name: value for name, value in summary.items() if name not in (*TIMING, *IDENTITY)}
    return {"run_id": _of_json(figures)[:_RUN_ID_DIGITS], "inputs_sha256": _of_json(inputs), "version": __version__}


def joint_identity(runs: Iterable[Mapping[str, Any]], further: object) -> dict[str, str]:
    """The `IDENTITY` of several runs together, by their summaries and whatever `further` says of them all."""
    ids, inputs = zip(*((run["run_id"], run["inputs_sha256"]) for run in runs), strict=True)
    run_id = _of_json([ids, further])[:_RUN_ID_DIGITS]
    return {"run_id": run_id, "inputs_sha256": _of_json(inputs), "version": __version__}


def digest(value: object) -> str:
    """The SHA-256 of nested dataclasses, mappings, sequences, arrays and plain values, the same in every process."""
    found = hashlib.sha256()
    for piece in _pieces(value):
        found.update(piece)
    return found.hexdigest()


def _of_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _pieces(value: object) -> Iterator[bytes | memoryview]:
    """Bytes that no other value gives: each begins with its kind and its length."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        yield f"array {value.dtype.str} {value.shape}\n".encode()
        yield np.ascontiguousarray(value).view(np.uint8).data if value.size else b""
    elif is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value)]
        yield f"{type(value).__qualname__} {len(names)}\n".encode()
        for name in names:
            yield f"{name}\n".encode()
            yield from _pieces(getattr(value, name))
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}\n".encode()
        for key in sorted(value, key=repr):
            yield from _pieces(key)
            yield from _pieces(value[key])
    elif isinstance(value, list | tuple | np.ndarray):
        yield f"sequence {len(value)}\n".encode()
        for item in value:
            yield from _pieces(item)
    elif isinstance(value, set | frozenset):
        yield from _pieces(sorted(value, key=repr))
    else:
        text = re.sub(r" at 0x[0-9a-f]+", "", repr(value)).encode("utf-8", "backslashreplace")
        yield f"{type(value).__name__} {len(text)}\n".encode()
        yield text
