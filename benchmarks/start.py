"""How soon a first simulation ends: CPU seconds from empty caches, interpreted, while code is compiled, and after.

Every figure is of whole processes, children included. `docs/measured/start.md` is written from the result.

    python benchmarks/start.py [--out benchmarks/results/start.json] [--page docs/measured/start.md]
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from kvsim.engine.features import FEATURES
from kvsim.engine.player import COMPILE_S, LOAD_S, REQUEST_S

ROOT = Path(__file__).parents[1]
RUN = ("--trace", "azure-2023-code", "--model", "llama-3.1-8b", "--gpu", "h100-sxm", "--gpus", "1", "--policy", "full")
REPEATS = 5
NOTHING = "one request, nothing compiled or loaded"
INTERPRETED = "the first 2,000 requests, interpreted"
EVERYTHING = """
import sys
from kvsim.engine.features import FEATURES
from kvsim.engine.state import initial
initial._features = lambda *_: FEATURES
from kvsim.__main__ import main
main(sys.argv[1:])
"""
PAGE = """# How soon a first simulation ends

Written by `benchmarks/start.py` from `benchmarks/results/start.json`: {machine}, commit {commit}, load average
{load_average:g} before. CPU seconds of whole processes with all that they start, the middle of {repeats} runs where
nothing is compiled.

| what | CPU s | wall s |
|---|---:|---:|
{rows}

A simulation that would take the interpreter more than {load:g} CPU seconds takes machine code that an earlier run
has kept: what it takes to load that is the second row beside the first. One that would take more than {compile:g}
has code compiled beside it, by a process that ends with the program, and changes over between two events when that
is done: what would be over before the compiler is gains nothing from it. The estimate is the time so far for each
request that has left, and {request:g} ms for each request before any has; of the first 2,000, one takes the
interpreter {interpreted:.2g} ms. The process that compiles is the only one that loads numba. Features that a
simulation lacks ({features}) are compiled as functions that do nothing, so a plain run waits for the core alone.

Code is kept in `NUMBA_CACHE_DIR` where that is set, else under `XDG_CACHE_HOME` (`~/.cache`), in a folder that is named
by a digest of the sources and of the processor. `KVSIM_COMPILE=first` compiles before the first event, `never` leaves
all to the interpreter: the results are the same to the bit (`tests/kvsim/test_player.py`).
"""


def timed(*options: str, cache: str, compiles: str = "beside", program: str = "", repeats: int = 1) -> dict[str, float]:
    """CPU and wall seconds of a simulation, the compiler included: of the run with the middle CPU seconds."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": cache, "KVSIM_COMPILE": compiles, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *(("-c", program) if program else ("-m", "kvsim")), "simulate", *RUN, *options, "--json"]
    found = []
    for _ in range(repeats):
        before, began_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        found.append({"cpu_s": round(cpu_s, 2), "wall_s": round(time.perf_counter() - began_s, 2)})
    return sorted(found, key=lambda row: row["cpu_s"])[repeats // 2]


def measure() -> dict[str, dict[str, float]]:
    """Every row of the table by its words."""
    rows = {}
    with TemporaryDirectory() as empty, TemporaryDirectory() as core, TemporaryDirectory() as everything:
        rows[NOTHING] = timed("--limit", "1", cache=empty, repeats=REPEATS)
        compiled = timed("--limit", "1", cache=core, compiles="first")
        rows["one request, the core loaded first"] = timed(
            "--limit", "1", cache=core, compiles="first", repeats=REPEATS
        )
        rows["the first 200 requests, from empty caches"] = timed("--limit", "200", cache=empty, repeats=REPEATS)
        rows[INTERPRETED] = timed("--limit", "2000", cache=empty, compiles="never", repeats=REPEATS)
        rows["the first 2,000 requests, with code from an earlier run"] = timed(
            "--limit", "2000", cache=core, repeats=REPEATS
        )
        rows["one request, the core compiled first"] = compiled
        rows["one request, every feature compiled first"] = timed(
            "--limit", "1", cache=everything, compiles="first", program=EVERYTHING
        )
    return rows


def git(*arguments: str) -> str:
    """What git answers about this checkout."""
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def page(result: dict[str, object]) -> str:
    """The result for people."""
    rows = result["rows"]
    lines = [f"| {words} | {row['cpu_s']:g} | {row['wall_s']:g} |" for words, row in rows.items()]  # type: ignore[attr-defined]
    nothing_s, interpreted_s = (rows[words]["cpu_s"] for words in (NOTHING, INTERPRETED))  # type: ignore[index]
    return PAGE.format(
        **result | {"rows": "\n".join(lines)},
        load=LOAD_S,
        compile=COMPILE_S,
        request=1000 * REQUEST_S,
        interpreted=1000 * (interpreted_s - nothing_s) / 2000,
        repeats=REPEATS,
        features=", ".join(FEATURES),
    )


def main() -> None:
    """Measure, or write the page of what has been measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "start.json")
    parser.add_argument("--page", type=Path, help="only write this page, from what --out holds")
    given = parser.parse_args()
    if given.page:
        given.page.write_text(page(json.loads(given.out.read_text())))
        return
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    result: dict[str, object] = {
        "machine": machine,
        "commit": git("rev-parse", "--short", "HEAD"),
        "load_average": round(os.getloadavg()[0], 1),
    }
    result["rows"] = measure()
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
