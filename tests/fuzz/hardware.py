"""Mutated YAML files of GPUs and hosts, with drawn PCIe switches: shown, explained, simulated."""

import random
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from fuzz.base import write_trace
from fuzz.door import attempt_command
from fuzz.scenarios import written

SWITCHES = {
    "switches": {
        "a": {"under": "root", "Bps": 25e9, "gpus": [0, 1]},
        "b": {"under": "root", "Bps": 25e9, "gpus": [2, 3]},
    }
}


@cache
def catalogue(kind: str) -> tuple[dict[str, Any], ...]:
    """The documents of the catalogue's `gpus` or `hosts`."""
    folder = files("kvsim") / "catalogue" / kind
    return tuple(yaml.safe_load(entry.read_text(encoding="utf-8")) for entry in sorted(folder.iterdir(), key=str))


def attempt(rng: random.Random, folder: Path) -> str:
    """Write one mutated file and use it."""
    kind = rng.choice(("gpu", "host"))
    original = rng.choice(catalogue(f"{kind}s"))
    if kind == "host" and rng.random() < 0.3:
        figures = {name: value for name, value in original.items() if name not in ("gpus_per_switch", "switch_Bps")}
        original = {**figures, "gpus_max": 4, **SWITCHES}
    name = rng.choice(("it.yaml", "\x1b[31m.yaml", "x.yml"))
    (folder / name).write_bytes(written(rng, original))
    what = rng.random()
    if what < 0.5:
        host = ["--host"] if kind == "host" else []
        at = rng.choice(("", "", "@measured", "@datasheet")) if kind == "gpu" else ""
        return attempt_command(["hardware", "show", name + at, *host, *rng.choice(([], ["--json"]))], folder)
    if what < 0.75:
        return attempt_command(["explain", f"--{kind}", name, "--policy", "offload-all", "--context", "4k"], folder)
    given = {"--gpu": "h100-sxm", "--host": "ddr5-dual-xeon", f"--{kind}": name}
    args = ["simulate", "--trace", write_trace(folder), "--model", "llama-3.1-8b", "--policy", "shadowkv"]
    return attempt_command([*args, *(text for pair in given.items() for text in pair)], folder)
