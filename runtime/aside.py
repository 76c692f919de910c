"""A file that is written aside and put in its place whole: a reader sees the old one or the new one, never a part."""

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SUFFIX = ".kvsim-part"  # of the hidden folder, beside the file, that a save writes in


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Where to write the new content of `path`: it takes its place when the context ends, and is gone when it fails.

    Of a link it is the file that the link names. What killed writers of the same file have left behind is removed; a
    writer at work holds a lock on its folder, so that several may write at once, and the last to finish has the file.
    Raises ValueError where something stands that is no file, FileNotFoundError where there is no folder.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is no file; name one, or a place where none is")
    folder, lock = _folder(path)
    try:
        _remove_abandoned(path, folder)
        new = folder / path.name
        yield new
        _synchronise(new)
        new.replace(path)
        _synchronise(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _folder(path: Path) -> tuple[Path, int]:
    """A new locked folder; made again where another writer took it for abandoned before it was locked."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_prefix(path), suffix=SUFFIX, dir=path.parent))
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.exists():
                return folder, lock
        except BlockingIOError:
            pass
        os.close(lock)


def _prefix(path: Path) -> str:
    return f".{path.name[:48]}."  # a name may have 255 bytes, and a character four


def _remove_abandoned(path: Path, mine: Path) -> None:
    """Remove the folders of writers that no longer live: their locks died with them."""
    for other in path.parent.iterdir():
        if other == mine or not (other.name.startswith(_prefix(path)) and other.name.endswith(SUFFIX)):
            continue
        try:
            lock = os.open(other, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # it has just ended, or is nothing of ours
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(other, ignore_errors=True)
        except OSError:  # at work, or on a file system without locks
            pass
        finally:
            os.close(lock)


def _synchronise(path: Path) -> None:
    """Have what was written reach the disk, so that a loss of power does not undo the order of things."""
    place = os.open(path, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)
