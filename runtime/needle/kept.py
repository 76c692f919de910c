"""needle-28m unpacked once for each user, in the cache that XDG names: a whole folder, or none."""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime.needle.expand import COPIED, PACKED, WEIGHTS, expand

_DIGESTS = "sha256.json"  # of the files beside it
_UNFINISHED = ".unfinished-"
_LEFT_S = 3600.0  # unpacking takes a second: what is so old was left by a process that was killed


def kept() -> Path:
    """The folder of needle-28m, unpacked when it is not there or damaged.

    Raises OSError where the user has no cache that can be written.
    """
    cache = _user_cache() / "kvsim"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    _remove_left(cache)
    folder = cache / f"needle-28m-{_packed_digest()}"
    with _one_at_a_time(cache):
        if not _is_whole(folder):
            _unpack(cache, folder)
    return folder


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: two may unpack, and the folder is whole all the same
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _user_cache() -> Path:
    """By the XDG base directory specification, which ignores relative paths."""
    stated = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if stated.is_absolute():
        return stated
    try:
        return Path.home() / ".cache"
    except RuntimeError as error:
        raise OSError(str(error)) from None


def _unpack(cache: Path, folder: Path) -> None:
    """Unpack aside, then take the place of what is damaged."""
    with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=cache, ignore_cleanup_errors=True) as aside:
        new = expand(Path(aside) / "model")
        digests = {path.name: _digest(path) for path in sorted(new.iterdir())}
        (new / _DIGESTS).write_text(json.dumps(digests), encoding="utf-8")
        with suppress(OSError):
            folder.rename(Path(aside) / "damaged")
        try:
            new.rename(folder)
        except OSError:
            if not _is_whole(folder):
                raise


def _is_whole(folder: Path) -> bool:
    try:
        digests: dict[str, str] = json.loads((folder / _DIGESTS).read_text(encoding="utf-8"))
        expected = {*COPIED, "model.safetensors"}
        return set(digests) == expected and all(_digest(folder / name) == own for name, own in digests.items())
    except (OSError, ValueError, TypeError):
        return False


def _packed_digest() -> str:
    """Of all that the folder is made from, this program's way to unpack it included."""
    sources = [PACKED / WEIGHTS, *(PACKED / name for name in COPIED), PACKED / "expand.py"]
    return hashlib.sha256("".join(map(_digest, sources)).encode()).hexdigest()[:16]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_left(cache: Path) -> None:
    for path in cache.glob(f"{_UNFINISHED}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _LEFT_S:
                shutil.rmtree(path, ignore_errors=True)
