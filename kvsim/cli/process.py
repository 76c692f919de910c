"""The program as a process: streams that may be closed or full, and signals that end it in order."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

_ENDING = ("SIGTERM", "SIGHUP")


class OutputLost(Exception):
    """Standard output takes nothing: it was closed from the start, or what it leads to is full."""


@contextmanager
def in_order() -> Iterator[None]:
    """SIGTERM and SIGHUP end the context as an error does: processes that it started end, temporary files go.

    Inside, standard streams are there whatever the process was given. What standard error does not take is dropped.
    Raises OutputLost where standard output takes nothing; a reader that has gone raises BrokenPipeError as ever.
    """
    closed = sys.stdout is None
    _fill_in()
    former = {number: signal.signal(number, _end) for number in _unheard()}
    streams: Any = sys.stdout, sys.stderr  # those of this process, or what a caller has put in their place
    if sys.stdout is sys.__stdout__:
        sys.stdout = _Stated(streams[0])
    if sys.stderr is sys.__stderr__:
        sys.stderr = _Heedless(streams[1])
    try:
        yield
        if closed:
            raise OutputLost("standard output is closed")
        sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = streams
        for number, handler in former.items():
            signal.signal(number, handler)


@contextmanager
def finishing() -> Iterator[list[int]]:
    """Let the first Ctrl-C wait for the end of the context, into whose value it goes; a second one comes at once."""
    heard: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield heard  # signals are the main thread's
        return

    def handle(number: int, _frame: object) -> None:
        if heard:
            raise KeyboardInterrupt
        heard.append(number)

    former = signal.signal(signal.SIGINT, handle)
    try:
        yield heard
    finally:
        signal.signal(signal.SIGINT, former)


def discard_output() -> None:
    """Let standard output lead nowhere, so that Python does not complain once more when it flushes at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fill_in() -> None:
    """Open what was closed, or the next file to be opened would be taken for a standard stream."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123 - as long as the process


def _unheard() -> list[int]:
    """Signals that would kill this process; nohup ignores one of them, and a program around this may handle them."""
    if threading.current_thread() is not threading.main_thread():
        return []
    numbers = [getattr(signal, name) for name in _ENDING if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]


def _end(number: int, _frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # once is enough: what follows is the end
    raise SystemExit(128 + number)


class _Stream:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Heedless(_Stream):
    """A stream that drops what it cannot take."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


class _Stated(_Stream):
    """A stream whose faults are told from those of files."""

    def write(self, text: str) -> int:
        with _lost():
            return self._stream.write(text)

    def flush(self) -> None:
        with _lost():
            self._stream.flush()


@contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputLost(f"standard output: {error.strerror or error}") from None
