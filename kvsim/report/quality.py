"""The figures of `kvsim quality` for people: a table in the terminal, and a page with a chart of loss by memory."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from kvsim.report.page import Cell, Page, name_cell, number_cell, table, text_cell
from kvsim.report.plots import divergence, style
from kvsim.text.units import format_bytes

FIGURES = {"kl_nats": "KL (nats)", "nll_nats": "NLL (nats)", "top1_share": "same top-1"}
LIMITS = {"kl_nats": (0.0, math.inf), "top1_share": (0.0, 1.0)}  # what a figure cannot leave, nor its interval
SIZES = ("HBM kept", "DDR kept", "moved a token")
TABLE: dict[str, Literal["left", "right"]] = {"policy": "left", "context": "right"}
TABLE |= dict.fromkeys((*FIGURES.values(), *SIZES), "right")


def caption(document: Mapping[str, Any]) -> str:
    """What was measured on what, in one line."""
    return (
        f"{document['model']} in {document['dtype']} on {document['device']}, {document['places']} places of "
        f"{document['text']['name']}, {document['new_tokens']} tokens predicted at each; against full attention"
    )


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row for the terminal: means with their intervals; bytes of one sequence."""
    figures = [_shown(name, row[name]) for name in FIGURES]
    return [row["policy"], f"{row['context_tokens']:,}", *figures, *(format_bytes(n) for n in _sizes(row))]


def quality_page(document: Mapping[str, Any]) -> str:
    """The measurement as a page that loads nothing."""
    rows = document["rows"]
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    styles = {policy: style(index) for index, policy in enumerate(policies)}
    page = Page()
    kl = page.chart(
        "Divergence by context",
        "Kullback-Leibler divergence from full attention in nats a token, with 95 % intervals over the places; "
        "0 loses nothing.",
        divergence({policy: _by_context(rows, policy) for policy in policies}),
    )
    figures = tuple(FIGURES.values())
    means = table(
        "Means with 95 % intervals over the places; bytes of one sequence",
        ("policy", "context", *figures, *SIZES),
        (_page_cells(row, styles[row["policy"]].css_border) for row in rows),
        texts=figures,
    )
    return page.html(
        "quality",
        "What policies change in a model's predictions",
        {},
        measured=caption(document),
        policies=[(policy, own.css_border) for policy, own in styles.items()],
        divergence=[kl],
        means=means,
    )


def _page_cells(row: Mapping[str, Any], css_border: str) -> list[Cell]:
    sizes = [number_cell(n, format_bytes) for n in _sizes(row)]
    figures = [text_cell(_shown(name, row[name])) for name in FIGURES]
    return [
        name_cell(row["policy"], css_border),
        number_cell(row["context_tokens"], "{:,.0f}".format),
        *figures,
        *sizes,
    ]


def _by_context(rows: list[Mapping[str, Any]], policy: str) -> tuple[list[int], list[float], list[tuple[float, float]]]:
    """Contexts, mean divergences and their intervals (the mean where there is none) of one policy's rows."""
    own = [row for row in rows if row["policy"] == policy]
    kl = [row["kl_nats"] for row in own]
    intervals = [(of["mean"],) * 2 if of["high"] is None else (of["low"], of["high"]) for of in kl]
    return [row["context_tokens"] for row in own], [of["mean"] for of in kl], intervals


def _shown(name: str, interval: Mapping[str, Any]) -> str:
    digits = ".1%" if name == "top1_share" else "+.4f" if name == "nll_nats" else ".4f"
    mean = format(interval["mean"], digits)
    if interval["high"] is None:
        return mean
    above, below = interval["high"] - interval["mean"], interval["mean"] - interval["low"]
    if math.isclose(above, below, rel_tol=1e-6, abs_tol=1e-12):
        return f"{mean} ±{format(above, digits.removeprefix('+'))}"
    return f"{mean} ({format(interval['low'], digits)} to {format(interval['high'], digits)})"


def _sizes(row: Mapping[str, Any]) -> tuple[float, float, float]:
    held = row["held_bytes"]
    return held.get("hbm", 0), held.get("ddr", 0), row["moved_bytes_per_token"]
