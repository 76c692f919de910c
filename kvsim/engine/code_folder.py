"""Where machine code of the loop is kept: a folder for each state of the sources and each set of features."""

import hashlib
import os
import platform
import shutil
import sys
import time
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

_COMPILED = ("engine", "iteration", "hardware", "plans")  # rooms whose functions and constants are in it
_READY = "ready"
_FORGOTTEN_S = 30 * 86400.0  # code of sources that nobody has run for so long


class CodeFolder:
    """The folder of code that has some features, which need not be there."""

    def __init__(self, path: Path, features: tuple[str, ...]) -> None:
        self.path, self.features = path, features

    @property
    def is_ready(self) -> bool:
        """Whether some process has compiled it to the end."""
        return (self.path / _READY).is_file()

    def declare(self, ready: bool) -> None:
        """Say that the code is there, or that what is there is none."""
        with suppress(OSError):
            if ready:
                (self.path / _READY).touch()
            else:
                (self.path / _READY).unlink()


def code_folders(features: tuple[str, ...]) -> list[CodeFolder]:
    """Folders of code that has these features: the one that has no others first, then those with more."""
    own = CodeFolder(_sources_folder() / ("+".join(features) or "core"), features)
    others = []
    with suppress(OSError):
        for path in sorted(_sources_folder().iterdir()):
            more = () if path.name == "core" else tuple(path.name.split("+"))
            if path != own.path and set(features) <= set(more):
                others.append(CodeFolder(path, more))
    return [own, *sorted(others, key=lambda folder: len(folder.features))]


def make(folder: CodeFolder) -> bool:
    """Have a folder that can be written to; whether there is one. Folders that nobody uses any more go."""
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    with suppress(OSError):
        os.utime(_sources_folder())
        for other in _base().iterdir():
            if other.name.startswith("loop-") and time.time() - other.stat().st_mtime > _FORGOTTEN_S:
                shutil.rmtree(other, ignore_errors=True)
    return os.access(folder.path, os.W_OK)


def _base() -> Path:
    """What the user names in `NUMBA_CACHE_DIR`, or his cache."""
    named = os.environ.get("NUMBA_CACHE_DIR")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "kvsim"


def _sources_folder() -> Path:
    return _base() / f"loop-{_digest()}"


@cache
def _digest() -> str:
    """Of all that the code depends on but the processor, by which numba tells code apart itself."""
    found = hashlib.sha256()
    for name in ("numba", "llvmlite", "numpy"):
        found.update(version(name).encode())
    found.update(f"{sys.implementation.cache_tag} {platform.machine()}".encode())
    root = Path(__file__).parents[1]
    for room in _COMPILED:
        for path in sorted((root / room).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()[:16]
