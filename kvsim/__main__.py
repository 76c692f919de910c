"""Entry point of the `kvsim` program: runs a command, turns errors into one line and an exit code."""

import os
import sys
from collections.abc import Sequence

import typer
from typer.exceptions import TyperException

from kvsim.cli import TargetUnmet
from kvsim.cli.app import app
from policies.shown import MOST_SHOWN

LONGEST_WORD = 1024  # a path may be long; a value that typer or the system quotes whole may be longer


def main(args: Sequence[str] | None = None) -> int:
    """Run the command that `args` (default: those of the process) name and return the exit code.

    Bad input ends with one line on standard error; `python -X dev -m kvsim` raises it instead, with its traceback.
    """
    try:
        # typer returns the code of typer.Exit, 130 after Ctrl-C, and None when a command just ends.
        code: int | None = typer.main.get_command(app)(args=args, prog_name="kvsim", standalone_mode=False)
        sys.stdout.flush()
        return code or 0
    except BrokenPipeError:
        # The reader (head, less) has gone; without this Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except TyperException as error:
        # pydantic, which typer calls to run a parser, puts its own words before those of the error.
        return _fail(error.format_message().replace("Value error, ", ""), error.exit_code)
    except TargetUnmet as error:
        return _fail(str(error), 3)
    except (ValueError, OSError, MemoryError) as error:
        if sys.flags.dev_mode:
            raise
        return _fail(_explain(error), 2)


def _explain(error: ValueError | OSError | MemoryError) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _fail(message: str, code: int) -> int:
    if message:  # empty when typer has printed the help in place of a message
        words = (word if len(word) <= LONGEST_WORD else f"{word[:MOST_SHOWN]}..." for word in message.split())
        sys.stderr.write(f"error: {' '.join(words)}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
