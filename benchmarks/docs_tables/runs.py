"""Simulations as a scenario file would ask for them, and what a result was made with."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from kvsim import load_scenario, simulate, summarize

ROOT = Path(__file__).parents[2]


def summary(options: dict[str, Any], limit: int | None = None, file: Path | None = None) -> dict[str, Any]:
    """The summary of one simulation; `limit` overrides that of the options where it is smaller."""
    limits = [n for n in (options.get("limit"), limit) if n is not None]
    scenario = load_scenario({**options, **({"limit": min(limits)} if limits else {})}, file)
    (setup,) = scenario.setups()
    return summarize(simulate(scenario.load_trace(), setup), scenario.slo_s)


def asked(*arguments: str) -> Any:
    """What a kvsim command answers with --json."""
    command = [sys.executable, "-m", "kvsim", *arguments, "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout)


@cache
def commit() -> str:
    """The commit of this checkout, with a word on changes that it lacks."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(git, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def written_by(name: str, result: dict[str, Any]) -> str:
    """The first sentence of a page: which command writes it, from what."""
    return (
        f"Written by `python -m benchmarks.docs_tables {name}` from `benchmarks/results/{name}.json` "
        f"(commit {result['commit']})."
    )
