"""Mutated `config.json` files of every model of the catalogue: shown, explained, simulated."""

import json
import random
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from fuzz import mutate
from fuzz.base import write_trace
from fuzz.door import attempt_command


@cache
def configs() -> tuple[str, ...]:
    """The text of each config of the catalogue."""
    folder = files("kvsim") / "catalogue" / "models"
    return tuple(entry.read_text(encoding="utf-8") for entry in sorted(folder.iterdir(), key=str))


def attempt(rng: random.Random, folder: Path) -> str:
    """Write one mutated config and use it."""
    original: dict[str, Any] = json.loads(rng.choice(configs()))
    kind = rng.random()
    text = json.dumps(mutate.document(rng, original) if kind < 0.7 else original)
    if 0.6 < kind < 0.9:
        text = mutate.spliced(rng, text)
    content = text.encode(errors="surrogatepass")
    path = folder / rng.choice(("config.json", "my model.json", "\x1b[31m.json"))
    path.write_bytes(content if kind < 0.9 else mutate.damaged(rng, content))
    what = rng.random()
    if what < 0.6:
        return attempt_command(["model", "show", path.name, *rng.choice(([], ["--json"]))], folder)
    if what < 0.85:
        return attempt_command(["explain", "--model", path.name, "--policy", "full", "--context", "4k"], folder)
    args = ["simulate", "--trace", write_trace(folder), "--model", path.name, "--gpu", "h100-sxm", "--gpus", "8"]
    return attempt_command([*args, "--tp", "8", *rng.choice(([], ["--out", "out"]))], folder)
