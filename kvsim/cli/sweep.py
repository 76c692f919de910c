"""`kvsim sweep`: many points of a scenario, on the processors of this machine or of a Ray cluster."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvsim.cli.formats import Formats, formats_of
from kvsim.cli.options import AllowCode, ScenarioFile, given_options, with_options
from kvsim.cli.output import Columns, JsonFlag, print_json, print_line, print_table
from kvsim.cli.progress import progress_bar
from kvsim.cli.simulate import INTERRUPTED

if TYPE_CHECKING:
    from kvsim.results.row import Value
    from kvsim.run.executor import Executor
    from kvsim.scenario.scenario_file import Scenario

JOURNAL = "sweep.journal"
_MOST_SHOWN = 100


@with_options
def sweep(
    ctx: typer.Context,
    over: Annotated[
        list[str],
        typer.Option(
            metavar="KEY=VALUE,...",
            help="A dimension: values of an option, by its key in scenario files; or KEY=LOW..HIGH[:log], with --draw.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Keep each point here as it is found, and the tables.")],
    draw: Annotated[
        int | None, typer.Option(metavar="N", help="So many points at random. Default: every combination.", min=1)
    ] = None,
    draw_seed: Annotated[int, typer.Option(metavar="N", help="Of the random points.", min=0)] = 0,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="auto|ADDRESS", help="Use the workers of this Ray cluster, not processes of this machine."
        ),
    ] = None,
    scenario: ScenarioFile = None,
    allow_code: AllowCode = False,
    formats: Formats = None,
    json: JsonFlag = False,
    **_options: object,  # those of the scenario, which are read from the context
) -> None:
    """Simulate a trace at many points.

    Killed at any moment, the same command goes on with what is missing: points that --out has are not simulated again,
    also when dimensions grow. The tables are the same bytes as without an interruption.
    """
    from kvsim.cli.command_line import command_line
    from kvsim.report.formats import in_format
    from kvsim.report.sweep import sweep_contents
    from kvsim.results.folder import hold
    from kvsim.results.swept import NAMES, earlier, write_swept
    from kvsim.run.journal import Journal
    from kvsim.run.points import IMPOSSIBLE, KILLED, simulate_points
    from kvsim.scenario.design import dimensions, points

    reports = formats_of(formats, out)
    dims = dimensions(over)
    options = given_options(ctx)
    both = [key for key in dims if key in options]
    if both:
        raise ValueError(f"{both[0]} is given as an option and as a dimension; say it with --over alone")
    drawn = points(dims, draw, draw_seed)
    asked = [_asked({**options, **point}, scenario, allow_code=allow_code) for point in drawn]
    with hold(out, earlier, [*NAMES, *(f"report.{name}" for name in reports), JOURNAL]) as folder:
        try:
            with Journal(folder.path / JOURNAL) as journal, progress_bar("sweep", len(asked)) as show:
                found = simulate_points(asked, journal, show, _executor(ray))
        except KeyboardInterrupt:
            print_line(
                f"interrupted: {len(journal.found):,} points are kept; the same command goes on from them", err=True
            )
            raise typer.Exit(INTERRUPTED) from None
        if all(row["status"] == IMPOSSIBLE for row in found):
            raise ValueError(f"none of the {len(found):,} points can be simulated; the first: {found[0]['reason']}")
        rows: list[dict[str, Value]] = [
            {"point": i, **{key: _cell(value) for key, value in point.items()}, **row}
            for i, (point, row) in enumerate(zip(drawn, found, strict=True))
        ]
        document = {
            "schema_version": 1,
            "over": {key: _stated(values) for key, values in dims.items()},
            "draw": draw,
            "draw_seed": draw_seed if draw is not None else None,
            "options": {**options},
            "points": [{"options": point, **row} for point, row in zip(drawn, found, strict=True)],
        }
        # The same words wherever the files lie and whoever simulated, as in all files of a sweep.
        command = f"{command_line(ctx, {'formats', 'json', 'out', 'ray'})} --out DIR"
        contents = sweep_contents(document, rows, command)
        pages = {name: in_format(contents, name) for name in reports}
        folder.replace(lambda new: write_swept(document, rows, pages, new))
    if json:
        print_json(document)
    else:
        _print(rows, list(dims))
    lost = [row for row in rows if row["status"] == KILLED]
    if lost:
        raise OSError(
            f"{len(lost):,} of {len(rows):,} points have no figures, {lost[0]['reason']}; run it again for them"
        )


def _asked(options: Mapping[str, Any], file: Path | None, *, allow_code: bool) -> "Scenario":
    from kvsim.scenario.scenario_file import load_scenario

    asked = load_scenario(options, file, allow_code=allow_code)
    if len(asked.policy) > 1:
        names = " ".join(f"--over policy={name}" for name in asked.policy)
        raise ValueError(f"a point of a sweep has one policy, not {len(asked.policy)}; make them a dimension: {names}")
    if asked.seeds > 1:
        raise ValueError(f"seeds={asked.seeds} is no option of a sweep; make seeds a dimension: --over seed=0,1,2")
    if asked.setup["perfetto"] is not None:
        raise ValueError("perfetto is no option of a sweep, which keeps a row a point; simulate the point alone")
    return asked


def _executor(ray: str | None) -> "Executor | None":
    """Whoever simulates; None for the processes of this machine."""
    from kvsim.run.ray_cluster import RayCluster

    return None if ray is None else RayCluster(ray)


def _cell(value: Any) -> "Value":
    """A value of a dimension in a table."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        value = ",".join(f"{key}={of}" for key, of in value.items())
    return value if isinstance(value, int | float | str) else str(value)


def _stated(values: Any) -> Any:
    return values._asdict() if hasattr(values, "_asdict") else list(values)


def _print(rows: "Sequence[Mapping[str, Value]]", dims: Sequence[str]) -> None:
    from kvsim.report.sweep import FIGURES
    from kvsim.text.units import format_s

    names = {key: figure.name for key, figure in FIGURES.items()} | {"bottleneck": "bottleneck"}
    figures = {key: name for key, name in names.items() if key != "goodput_rps" or any(key in row for row in rows)}
    columns: Columns = {**dict.fromkeys(dims, "left"), **dict.fromkeys(figures.values(), "right"), "status": "left"}

    def cell(key: str, value: "Value") -> str:
        if value is None or isinstance(value, str):
            return value or "-"
        return format_s(float(value)) if "_s." in key else f"{value:,.4g}"

    print_table(
        columns,
        (
            [*(str(row[key]) for key in dims), *(cell(key, row.get(key)) for key in figures), _status(row)]
            for row in rows[:_MOST_SHOWN]
        ),
    )
    if len(rows) > _MOST_SHOWN:
        print_line(f"... and {len(rows) - _MOST_SHOWN:,} more points in sweep.parquet")


def _status(row: "Mapping[str, Value]") -> str:
    return str(row["status"]) if row["reason"] is None else f"{row['status']}: {row['reason']}"
