"""`kvsim hardware calibrate`: measure the machine at hand, and write a GPU's file of what was found."""

import contextlib
import datetime as dt
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvsim.cli.destination import check_takes_a_file
from kvsim.cli.extras import require_runtime
from kvsim.cli.output import Columns, JsonFlag, print_json, print_line, print_table
from policies.shown import shown

if TYPE_CHECKING:
    from kvsim.hardware.calibration.calibrate import Calibration
    from kvsim.hardware.calibration.samples import Sample

_PASSES = 2


def calibrate(
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="FILE", help="The GPU's YAML file to write; its measurements go beside it, as .json."
        ),
    ] = Path("calibrated.yaml"),
    gpu: Annotated[
        str,
        typer.Option(
            "--gpu",
            metavar="NAME|FILE",
            help="The GPU of the catalogue, or a YAML file, whose datasheet this one has; by default what its driver "
            "calls it.",
        ),
    ] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="One pass over every third shape, and 2 GiB of pinned memory, not 8.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Measure this machine's kernels, copies and processors, and write a GPU's file with them as its `measured` set.

    GEMMs, attention, elementwise kernels, launches, copies and gathers over PCIe, and the host's memory and cores, in
    two passes of about a minute each. Nothing else should run meanwhile. All-reduce and experts are not measured: the
    file takes their constants from the GPU's serving set, and says so.
    """
    if out.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--out {shown(str(out))} must end in .yaml, by which a GPU's file is known")
    record = out.with_suffix(".json")
    for path in (out, record):
        check_takes_a_file("--out", path)
    require_runtime()
    from kvsim.hardware.calibration.calibrate import calibration, catalogued
    from kvsim.hardware.catalogue import load_gpu
    from runtime.calibration.device import device

    found = device()
    base = gpu or catalogued(found.name)
    load_gpu(f"{base}@serving")  # what is wrong with it should be told before minutes of work
    today = dt.datetime.now(tz=dt.UTC).date()
    origin = f"Measured {today}, {found.name}, driver {found.driver}, torch {found.torch}"
    try:
        passes = _passes(1 if quick else _PASSES, quick=quick)
        result = calibration(base, passes, origin)
        write_together({out: result.yaml, record: result.record})
    except KeyboardInterrupt:
        raise ValueError("calibration was interrupted; nothing was written") from None
    if json:
        steady = [{"kernel": name, "spread": spread, "drift": drift} for name, spread, drift in result.steadiness]
        errors = [asdict(one) for one in result.residuals]
        print_json(
            {"file": str(out), "record": str(record), "origin": origin, "residuals": errors, "steadiness": steady}
        )
        return
    if found.gpus > 1:
        print_line("note: all-reduce between GPUs is not measured; the file has the constants of the serving set")
    print_calibration(result)
    print_line(f"wrote {out} and {record}; use it as --gpu {out}@measured")


def _passes(count: int, *, quick: bool) -> list[list["Sample"]]:
    from kvsim.hardware.calibration.samples import Sample
    from runtime.calibration.measure import measured, sections, warm

    warm()
    passes = []
    for number in range(count):
        samples: list[Sample] = []
        for section in sections(quick=quick):
            typer.echo(f"pass {number + 1} of {count}: {section[0]}", err=True)
            samples += [
                Sample(
                    kernel=one.kernel,
                    dtype=one.dtype,
                    arguments=tuple(one.arguments.items()),
                    seconds=one.seconds,
                    spread=one.spread,
                )
                for one in measured(section)
            ]
        passes.append(samples)
    return passes


def print_calibration(result: "Calibration") -> None:
    """Errors of the fitted prices, and how steady the times were."""
    columns: Columns = {"kernel": "left", "shapes": "left", "times": "right", "MAPE": "right", "bias": "right"}
    print_table(
        columns,
        (
            (
                f"{one.kernel} {one.dtype}".strip(),
                "fitted" if one.seen else "not fitted",
                str(one.shapes),
                f"{one.mape:.1%}",
                f"{one.bias:+.1%}",
            )
            for one in result.residuals
        ),
    )
    steady: Columns = {"measured": "left", "spread": "right", "between passes": "right"}
    print_table(steady, ((name, f"{spread:.1%}", f"{drift:.1%}") for name, spread, drift in result.steadiness))
    measured = [one for one in result.samples if one.kernel.startswith("host_")]
    print_table({"host": "left", "rate": "right"}, ((_host_name(one), _host_rate(one)) for one in measured))


def _host_name(one: "Sample") -> str:
    asked = dict(one.arguments)
    return f"{one.kernel} of {asked['row_bytes']} B rows" if "row_bytes" in asked else one.kernel


def _host_rate(one: "Sample") -> str:
    from kvsim.text.units import format_rate

    asked = dict(one.arguments)
    if "flops" in asked:
        return format_rate(asked["flops"] / one.seconds, "FLOP/s")
    nbytes = asked.get("nbytes") or asked["rows"] * asked["row_bytes"]
    return format_rate(nbytes / one.seconds, "B/s")


def write_together(texts: dict[Path, str]) -> None:
    """Write each file aside and then rename all of them: none is ever half-written. OSError where one cannot be."""
    written: list[tuple[Path, Path]] = []
    try:
        for path, text in texts.items():
            with tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
            ) as aside:
                written.append((Path(aside.name), path))
                aside.write(text)
            Path(aside.name).chmod(0o644)
        for aside_path, path in reversed(written):
            aside_path.replace(path)
    finally:
        _remove([aside_path for aside_path, _ in written])


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # renamed
            path.unlink()
