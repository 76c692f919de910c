"""What a long piece of work has found so far, kept in a file line by line, so that whoever goes on leaves it out."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_DIGITS = 16


class Journal:
    """Findings by key. Each is a line with a digest of its own, written at once: a kill costs the last line at most."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = {}
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        for line in lines:
            if (pair := _read(line)) is not None:
                self.found[pair[0]] = pair[1]
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        if lines and lines[-1]:  # torn by a kill: what follows begins a line of its own
            os.write(self._file, b"\n")

    def add(self, key: str, finding: Any) -> None:
        """Keep a finding, which JSON can hold. Raises OSError when it cannot be written whole."""
        line = _line(key, finding)
        if os.write(self._file, line) != len(line):
            raise OSError(f"{self.path}: no room for a finding")
        self.found[key] = finding

    def settle(self, keys: Iterable[str]) -> None:
        """Leave the findings of these keys alone in the file, in this order, as if nothing had been interrupted."""
        aside = self.path.with_name(f"{self.path.name}.new")
        with aside.open("wb") as file:
            file.writelines(_line(key, self.found[key]) for key in dict.fromkeys(keys))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        os.close(self._file)
        if not self.found:
            self.path.unlink(missing_ok=True)


def _line(key: str, finding: Any) -> bytes:
    text = json.dumps({"key": key, "finding": finding}, separators=(",", ":"))
    return f"{_digest(text)} {text}\n".encode()


def _read(line: bytes) -> tuple[str, Any] | None:
    """The key and finding of a line that is whole; None for what is not."""
    digest, _, text = line.partition(b" ")
    if digest.decode("ascii", "replace") != _digest(text.decode("utf-8", "replace")):
        return None
    held: Mapping[str, Any] = json.loads(text)
    return held["key"], held["finding"]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
