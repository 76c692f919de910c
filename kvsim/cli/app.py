"""The `kvsim` program: its commands and command groups. A new one is a line here and a file beside this one."""

from typing import Annotated

import typer

from kvsim.cli import batching, explain, generate, hardware, model, quality, simulate, trace, validate
from kvsim.version import __version__

app = typer.Typer(no_args_is_help=True, add_completion=False)
app.command("explain")(explain.explain)
app.command("simulate", help="Replay a trace of requests under one policy, on a simulated cluster.")(simulate.replay)
app.command("compare", help="Replay a trace under several policies, and set their results side by side.")(
    simulate.replay
)
app.command("generate")(generate.generate)
app.command("quality")(quality.quality)
app.command("validate")(validate.validate)
trace.app.command("batching")(batching.batching)
app.add_typer(trace.app, name="trace", help="Request traces: bundled, generated and converted ones.")
app.add_typer(hardware.app, name="hardware", help="The catalogue of GPUs and hosts.")
app.add_typer(model.app, name="model", help="The catalogue of model shapes.")


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
