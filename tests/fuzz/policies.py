"""Mutated policy texts: every policy with its parameters, and compositions by layers, context and heads."""

import random
from dataclasses import fields
from pathlib import Path

from fuzz import mutate
from fuzz.base import simulation
from fuzz.door import attempt_command

from policies import POLICIES

VALUES = (
    *(
        "0",
        "1",
        "2",
        "16",
        "17",
        "64",
        "1k",
        "1Ki",
        "3M",
        "-1",
        "0.5",
        "1.0",
        "none",
        "true",
        "nan",
        "inf",
        "hbm",
        "ddr",
    ),
    *("1e9", "99999999999999999999", "999999999999999999", "0x10", "", "x" * 5000, "\x1b[31m", "=", "ivf", "all"),
)
SELECTORS = (
    *("layers=0-1", "layers=0", "layers=31-2", "layers=0-999", "layers=-1", "layers=", "below=8k", "below=0"),
    *("below=-1", "below=1e9", "heads=2", "heads=6", "heads=0", "heads=8", "heads=99999999", "x=1", ""),
)


def attempt(rng: random.Random, folder: Path) -> str:
    """Explain, plan or simulate one mutated policy."""
    text = _composition(rng)
    if rng.random() < 0.4:
        text = mutate.text_like(rng, text)
    what, context = rng.random(), rng.choice(("1", "17", "4k", "100k"))
    if what < 0.4:
        return attempt_command(
            ["explain", "--policy", text, "--context", context, *rng.choice(([], ["--json"]))], folder
        )
    if what < 0.6:
        return attempt_command(["explain", "--plan", text, "--context", context], folder)
    return attempt_command([*simulation(rng, folder), "--policy", text], folder)


def _composition(rng: random.Random) -> str:
    parts = [_one(rng) for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 40)))]
    if len(parts) == 1 and rng.random() < 0.8:
        return parts[0]
    selected = [f"{part}@{rng.choice(SELECTORS)}" for part in parts]
    return "+".join(selected if rng.random() < 0.3 else [*selected[:-1], parts[-1]])


def _one(rng: random.Random) -> str:
    name = rng.choice(list(POLICIES))
    parameters = [field.name for field in fields(POLICIES[name])]
    given = [
        f"{rng.choice(parameters)}={rng.choice(VALUES)}" for _ in range(rng.choice((0, 0, 1, 2)) if parameters else 0)
    ]
    return f"{name}:{','.join(given)}" if given else name
