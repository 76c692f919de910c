"""What `kvsim plan` prints: the answer in a sentence, the plans beside each other, and what to run."""

from collections.abc import Mapping
from typing import Any

import typer

from kvsim.cli.output import Columns, print_line, print_table
from kvsim.cli.plan_ranked import print_front, print_ranked
from kvsim.text.printable import brief
from kvsim.text.units import format_s

MISSING = "-"
_SOURCE_WIDTH = 120


def print_first(estimate: Mapping[str, Any]) -> None:
    """The estimate by closed forms, on standard error: simulations follow."""
    after = f"first estimate after {estimate['wall_s']:.1f} s, by closed forms:"
    fleet = f"{estimate['gpus']} x {estimate['gpu']} ({_split(estimate)}), ${estimate['usd_per_hour']:,.2f} an hour"
    print_line(f"{after} {fleet if estimate['holds'] else 'no fleet holds it'}; simulating", err=True)


def print_plan(document: Mapping[str, Any]) -> None:
    """The whole plan for people."""
    print_line(document["sentence"])
    answer = document["answer"]
    if answer is not None:
        _print_reasons(answer)
    typer.echo()
    _print_table(document)
    print_ranked(document["configurations"])
    print_front(document["configurations"])
    misfits = [row for row in document["plans"] if row["gpus"] is None]
    if misfits:
        typer.echo()
        for row in misfits:
            print_line(f"not possible: {_name(row)} on {row['gpu']} with {_split(row)}: {row['reason']}")
    if answer is not None:
        _print_load(answer["load"])
        _print_changes(document)
        _print_commands(answer)
    elif document["nearest"] is not None:
        _print_load(document["nearest"]["load"])
    _print_sources(document)
    cpu = format_s(document["simulations_cpu_s"])
    print_line(f"{document['simulations']} simulations of {cpu} of CPU together, in {format_s(document['wall_s'])}")


def _print_sources(document: Mapping[str, Any]) -> None:
    """Those of the answer's GPU or the nearest's, and of what all share, each in a line; --json has all of them."""
    chosen = document["answer"] or document["nearest"]
    others = {row["gpu"] for row in document["plans"]} - {chosen["gpu"] if chosen else None}
    typer.echo()
    print_line("Where the figures come from (all of it with --json):")
    for row in document["sources"]:
        if row["of"] not in others:
            print_line(f"  {row['kind']:<9}  {row['figure']}, {row['of']}: {brief(row['source'], _SOURCE_WIDTH)}")


def _print_reasons(answer: Mapping[str, Any]) -> None:
    fewer = answer["fewer"]
    if fewer is not None:
        broken = _values(fewer)
        print_line(f"One replica fewer, {fewer['gpus']} GPUs, breaks {fewer['binding']}: {broken}.")
    load = answer["load"]
    if load["breaks"]:
        print_line(f"What breaks first when load grows: {load['breaks']}, bound by {load['bottleneck']}.")


def _print_table(document: Mapping[str, Any]) -> None:
    names = [*document["slo_asked"]]
    headings = ["GPUs", "split", "$/hour", "$/M tokens", "kWh/M tokens", *names, "quality lost", "front"]
    columns: Columns = {"plan": "left", "GPU": "left", **dict.fromkeys(headings, "right"), "breaks first": "left"}
    print_table(columns, (_cells(row, names) for row in document["plans"] if row["gpus"] is not None))


def _cells(row: Mapping[str, Any], names: list[str]) -> list[str]:
    return [
        _name(row),
        row["gpu"],
        f"{row['gpus']}" if row["feasible"] else f"{row['gpus']} (not enough)",
        _split(row),
        f"{row['usd_per_hour']:,.2f}",
        _usd(row["cost_per_million_tokens"]),
        MISSING if row["kwh_per_million_tokens"] is None else f"{row['kwh_per_million_tokens']:.3g}",
        *(_value(row["slo"].get(name)) for name in names),
        _quality(row["quality"]),
        "yes" if row["pareto"] else "",
        row["binding"] or MISSING,
    ]


