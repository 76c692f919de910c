"""Putting a set of files in the place of another: by exchanging two folders, or file by file where that is no choice.

A set lies in `aside/set`, beside a record of what is being done, so that what a killed process began can be ended.
"""

import ctypes
import errno
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

SET = "set"
MARK = "kvsim.json"  # says whose results a folder written aside is for
SUMMARY = "summary.json"  # in place only while all files of its set are
MOVING, EXCHANGING = "moving.json", "exchanging.json"  # records of the two ways
_MOST_LINKS = 1000  # of a user's files, for one exchange
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100  # linux/fs.h, fcntl.h


def files_of(folder: Path) -> list[str]:
    """The relative paths of all files below a folder, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or path.is_file())


def sync(folder: Path) -> None:
    """Have all files below a folder, and the folder itself, on disk."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot
                raise
        finally:
            os.close(descriptor)


@contextmanager
def undisturbed() -> Iterator[None]:
    """No signal but a kill ends this process here; what came meanwhile is heard at the end.

    Masking signals would not do: other threads, as those of Arrow, take them for the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    heard: list[int] = []
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    former = {number: signal.signal(number, lambda number, _frame: heard.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        for number in heard:
            signal.raise_signal(number)


def may_exchange(path: Path) -> bool:
    """Whether nobody relies on the folder itself, as on a mount point or the directory that one is in."""
    try:
        here = Path.cwd()
    except FileNotFoundError:
        return not os.path.ismount(path)
    return not os.path.ismount(path) and path != here and path not in here.parents


def exchange(aside: Path, path: Path, earlier: Sequence[str]) -> bool:
    """Exchange the set for the folder `path`, whose files outside `earlier` are linked into it; False if that fails.

    A link first and one step then: at no time does a file of the user's stand nowhere.
    """
    new = aside / SET
    carried = _carried(path, new, earlier)
    if carried is None:
        return False
    linked: list[Path] = []
    try:
        _write(
            aside / EXCHANGING,
            {
                "inode": new.stat().st_ino,
                "earlier": list(earlier),
                "carried": {name: (path / name).lstat().st_ino for name in carried},
            },
        )
        for name in carried:
            (new / name).parent.mkdir(exist_ok=True)
            os.link(path / name, new / name, follow_symlinks=False)
            linked.append(new / name)
        _take_after(new, path)
        for folder in {new, *(link.parent for link in linked)}:
            sync_folder(folder)
        _rename_exchange(new, path)
    except (OSError, NotImplementedError):
        for link in linked:
            link.unlink()
        (aside / EXCHANGING).unlink(missing_ok=True)
        return False
    sync_folder(path.parent)
    finish(aside, path)
    return True


def move(aside: Path, path: Path, earlier: Sequence[str]) -> None:
    """Move the set into `path` file by file, in the place of the files `earlier`."""
    names = files_of(aside / SET)
    for folder in {(path / name).parent for name in (*earlier, *names)}:
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, f"{folder} takes no files")
    inside = path / aside.name
    try:
        if inside != aside:
            shutil.move(aside, inside)  # a copy where `path` is mounted; from there on, every move is one step
            sync(inside)
        _write(inside / MOVING, {"earlier": list(earlier), "names": names})
    except BaseException:
        remove(inside)
        raise
    sync_folder(inside)
    finish(inside, path)


def finish(aside: Path, path: Path) -> None:
    """End what was begun: moves go on, what was not swapped or is old goes, and files of the user's are kept."""
    moving, exchanging = _read(aside / MOVING), _read(aside / EXCHANGING)
    if moving is not None:
        _go_on(aside / SET, path, moving["earlier"], moving["names"])
    elif exchanging is not None and _inode(aside / SET) not in (None, exchanging["inode"]):
        _keep(aside / SET, path, exchanging["earlier"], exchanging["carried"])
    remove(aside)


def remove(aside: Path) -> None:
    """Remove what was written aside, its mark last: what a kill leaves of it is still known as ours."""
    shutil.rmtree(aside / SET, ignore_errors=True)
    with suppress(OSError):
        for path in sorted(aside.iterdir(), key=lambda path: path.name == MARK):
            path.unlink()
        aside.rmdir()


def _go_on(new: Path, path: Path, earlier: Sequence[str], names: Sequence[str]) -> None:
    if not (new / SUMMARY).exists():
        return  # the last step was taken
    (path / SUMMARY).unlink(missing_ok=True)
    for name in sorted(set(earlier) - set(names)):
        (path / name).unlink(missing_ok=True)
        if (path / name).parent != path:
            with suppress(OSError):  # not empty, or gone
                (path / name).parent.rmdir()
    for name in sorted(names, key=lambda name: name == SUMMARY):
        if (new / name).exists():
            (path / name).parent.mkdir(exist_ok=True)
            sync_folder(path)
            (new / name).replace(path / name)
    for folder in {path, *((path / name).parent for name in names)}:
        sync_folder(folder)


def _keep(old: Path, path: Path, earlier: Sequence[str], carried: dict[str, int]) -> None:
    """Bring over what has come into the old folder, or been replaced in it, since its files were linked."""
    for name in set(files_of(old)) - set(earlier):
        late = (old / name).lstat().st_ino != carried[name] if name in carried else not os.path.lexists(path / name)
        if late:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (old / name).replace(path / name)


def _carried(path: Path, new: Path, earlier: Sequence[str]) -> list[str] | None:
    """The user's files in `path` that the new set must have too; None where there are folders or too many of them."""
    ours = set(earlier)
    folders = {str(Path(name).parent) for name in (*earlier, *files_of(new))}
    found: list[str] = []
    for folder in sorted(folders):
        if not (path / folder).is_dir():
            continue
        with os.scandir(path / folder) as entries:
            for entry in entries:
                name = str(Path(folder) / entry.name)
                if entry.is_dir(follow_symlinks=False):
                    if name not in folders:
                        return None
                elif name not in ours and not (new / name).exists():
                    found.append(name)
        if len(found) > _MOST_LINKS:
            return None
    return found


def _take_after(new: Path, old: Path) -> None:
    """Give the folder `new` the mode, the attributes and the owner of `old`."""
    mine, former = new.stat(), old.stat()
    if (mine.st_uid, mine.st_gid) != (former.st_uid, former.st_gid):
        os.chown(new, former.st_uid, former.st_gid)
    shutil.copystat(old, new)
    os.utime(new)


def _rename_exchange(one: Path, other: Path) -> None:
    if not sys.platform.startswith("linux"):
        raise NotImplementedError
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        raise NotImplementedError
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system that cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, record: dict[str, Any]) -> None:
    """A record that is there whole or not at all."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(record, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise ValueError(f"{path} is damaged: move what you need out of its folder, and remove that") from None
    return record


def _inode(path: Path) -> int | None:
    try:
        return path.lstat().st_ino
    except FileNotFoundError:
        return None
