"""What `kvsim plan` prints of all configurations: ranked tables, and their front of cost and latency drawn in text."""

from collections.abc import Mapping, Sequence
from string import ascii_lowercase
from typing import Any

import typer

from kvsim.cli.output import Columns, print_line, print_table
from kvsim.text.units import format_s

MISSING = "-"
_MOST_RANKED = 5
_WIDTH, _HEIGHT = 64, 16
_TOP = 2.0  # of the limit: what is further is drawn at the upper edge

Row = Mapping[str, Any]


def print_ranked(rows: Sequence[Row]) -> None:
    """The best configurations of replicas that do both, and of those with pools."""
    for apart, words in ((False, "together"), (True, "on replicas of their own")):
        own = [row for row in rows if bool(row["prefill_gpus"]) is apart]
        if not own:
            continue
        few = f", {_MOST_RANKED} of {len(own)}" if len(own) > _MOST_RANKED else ""
        typer.echo()
        print_line(f"Prompts and decoding {words}, ranked{few}:")
        names = list(own[0]["slo"])
        sought = any(row["sustained"] is not None for row in rows)
        figures = [
            "rank",
            "GPUs",
            "split",
            "$/hour",
            "$/M tokens",
            "tokens/s/GPU",
            *names,
            *(["holds up to"] if sought else []),
        ]
        columns: Columns = {"plan": "left", "GPU": "left", **dict.fromkeys(figures, "right"), "SLO": "left"}
        print_table(columns, (_cells(i, row, names, sought=sought) for i, row in enumerate(own[:_MOST_RANKED], 1)))


def _cells(rank: int, row: Row, names: Sequence[str], *, sought: bool) -> list[str]:
    split = f"tp {row['tp']}" + (f" x pp {row['pp']}" if row["pp"] > 1 else "")
    split += f", {row['prefill_gpus']} prefill" if row["prefill_gpus"] else ""
    most = MISSING if row["sustained"] is None else f"{row['sustained']:.2f}x"
    return [
        " ".join([row["policy"], *row["options"]]),
        row["gpu"],
        f"{rank}",
        f"{row['gpus']}",
        split,
        f"{row['usd_per_hour']:,.2f}",
        f"{row['cost_per_million_tokens']:,.2f}",
        f"{row['output_tokens_per_s_per_gpu']:,.1f}",
        *(MISSING if row["slo"][name] is None else format_s(row["slo"][name]) for name in names),
        *([most] if sought else []),
        "holds" if row["holds"] else "breaks",
    ]


def print_front(rows: Sequence[Row]) -> None:
    """Cost against distance from the SLO, a letter for each GPU, policy and cache; capitals are on the front."""
    drawn = [row for row in rows if row["of_limit"] is not None]
    labels = list(dict.fromkeys(_label(row) for row in drawn))
    if len(drawn) < 2 or len(labels) > len(ascii_lowercase):
        return
    typer.echo()
    print_line("Cost and latency of every configuration (capitals: on the front, which nothing beats in both):")
    for line in front_lines(drawn, labels):
        print_line(line)
    for letter, label in zip(ascii_lowercase, labels, strict=False):
        print_line(f"  {letter}  {label}")


def front_lines(rows: Sequence[Row], labels: Sequence[str]) -> list[str]:
    """The drawing: rows from the dearest limit share at the top down to 0, columns from the cheapest to the dearest."""
    costs = [row["usd_per_hour"] for row in rows]
    low, high = min(costs), max(costs)
    grid = [[" "] * _WIDTH for _ in range(_HEIGHT + 1)]
    limit = _line_of(1.0)
    grid[limit] = ["-"] * _WIDTH
    for row in sorted(rows, key=lambda one: one["front"]):  # what is on the front is written last
        column = round((row["usd_per_hour"] - low) / ((high - low) or 1) * (_WIDTH - 1))
        letter = ascii_lowercase[labels.index(_label(row))]
        grid[_line_of(row["of_limit"])][column] = letter.upper() if row["front"] else letter
    marks = {0: f">{_TOP:.0%}", limit: "SLO", _HEIGHT: "0%"}
    lines = [f"  {marks.get(i, ''):>5} |{''.join(cells).rstrip()}" for i, cells in enumerate(grid)]
    ends = f"{low:,.2f}{high:>{_WIDTH - len(f'{low:,.2f}')},.2f}"
    return [*lines, f"        +{'-' * _WIDTH}", f"         {ends}  $/hour", "  of the nearest limit"]


def _line_of(of_limit: float) -> int:
    return round((1 - min(of_limit, _TOP) / _TOP) * _HEIGHT)


def _label(row: Row) -> str:
    return f"{' '.join([row['policy'], *row['options']])} on {row['gpu']}"
