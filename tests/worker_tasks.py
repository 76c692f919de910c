"""What tests have other processes do, which find it by the name of its module."""

import os
import signal
import threading
from typing import Any

from kvsim.results.summary import Result


class Known:
    """What a process was told when it began."""

    slots: Any = None


def know(slots: Any = None) -> None:
    Known.slots = slots


def square(n: int) -> int:
    return n * n


def own_id() -> int:
    return os.getpid()


def mark(index: int) -> int:
    Known.slots[index] = os.getpid()
    return int(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def linger(index: int) -> None:
    Known.slots[index] = os.getpid()
    threading.Event().wait()


def fail(kind: type[Exception], text: str) -> None:
    raise kind(text)


def tokens(result: Result) -> int:
    return int(result.requests["output_tokens"].sum())


def tokens_unless_quest(result: Result) -> int:
    """Dies over some results, as a process that runs out of memory would."""
    if result.inputs["policy"].startswith("quest"):
        die()
    return tokens(result)
