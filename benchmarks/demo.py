"""The README's first comparison: run as a newcomer would, from empty caches, timed, and its table written from it.

python benchmarks/demo.py                 # run `make demo`'s command; results/demo.json
python benchmarks/demo.py --readme        # only write the README's table from results/demo.json
"""

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT, README = ROOT / "benchmarks" / "results" / "demo.json", ROOT / "README.md"
HEAD = (
    "| policy | tokens/s | TTFT p50 | TTFT p99 | TPOT p50 | TPOT p99 | HBM peak | DDR peak | over PCIe | bottleneck |\n"
)
LINE = "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|\n"
TABLE = re.compile(re.escape(HEAD) + r"(\|.*\n)+")
TIERS = (".hbm", ".ddr")
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def command() -> list[str]:
    """What the Makefile's `demo` runs, without the environment's folder."""
    recipe = (ROOT / "Makefile").read_text().partition("\ndemo:")[2].partition("\n\n")[0].partition("\n")[2]
    return shlex.split(recipe.replace("\\\n", " "))[1:]


def run(folder: Path) -> dict[str, Any]:
    """The summary of the comparison, and what it took in seconds."""
    own = command()
    own[own.index("--out") + 1] = str(folder / "out")
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder / "code"), "PYTHONPATH": str(ROOT)}
    began_s = time.perf_counter()
    subprocess.run([sys.executable, "-m", "kvsim", *own], env=environment, check=True)
    wall_s = time.perf_counter() - began_s
    git = ["git", "rev-parse", "--short", "HEAD"]
    measured = {
        "command": shlex.join(["kvsim", *command()]),
        "commit": subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "wall_s": round(wall_s, 1),
    }
    return {"measured": measured, **json.loads((folder / "out" / "summary.json").read_text())}


def table(result: dict[str, Any]) -> str:
    """The README's table: a row for each policy."""
    lines = []
    for one in result["runs"]:
        times = [_time(one[name][of]) for name in ("ttft_s", "tpot_s") for of in ("p50", "p99")]
        moved = sum(one["links"][link]["bytes"] for link in ("ddr->hbm", "hbm->ddr"))
        sizes = [sum(own["peak_bytes"] for name, own in one["memory"].items() if name.endswith(tier)) for tier in TIERS]
        cells = [one["inputs"]["policy"], f"{one['output_tokens_per_s']:,.0f}", *times, *map(_size, [*sizes, moved])]
        lines.append("| " + " | ".join([*cells, one["bottleneck"]]) + " |\n")
    return HEAD + LINE + "".join(lines)


def _time(seconds: float) -> str:
    for limit, unit, size in ((1.0, "ms", 1e-3), (100.0, "s", 1.0), (5_400.0, "min", 60.0)):
        if seconds < limit:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds / 3_600)} h"


def _size(nbytes: float) -> str:
    power = 0
    while nbytes >= 1024 and power < len(UNITS) - 1:
        nbytes, power = nbytes / 1024, power + 1
    return f"{_digits(nbytes)} {UNITS[power]}" if nbytes else "0"


def _digits(number: float) -> str:
    """Two digits, or all before the point."""
    return f"{number:.0f}" if number >= 10 else f"{number:.1f}"


def main() -> None:
    """Measure, or write the table of what has been measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true", help="only write the README's table")
    if not parser.parse_args().readme:
        with TemporaryDirectory() as name:
            RESULT.write_text(json.dumps(run(Path(name)), indent=1) + "\n")
    text = README.read_text(encoding="utf-8")
    README.write_text(TABLE.sub(lambda _: table(json.loads(RESULT.read_text())), text, count=1), encoding="utf-8")


if __name__ == "__main__":
    main()
