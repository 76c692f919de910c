"""A folder whose results change as one set: written aside, then swapped whole for the earlier ones.

Whoever looks, or kills the process, finds all of the old set or all of the new one. Where the folder can be exchanged
(`kvsim.results.folder_swap`) that takes one step. Where it cannot (a mount point, the current directory, a folder
with folders of the user's) the files are moved one by one: `summary.json` goes first and comes last, so that what
stands beside a summary always belongs to it, and the next run goes on where a killed one was stopped.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvsim.results import folder_swap
from kvsim.results.folder_swap import MARK, files_of
from kvsim.version import __version__

Names = Callable[[Path], Sequence[str]]
"""The files of the set that a folder holds, as relative paths; () where it holds none."""


@dataclass(slots=True)
class Held:
    """A folder that no other process writes results to while this one does."""

    path: Path
    earlier: Names
    locks: list[int] = field(default_factory=list)

    def check(self, names: Sequence[str]) -> None:
        """Raise ValueError where something of the user's stands in the way of the files `names`."""
        for path in (self.path / name for name in names):
            folder = path.parent
            if folder != self.path and os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir()):
                raise ValueError(f"{folder} is in the way: results need a folder of this name; move it elsewhere")
            if path.is_dir() and not path.is_symlink():
                raise ValueError(f"{path} is in the way: results need a file of this name; move it elsewhere")

    def replace(self, fill: Callable[[Path], None]) -> None:
        """Put what `fill` writes into an empty folder in the place of the earlier results; other files stay.

        Raises OSError when it cannot be written; the earlier results are whole then.
        """
        aside = None
        try:
            self._make_sure()
            aside = self._aside()
            new = aside / folder_swap.SET
            new.mkdir()
            fill(new)
            folder_swap.sync(new)
            self.check(files_of(new))
            with folder_swap.undisturbed():
                if not self._exchange(aside):
                    folder_swap.move(aside, self.path, self._earlier())
        except OSError as error:
            raise OSError(f"{self.path}: the results cannot be written: {error.strerror or error}") from error
        finally:
            if aside is not None and not (aside / folder_swap.MOVING).exists():
                with suppress(OSError):
                    folder_swap.finish(aside, self.path)

    def _make_sure(self) -> None:
        """Make the folder again where somebody has removed it, or put another in its place, since it was held."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not any(os.path.samestat(os.fstat(lock), self.path.stat()) for lock in self.locks):
            self.locks.append(_locked(self.path))

    def _earlier(self) -> list[str]:
        """What of the earlier set stands here itself, and not where a link of the user's leads."""
        return [name for name in self.earlier(self.path) if not (self.path / name).parent.is_symlink()]

    def _exchange(self, aside: Path) -> bool:
        if not folder_swap.may_exchange(self.path):
            return False
        self.locks.append(_locked(aside / folder_swap.SET))  # what takes the folder's place is ours from the start on
        return folder_swap.exchange(aside, self.path, self._earlier())

    def _aside(self) -> Path:
        """A new folder with our mark, on the same file system: beside the results, or else among them."""
        beside = not os.path.ismount(self.path) and os.access(self.path.parent, os.W_OK | os.X_OK)
        aside = Path(tempfile.mkdtemp(prefix=_prefix(self.path), dir=self.path.parent if beside else self.path))
        try:
            mark = {"kvsim": __version__, "results_of": self.path.name}
            (aside / MARK).write_text(json.dumps(mark), encoding="utf-8")
        except BaseException:
            folder_swap.remove(aside)
            raise
        return aside


@contextmanager
def hold(out: Path, earlier: Names, names: Sequence[str] = ()) -> Iterator[Held]:
    """The folder `out`, made where it is missing, for this process alone, without what killed runs left.

    `names` are the files that are to come. When the context ends in an error a new folder is removed again. Raises
    ValueError when `out` is a file, lies below one, takes no files, or another process holds it.
    """
    path = Path(os.path.realpath(out))
    new: list[Path] = []
    locks: list[int] = []
    try:
        try:
            blocking = next((place for place in (out, *out.parents) if place.exists()), None)
            if blocking is not None and not blocking.is_dir():
                raise ValueError(f"{blocking} is a file; results need a folder, so choose another name for it")
            new = [place for place in (path, *path.parents) if not place.exists()]
            path.mkdir(parents=True, exist_ok=True)
            locks.append(_locked(path))
            _tidy(path)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise ValueError(f"{out}: {error.strerror}; results need a folder that takes files") from None
        held = Held(path, earlier, locks)
        held.check(names)
        yield held
    except BaseException:
        for place in new:
            with suppress(OSError):  # it holds something by now
                place.rmdir()
        raise
    finally:
        for lock in locks:
            os.close(lock)


def _locked(path: Path) -> int:
    """A descriptor of the folder with a lock that ends with this process; ValueError when another one has it."""
    while True:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            _lock(descriptor, path)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # it was exchanged for another one just now


def _lock(descriptor: int, path: Path) -> None:
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"{path}: another kvsim is at work on the results of this folder; wait for it, or choose another folder"
        ) from None
    except OSError:  # a file system without locks, where each set still comes whole
        return


def _tidy(path: Path) -> None:
    """End the moves that a killed process began, and remove what it had written aside."""
    for place in {path.parent, path}:
        for aside in place.glob(f"{_prefix(path)}*"):
            if not aside.is_symlink() and _is_ours(aside, path):
                folder_swap.finish(aside, path)


def _is_ours(aside: Path, path: Path) -> bool:
    if aside.stat().st_uid != os.geteuid():
        return False  # in a folder such as /tmp: another user's, whose records are not to be followed
    try:
        mark: Any = json.loads((aside / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        with suppress(OSError):  # killed before it left its mark: empty, or not ours
            if (aside / MARK).exists() and not (aside / MARK).stat().st_size:
                (aside / MARK).unlink()
            aside.rmdir()
        return False
    return isinstance(mark, dict) and mark.get("results_of") == path.name


def _prefix(path: Path) -> str:
    return f".kvsim-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]}-"
