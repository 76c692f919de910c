"""The public door: one command run in this process, and what must hold whatever it was given.

Its exit code is 0, 2 or 3; a refusal is one line of printable text, short, with a rule or a fix; it takes no more than
10 s of processor time and 2 GB; and a command that fails leaves nothing behind.
"""

import contextlib
import io
import json
import re
import signal
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from kvsim.__main__ import main

LIMIT_S, WAITING_S = 10.0, 60.0  # of processor time; of waiting for something that never comes
LIMIT_BYTES = 2 * 10**9
LONGEST_ERROR = 600
OUTCOMES = {0: "read", 2: "refused", 3: "unmet"}

# What Python and libraries say themselves, to a programmer: somebody who gave a file needs the rule and the fix.
_RAW = re.compile(
    r"codec can't|list index|unsupported operand|invalid literal for|could not convert|cannot convert|NoneType|"
    r"unhashable|math domain|is not iterable|Exceeds the limit|object at 0x|out of bounds|too large to|division by|"
    r"more memory than there is|not subscriptable|has no attribute|must be real|broadcast|zero-size|embedded null|"
    r"not supported between|index \d+ is out|Traceback|<class '|recursion depth|unexpected keyword|positional argument"
)
# Words of rules and of fixes; an error has one at the least.
_RULE = re.compile(
    r"\b("
    r"must|should|needs?|known|uses?|write|written|choose|leave|give|add|missing|keep|lower|raise|takes?|say|name|"
    r"correct|fetch|record|make|install|split|pack|save|exceeds?|cannot|spell|fits?|ask|put|widen|drop|shorten|"
    r"change|convert|see|join|run|read|overlap|lacks|belong|did you mean|at (most|least)|such as|[Nn]o such|Missing|"
    r"is not (YAML|JSON|UTF-8)|Input should|does not|is not one of|it has|works? with|layers are|multiple of|"
    r"differs from|log (one|with)|Unable to parse"
    r")\b"
)


class Hang(BaseException):
    """Raised by the alarm; no `except Exception` can swallow it."""


def attempt_command(args: Sequence[str], folder: Path) -> str:
    """Run the command in `folder` and return its outcome; AssertionError, with the command, for any broken rule."""
    before = _contents(folder)
    code, out, err, grown_bytes = _run([str(arg) for arg in args], folder)
    _require(code in OUTCOMES, args, f"exit code {code}: {err[-300:]}")
    _require(grown_bytes < LIMIT_BYTES, args, f"{grown_bytes:,} bytes of memory")
    after = _contents(folder)
    left = sorted(after - before)
    if code == 0:
        _require(not any(_is_temporary(name) for name in left), args, f"left {left}")
        _check_success(args, out, folder)
    else:
        _check_refusal(args, err)
        _require(not left, args, f"failed, and left {left}")
        _require(after == before, args, f"failed, and took away {sorted(before - after)}")
    return OUTCOMES[code]


def _check_success(args: Sequence[str], out: str, folder: Path) -> None:
    shown = out.replace("\n", "")
    _require(all(c.isprintable() or c == "\xa0" for c in shown), args, f"printed {shown[:200]!a}")
    if "--json" in args:
        _require(_is_json(out), args, f"no JSON: {out[:200]}")
    if "--out" in args and args[0] in ("simulate", "compare"):
        summary = folder / args[list(args).index("--out") + 1] / "summary.json"
        _require(summary.is_file() and _is_json(summary.read_text(encoding="utf-8")), args, "no whole summary.json")


def _check_refusal(args: Sequence[str], err: str) -> None:
    *notes, error = err.rstrip("\n").split("\n")
    _require(error.startswith("error: "), args, f"no error but {err[-300:]!a}")
    _require(all(line.startswith(("warning: ", "note: ")) for line in notes), args, f"more than a line: {err[-600:]}")
    _require(all(c.isprintable() for c in error), args, f"unprintable: {error!a}")
    _require(len(error) <= LONGEST_ERROR, args, f"{len(error)} characters: {error[:200]}")
    _require(not _RAW.search(error), args, f"said by a library: {error}")
    _require(bool(_RULE.search(error.partition(": ")[2])), args, f"neither a rule nor a fix: {error}")


def _run(args: list[str], folder: Path) -> tuple[int, str, str, int]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), guarded() as grown_bytes, warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # an overflow of numpy is a wrong number
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main(args)
        except Hang:
            raise AssertionError(f"{_shown(args)}: takes longer than {LIMIT_S:g} s") from None
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{_shown(args)}: {type(error).__name__}: {str(error)[:300]}") from error
        return code, out.getvalue(), err.getvalue(), grown_bytes()


@contextlib.contextmanager
def guarded() -> Iterator["Grown"]:
    """A limit of time on what runs inside, and a function that says by how many bytes the process has grown in it."""
    grown = Grown()

    def end(_number: int, _frame: FrameType | None) -> None:
        raise Hang

    former = [(kind, signal.signal(kind, end)) for kind in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    signal.setitimer(signal.ITIMER_REAL, WAITING_S)
    try:
        yield grown
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for kind, handler in former:
            signal.signal(kind, handler)


class Grown:
    """By how many bytes this process's resident memory has passed what it was when this was made."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError):  # the peak since then, where the kernel lets it be set back
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._before_bytes = _status_bytes("VmRSS")

    def __call__(self) -> int:
        return _status_bytes("VmHWM") - self._before_bytes


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


def _contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def _is_temporary(name: str) -> bool:
    return Path(name).name.startswith(".") or name.endswith((".tmp", ".part"))


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=lambda name: float(f"no JSON: {name}"))
    except ValueError:
        return False
    return True


def _require(holds: bool, args: Sequence[str], what: str) -> None:
    if not holds:
        raise AssertionError(f"{_shown(args)}: {what}")


def _shown(args: Sequence[str]) -> str:
    return ascii([arg if len(arg) < 200 else f"{arg[:200]}..." for arg in map(str, args)])