def _name(row: Mapping[str, Any]) -> str:
    return " ".join([row["policy"], *row["options"]])


def _split(row: Mapping[str, Any]) -> str:
    split = f"tp {row['tp']}" + (f" x pp {row['pp']}" if row["pp"] > 1 else "")
    return split + (f", {row['prefill_gpus']} prefill" if row["prefill_gpus"] else "")


def _value(bound: Mapping[str, float | None] | None) -> str:
    if bound is None or bound["value_s"] is None:
        return MISSING
    value_s, low_s, high_s = bound["value_s"], bound["low_s"], bound["high_s"]
    shown = format_s(value_s)
    return shown if low_s is None or high_s is None else f"{shown} ({format_s(low_s)} to {format_s(high_s)})"


def _values(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_value({**bound, 'low_s': None})}" for name, bound in row["slo"].items()) or "no request"


def _quality(quality: Mapping[str, Any] | str) -> str:
    return quality if isinstance(quality, str) else f"KL {quality['kl_nats']:.3f}"


def _print_load(load: Mapping[str, Any]) -> None:
    if not load["curve"]:
        return
    typer.echo()
    print_line("Goodput and latencies against offered load, on that fleet:")
    names = list(load["curve"][0]["slo"])
    figures = ["load", "offered/s", "goodput/s", *names]
    columns: Columns = {**dict.fromkeys(figures, "right"), "SLO": "left", "nearest bound": "left"}
    rows = (
        [
            f"{row['rate_scale']:.2f}x",
            MISSING if row["offered_rps"] is None else f"{row['offered_rps']:.3g}",
            f"{row['goodput_rps']:.3g}",
            *(MISSING if row["slo"][name] is None else format_s(row["slo"][name]) for name in names),
            "holds" if row["holds"] else "breaks",
            row["binding"],
        ]
        for row in load["curve"]
    )
    print_table(columns, rows)


def _print_changes(document: Mapping[str, Any]) -> None:
    """What becomes of the plan where things turn out otherwise."""
    if not document["sensitivity"]:
        return
    names = [*document["slo_asked"]]
    figures = [*names, "$/M tokens", "GPUs needed", "$/M tokens then"]
    columns: Columns = {"change": "left", "SLO": "left", **dict.fromkeys(figures, "right")}
    typer.echo()
    print_line("If things turn out otherwise, one at a time:")
    print_table(columns, (_changed(row, names) for row in document["sensitivity"]))


def _changed(row: Mapping[str, Any], names: list[str]) -> list[str]:
    needed = row["needed"] or {"gpus": None, "cost_per_million_tokens": None}
    values_s = [row["slo"].get(name) for name in names]
    return [
        row["change"],
        {True: "holds", False: "breaks", None: row["method"]}[row["holds"]],
        *(MISSING if value_s is None else format_s(value_s) for value_s in values_s),
        _usd(row["cost_per_million_tokens"]),
        MISSING if needed["gpus"] is None else f"{needed['gpus']}",
        _usd(needed["cost_per_million_tokens"]),
    ]


def _usd(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.2f}"


def _print_commands(answer: Mapping[str, Any]) -> None:
    typer.echo()
    print_line("Play it again:")
    print_line(f"  {answer['simulate']}")
    for name, engine in answer["engines"].items():
        if engine["why_not"]:
            print_line(f"{name}: {engine['why_not']}")
            continue
        for server in engine["commands"]:
            print_line(f"{name}, each of {server['servers']} servers for {server['for']}:")
            print_line(f"  {server['command']}")
        for note in engine["notes"]:
            print_line(f"  ({note})")
    beside = answer["beside"]
    if beside is not None:
        print_line(
            f"The best plan that an engine runs today: {beside['gpus']} x {beside['gpu']} ({_split(beside)}) under "
            f"{_name(beside)}, ${beside['cost_per_million_tokens']:,.2f} a million output tokens"
        )
