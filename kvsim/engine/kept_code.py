"""Machine code that numba keeps on disk: used when it is whole, made anew when not, and done without where it must be.

numba itself raises what a damaged file makes of its reader, in every run from then on. Here each file ends in a digest
of its content and of what it is for, and whatever goes wrong with a file costs a compilation, never a run.
"""

import hashlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from numba.core import event
from numba.core.caching import FunctionCache, IndexDataCacheFile, _CacheLocator

_LEFT_S = 3600.0  # a file that nobody has written to for so long was left by a process that was killed
_CALLBACK = "_raw_object_cache_notify"  # where LLVM calls Python, which cannot raise from there
_AGAIN_S = 0.05
_SIGNALS = [number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None]


def keep(function: Any, folder: Path) -> None:
    """Keep what numba compiles for `function`, a dispatcher, in a folder."""
    function._cache = _Cache(function.py_func, folder)  # noqa: SLF001 - what `enable_caching` sets


def kept(function: Any, signature: Any) -> bool:
    """Whether there was code for a signature on disk; `function` has it now."""
    code = function._cache.load_overload(signature, function.targetctx)  # noqa: SLF001 - as `compile` does
    if code is None:
        return False
    function.add_overload(code)
    return True


def is_kept(function: Any) -> bool:
    """Whether other processes need not compile `function` anew, as far as this one has."""
    return bool(function._cache.kept)  # noqa: SLF001


class _Cache(FunctionCache):  # type: ignore[misc]
    def __init__(self, function: Any, folder: Path) -> None:
        self._impl_class = type("_Impl", (super()._impl_class,), {"_locator_classes": [_place(folder)]})
        super().__init__(function)
        impl = self._impl
        self._cache_file = _Files(self._cache_path, impl.filename_base, impl.locator.get_source_stamp())
        self.kept = True

    def load_overload(self, signature: Any, target: Any) -> Any:
        try:
            return super().load_overload(signature, target)
        except Exception:  # noqa: BLE001 - whatever a file makes of its reader, the code can be compiled
            return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        try:
            super().save_overload(signature, compiled)
        except Exception as error:  # noqa: BLE001 - the code is there, and need not be kept
            self.kept = False
            why = getattr(error, "strerror", None) or error
            sys.stderr.write(
                f"warning: the compiled simulator cannot be kept in {self._cache_path} ({why}): the next long run "
                "compiles anew; make room, or name a folder in the environment's NUMBA_CACHE_DIR\n"
            )


def _place(folder: Path) -> type:
    """A locator of numba's that knows of one folder, whose name says which sources and features its code is of."""

    class Place(_CacheLocator):  # type: ignore[misc]
        def get_cache_path(self) -> str:
            return str(folder)

        def get_source_stamp(self) -> tuple[str, ...]:
            return folder.parts[-2:]

        def get_disambiguator(self) -> str:
            return ""

        @classmethod
        def from_function(cls, _function: Any, _file: str) -> "Place":
            return cls()

    return Place


class _Files(IndexDataCacheFile):  # type: ignore[misc]
    """numba's index and data files, each followed by a digest; pickle reads no further than to its own end."""

    _bound = b""  # what the data are for; an index says so itself

    def save(self, key: Any, data: Any) -> None:
        self._bound = repr(key).encode()
        self._remove_left()
        super().save(key, data)

    def load(self, key: Any) -> Any:
        self._bound = repr(key).encode()
        return super().load(key)

    def _load_index(self) -> Any:
        return super()._load_index() if self._is_whole(Path(self._index_path)) else {}

    def _load_data(self, name: str) -> Any:
        path = Path(self._data_path(name))
        if not self._is_whole(path):
            raise OSError(f"{path} is damaged")  # to numba, as good as not there
        return super()._load_data(name)

    @contextmanager
    def _open_for_write(self, path: str) -> Iterator[Any]:
        with super()._open_for_write(path) as file:
            summed = _Summed(file, self._salt(Path(path)))
            yield summed
            file.write(summed.digest())

    def _is_whole(self, path: Path) -> bool:
        try:
            content = path.read_bytes()
        except OSError:
            return False
        end = len(content) - hashlib.sha256().digest_size
        return end > 0 and hashlib.sha256(self._salt(path) + content[:end]).digest() == content[end:]

    def _salt(self, path: Path) -> bytes:
        return repr(self._source_stamp).encode() + (b"" if str(path) == self._index_path else self._bound)

    def _remove_left(self) -> None:
        for path in Path(self._cache_path).glob(f"{Path(self._index_path).stem}.*.tmp.*"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _LEFT_S:
                    path.unlink()


class _Summed:
    """A file that is written to, and the digest of what was."""

    def __init__(self, file: Any, salt: bytes) -> None:
        self._file, self._found = file, hashlib.sha256(salt)

    def write(self, data: bytes) -> int:
        self._found.update(data)
        return int(self._file.write(data))

    def digest(self) -> bytes:
        return self._found.digest()


class _Hearing(event.Listener):  # type: ignore[misc]
    """While numba compiles, what a signal raises is not lost: within a callback of LLVM's the signal comes again."""

    def __init__(self) -> None:
        self._former: dict[int, Any] = {}

    def on_start(self, _event: Any) -> None:
        if self._former or threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                self._former[number] = handler
                signal.signal(number, self._handle)

    def on_end(self, _event: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            while self._former:
                signal.signal(*self._former.popitem())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if _in_callback(frame):
            main = threading.main_thread().ident or 0
            threading.Timer(_AGAIN_S, lambda: signal.pthread_kill(main, number)).start()
        else:
            self._former[number](number, frame)


def _in_callback(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == _CALLBACK:
            return True
        frame = frame.f_back
    return False


event.register("numba:compile", _Hearing())
