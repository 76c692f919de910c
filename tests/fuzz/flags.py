"""Every flag of every command, as the command line itself knows them, with values of and beyond their kind."""

import importlib
import random
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import typer
from fuzz import mutate
from fuzz.base import write_trace
from fuzz.door import attempt_command

from kvsim.cli.app import app

WRITING = {
    "--out": "out",
    "--save": "saved",
    "--page": "page.html",
    "--counts-out": "counts.npz",
}  # mutated only below the attempt's folder
RUNS_A_MODEL = (
    "generate",
    "validate",
    "quality",
    "bench",
)  # tried on a folder without a model: loading one takes seconds
VALUES = (
    *(
        "0",
        "1",
        "2",
        "3",
        "8",
        "-1",
        "10",
        "1k",
        "4Ki",
        "1e9",
        "1000000000",
        "10^30",
        "1e30",
        "1" + "0" * 30,
        "9" * 400,
    ),
    *(
        "nan",
        "inf",
        "-inf",
        "1e400",
        "0.5",
        "1.5",
        "-0.1",
        "1e-300",
        "1e300",
        "0.9",
        "1GiB",
        "1XB",
        "1PB",
        "10s",
        "0s-1s",
    ),
    *(
        "1ms",
        "h100-sxm",
        "llama-3.1-8b",
        "full",
        "quest",
        "shadowkv",
        "miss=0.5",
        "ttft=1s",
        "chat:weight=2",
        "lru",
        "op",
    ),
    *(
        "fair",
        "closed",
        "keep",
        "swap",
        "max",
        "fp8",
        "medusa",
        "lookup",
        "ddr5-dual-xeon",
        "trace.csv",
        "/dev/zero",
        ".",
    ),
    *("1,2,3", ",", "0.7,0.5", "all", "through", "cheaper", "kv-aware", "1-2", "a=1,a=1", "azure-2023-code"),
    *(
        "name=a,rate=1",
        "name=a,rate=2,turns=3,prefix=64",
        "name=a,rate=1e300",
        "name=a,rate=1,prompt=fixed:99999999999",
    ),
)


class Command(NamedTuple):
    """A command's words, what it needs to run at all, and its options: flag -> whether it takes a value."""

    words: tuple[str, ...]
    needed: tuple[str, ...]
    options: dict[str, bool]


NEEDED = {
    "simulate": ("--trace", "trace.csv", "--model", "llama-3.1-8b", "--gpu", "h100-sxm", "--limit", "3"),
    "compare": (
        "--trace",
        "trace.csv",
        "--model",
        "llama-3.1-8b",
        "--gpu",
        "h100-sxm",
        "--limit",
        "3",
        "--policy",
        "full",
    ),
    "explain": ("--policy", "full", "--context", "4k"),
    "trace info": ("trace.csv",),
    "trace batching": ("trace.csv",),
    "trace convert": ("trace.csv", "out.jsonl"),
    "trace synth": ("--tenant", "name=a,rate=1", "--requests", "5", "--out", "out.csv"),
    "hardware show": ("h100-sxm",),
    "model show": ("llama-3.1-8b",),
    "generate": ("--prompt-file", "trace.csv", "--model", "."),
    "validate": ("--bytes", "--model", "."),
    "quality": ("--text", "trace.csv", "--model", "."),
    "bench decode": ("--model", "."),
}


@cache
def commands() -> tuple[Command, ...]:
    """All commands, found where the program itself finds them."""
    return tuple(_found(typer.main.get_command(app), ()))


def _found(command: Any, words: tuple[str, ...]) -> list[Command]:
    command = getattr(command, "loaded", command)
    if inner := getattr(command, "commands", None):
        return [found for name, one in inner.items() for found in _found(one, (*words, name))]
    flags = {max(p.opts, key=len): not p.is_flag for p in command.params if p.param_type_name == "option"}
    return [Command(words, NEEDED.get(" ".join(words), ()), flags)]


def attempt(rng: random.Random, folder: Path) -> str:
    """Run one command with some of its flags, most of them valid in form alone."""
    write_trace(folder)
    command = rng.choice(commands())
    if command.words[0] in RUNS_A_MODEL or command.words[-1] == "needle":
        for name in (
            "runtime.offload",
            "runtime.needle",
            "runtime.generation",
            "runtime.loading",
            "runtime.trial",
            "runtime.bench.decode",
        ):
            importlib.import_module(name)  # torch and Transformers take seconds to import, which are no hang
    args = [*command.words, *command.needed]
    for flag in rng.sample(sorted(command.options), min(len(command.options), rng.choice((0, 1, 1, 1, 2, 2, 3)))):
        if flag in WRITING:
            args += [flag, WRITING[flag]]
        elif flag == "--help" or not command.options[flag]:
            args.append(flag)
        elif not (flag == "--model" and command.words[0] in RUNS_A_MODEL):
            args += [flag, _value(rng)]
    if rng.random() < 0.1:
        at = rng.randrange(len(command.words), len(args) + 1)
        if args[at - 1] not in WRITING and " ".join(command.words) not in ("trace convert", "model needle"):
            args.insert(at, _value(rng))
    if command.words[-1] == "needle":
        args.append("trace.csv")  # a file, where a folder is needed: unpacking takes seconds
    return attempt_command(args, folder)


def _value(rng: random.Random) -> str:
    if rng.random() < 0.7:
        return rng.choice(VALUES)
    return str(mutate.value(rng)) if rng.random() < 0.5 else mutate.text_like(rng, rng.choice(VALUES))
