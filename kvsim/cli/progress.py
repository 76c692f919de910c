"""A progress bar on standard error, where that is a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function that shows how much is done; the bar goes when all of it is, or the context ends."""
    if not sys.stderr.isatty():
        yield lambda _done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    look = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*look, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(label, total=total)

        def show(done: int) -> None:
            bars.update(task, completed=done)
            if done >= total:
                bars.stop()

        yield show


@contextmanager
def counted(what: str) -> Iterator[Callable[[int], None]]:
    """A function that shows how many have ended where nobody knows how many there will be; they go with the context."""
    if not sys.stderr.isatty():
        yield lambda _ended: None
        return
    from rich.console import Console

    with Console(stderr=True).status(f"{what} begin") as status:
        yield lambda ended: status.update(f"{ended} {what} have ended")
