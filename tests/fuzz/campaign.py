"""Mutated inputs by the thousand, each through the public door: `python -m fuzz.campaign --number 10000 --out FILE`.

An input is known by its kind, its seed and its number, and made from these alone: `--only KIND --seed S --first N
--number 1 --keep FOLDER` makes one again and leaves it to be looked at.
"""

import argparse
import faulthandler
import importlib
import json
import multiprocessing
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

from kvsim.version import __version__

HERE = Path(__file__).parent
README, RESULT = HERE.parents[1] / "README.md", HERE.parents[1] / "benchmarks" / "results" / "fuzz.json"
REPORTED = ("numpy", "pyarrow", "pydantic", "PyYAML", "typer")
PIECE = 125
STUCK_S = 300  # in compiled code no alarm is heard: the process ends, and says where it was


class Failure(NamedTuple):
    """An input that broke a rule."""

    kind: str
    seed: int
    number: int
    message: str


def kinds() -> list[str]:
    """The modules beside this one that have an `attempt`, by name."""
    return sorted(path.stem for path in HERE.glob("*.py") if "\ndef attempt(" in path.read_text(encoding="utf-8"))


def one(kind: str, seed: int, number: int, folder: Path) -> str:
    """The outcome of one input; AssertionError where it broke a rule."""
    attempt = importlib.import_module(f"fuzz.{kind}").attempt
    outcome: str = attempt(random.Random(f"{kind} {seed} {number}"), folder)
    return outcome


def several(kind: str, seed: int, first: int, number: int, outcomes: Counter[str]) -> Iterator[Failure]:
    """Try `number` inputs, count their outcomes, and yield those that broke a rule."""
    for index in range(first, first + number):
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            faulthandler.dump_traceback_later(STUCK_S, exit=True)
            try:
                outcomes[one(kind, seed, index, Path(folder))] += 1
            except AssertionError as error:
                outcomes["failed"] += 1
                yield Failure(kind, seed, index, str(error))
            finally:
                faulthandler.cancel_dump_traceback_later()


class Piece(NamedTuple):
    """Inputs of one kind that are tried one after another, in one process."""

    kind: str
    seed: int
    first: int
    number: int


def tried(piece: Piece) -> tuple[Counter[str], list[Failure], float]:
    """The outcomes of a piece, the inputs that broke a rule, and the seconds of processor time that it took."""
    outcomes, began_s = Counter[str](), process_time()
    failures = list(several(*piece, outcomes))
    return outcomes, failures, process_time() - began_s


def report(number: int, seed: int, counted: dict[str, Counter[str]], cpu_s: float) -> dict[str, Any]:
    """What `benchmarks/results/fuzz.json` holds."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)  # noqa: S607
    return {
        "inputs": number,
        "seed": seed,
        "outcomes": {kind: dict(sorted(outcomes.items())) for kind, outcomes in counted.items()},
        "cpu_s": round(cpu_s, 1),
        "commit": git.stdout.strip(),
        "versions": {"kvsim": __version__, "python": platform.python_version(), **{n: version(n) for n in REPORTED}},
    }


def counted_in(text: str, number: int) -> str:
    """The text of the README with this number of inputs where it says how many were tried."""
    return re.sub(r"[\d,]+ mutated inputs", f"{number:,} mutated inputs", text)


def main() -> int:
    """Run the campaign; 1 when an input broke a rule."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=10_000, help="of inputs, of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each kind")
    parser.add_argument("--only", action="append", help="a kind; repeat it")
    parser.add_argument("--out", type=Path, help="write the counts there")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--keep", type=Path, help="make the first input in this folder, and leave it")
    asked = parser.parse_args()
    chosen = asked.only or kinds()
    if asked.keep is not None:
        asked.keep.mkdir(parents=True)
        sys.stdout.write(f"{one(chosen[0], asked.seed, asked.first, asked.keep)}\n")
        return 0
    counted: dict[str, Counter[str]] = {kind: Counter() for kind in chosen}
    pieces = [
        Piece(kind, asked.seed, asked.first + begin, min(PIECE, number - begin))
        for place, kind in enumerate(chosen)
        for number in [asked.number // len(chosen) + (place < asked.number % len(chosen))]
        for begin in range(0, number, PIECE)
    ]
    failures, cpu_s = 0, 0.0
    with ProcessPoolExecutor(asked.jobs, multiprocessing.get_context("spawn")) as pool:
        for piece, (outcomes, failed, piece_cpu_s) in zip(pieces, pool.map(tried, pieces), strict=True):
            counted[piece.kind] += outcomes
            failures, cpu_s = failures + len(failed), cpu_s + piece_cpu_s
            for failure in failed:
                sys.stdout.write(f"{failure.kind} {failure.seed} {failure.number}: {failure.message}\n")
            sys.stdout.write(f"{piece.kind} to {piece.first + piece.number}: {dict(outcomes)} in {piece_cpu_s:.0f} s\n")
            sys.stdout.flush()
    if asked.out is not None and not failures:
        document = report(asked.number, asked.seed, counted, cpu_s)
        asked.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        if asked.out.resolve() == RESULT:
            README.write_text(counted_in(README.read_text(encoding="utf-8"), asked.number), encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
