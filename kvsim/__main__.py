"""Entry point of the `kvsim` program: runs a command, turns errors into one line and an exit code."""

import gc
import io
import sys
from collections.abc import Sequence
from contextlib import suppress

import typer
from typer.exceptions import TyperException

from kvsim.cli import TargetUnmet
from kvsim.cli.app import app
from kvsim.cli.process import OutputLost, discard_output, in_order
from kvsim.text.printable import brief, printable

_COLLECTED_AFTER = 50_000  # new objects: what a command loads is here to stay, and need not be walked again and again
LONGEST_WORD, SHORTENED_WORD, LONGEST_MESSAGE = (
    1024,
    80,
    560,
)  # a value that typer or the system quotes whole may have megabytes


def main(args: Sequence[str] | None = None) -> int:
    """Run the command that `args` (default: those of the process) name and return the exit code.

    Bad input ends with one line on standard error; `python -X dev -m kvsim` raises it instead, with its traceback.
    """
    gc.set_threshold(_COLLECTED_AFTER)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that it cannot write is escaped, and ends no command
            stream.reconfigure(errors="backslashreplace")
    try:
        with in_order():
            # typer returns the code of typer.Exit, 130 after Ctrl-C, and None when a command just ends.
            code: int | None = typer.main.get_command(app)(args=args, prog_name="kvsim", standalone_mode=False)
        return code or 0
    except KeyboardInterrupt:  # typer makes a code of it, but not of one that comes after its command
        return 130
    except BrokenPipeError:  # the reader (head, less) has gone
        discard_output()
        return 1
    except OutputLost as error:
        discard_output()
        return _fail(str(error), 1)
    except TyperException as error:
        # pydantic, which typer calls to run a parser, puts its own words before those of the error.
        return _fail(error.format_message().replace("Value error, ", "") + _help(error), error.exit_code)
    except TargetUnmet as error:
        return _fail(str(error), 3)
    except (ValueError, OSError, MemoryError) as error:
        if sys.flags.dev_mode:
            raise
        return _fail(_explain(error), 2)


def _help(error: TyperException) -> str:
    """What stands for an option of a serving engine, or where to look for what arguments a command takes."""
    context = getattr(error, "ctx", None)
    if context and context.info_name in ("simulate", "compare", "explain"):
        from kvsim.scenario.engine_names import in_words

        if words := in_words(getattr(error, "option_name", "")):
            return f"; {words}"
    return f"; see {context.command_path} --help" if context and "unexpected extra" in error.format_message() else ""


def _explain(error: ValueError | OSError | MemoryError) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError) and not (type(error) is MemoryError and error.args):  # where no words are ours
        return "this takes more memory than there is; ask for fewer requests (--limit), seeds, GPUs or tokens"
    if isinstance(error, UnicodeEncodeError):
        from policies.shown import shown  # with it come all policies, which help texts do not need

        return f"{shown(error.object)} holds lone surrogates or bytes that are no Unicode text; write it in UTF-8"
    return str(error) or type(error).__name__


def _fail(message: str, code: int) -> int:
    if message:  # empty when typer has printed the help in place of a message
        words = (word if len(word) <= LONGEST_WORD else f"{word[:SHORTENED_WORD]}..." for word in message.split())
        with suppress(OSError):  # nobody is there to be told
            sys.stderr.write(f"error: {brief(printable(' '.join(words)), LONGEST_MESSAGE)}\n")
            sys.stderr.flush()
    return code


if __name__ == "__main__":
    sys.exit(main())
