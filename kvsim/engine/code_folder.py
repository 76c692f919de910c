"""Where machine code of the loop is kept: a folder for each state of the sources and each set of features."""

import hashlib
import os
import shutil
import sys
import time
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

from kvsim.engine import kept_code

_COMPILED = ("engine", "iteration", "hardware", "plans")  # rooms whose functions and constants are in it
_FILE = "play.code"
# What makes numba compile for another processor than this one.
_ASKED = ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_ENABLE_AVX")
_FORGOTTEN_S = 30 * 86400.0  # code of sources that nobody has run for so long


class CodeFolder:
    """The folder of code that has some features, which need not be there."""

    def __init__(self, path: Path, features: tuple[str, ...]) -> None:
        self.path, self.features = path, features

    def read(self, layouts: str) -> bytes | None:
        """The code for a state of these layouts, if some process has compiled it to the end."""
        return kept_code.read(self.path / _FILE, self._purpose(layouts))

    def keep(self, code: bytes, layouts: str) -> None:
        """Keep code for a state of these layouts. OSError where that cannot be."""
        kept_code.write(self.path / _FILE, self._purpose(layouts), code)

    def _purpose(self, layouts: str) -> bytes:
        return "\n".join([*self.path.parts[-2:], layouts]).encode()


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
    """Of all that the code depends on, the processor included: machines may share a folder."""
    import llvmlite.binding as llvm

    found = hashlib.sha256()
    for name in ("numba", "llvmlite", "numpy"):
        found.update(version(name).encode())
    found.update(f"{sys.implementation.cache_tag} {llvm.get_process_triple()} {llvm.get_host_cpu_name()}".encode())
    with suppress(RuntimeError):  # LLVM knows of no features of this kind of processor
        found.update(llvm.get_host_cpu_features().flatten().encode())
    found.update(repr([os.environ.get(name) for name in _ASKED]).encode())
    root = Path(__file__).parents[1]
    for room in _COMPILED:
        for path in sorted((root / room).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()[:16]
