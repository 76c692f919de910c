"""The `kvsim` program: its commands and command groups. A new one is a line here and a file beside this one."""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kvsim.cli.deferred import Deferred
from kvsim.version import __version__

COMMANDS = {  # where each stands, and what it does
    "explain": (
        "kvsim.cli.explain:explain",
        (
            "Compare what a long context costs under each policy: memory, prefill, decode, and switching between "
            "sequences."
        ),
    ),
    "init": (
        "kvsim.cli.init:init",
        "Write a scenario file with every option explained, to start from, and its JSON Schema for editors.",
    ),
    "simulate": (
        "kvsim.cli.simulate:replay",
        "Replay a trace of requests under one policy, on a simulated cluster.",
    ),
    "compare": (
        "kvsim.cli.simulate:replay",
        "Replay a trace under several policies, and set their results side by side.",
    ),
    "sweep": (
        "kvsim.cli.sweep:sweep",
        "Replay a trace at many points: every combination of options, or random ones; goes on where it was killed.",
    ),
    "plan": (
        "kvsim.cli.plan:plan",
        "Find the fewest GPUs, of which kind and under which policy, that serve a trace within an SLO.",
    ),
    "observe": (
        "kvsim.cli.observe:observe",
        "Send a trace's requests to a running server whose URL you name, and record the latencies that clients see.",
    ),
    "generate": (
        "kvsim.cli.generate:generate",
        "Continue a text greedily under a policy; then print its latency, its memory, and the bytes that it moved.",
    ),
    "quality": (
        "kvsim.cli.quality:quality",
        (
            "Feed a text to a model with full attention and under policies, and compare what it predicts: the quality "
            "lost."
        ),
    ),
    "validate": (
        "kvsim.cli.validate:validate",
        "Run policies on a model and compare every byte with the simulator's: the exit code is 3 when they disagree.",
    ),
    "bench": (
        "kvsim.cli.bench:app",
        "Time the runtime on the machine at hand, beside what the simulator says of it.",
    ),
    "trace": ("kvsim.cli.trace:app", "Request traces: bundled, generated and converted ones."),
    "hardware": ("kvsim.cli.hardware:app", "The catalogue of GPUs and hosts."),
    "model": ("kvsim.cli.model:app", "The catalogue of model shapes."),
}


class Program(TyperGroup):
    """The group of all commands."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name, (source, does) in COMMANDS.items():
            self.add_command(Deferred(name, source, does))


app = typer.Typer(cls=Program, no_args_is_help=True, add_completion=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvsim {__version__}")
        raise typer.Exit


@app.callback()
def kvsim(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Predict what serving long contexts costs: KV caches, the memories that hold them, the policies that move them."""
