"""The figures of `kvsim quality` for people: a table in the terminal, and a page with a chart of loss by memory."""

from collections.abc import Mapping
from html import escape
from typing import Any, Literal

from kvsim.report.page import Chart, Page, legend, name_cell, number_cell, table, text_cell
from kvsim.report.plots import Figure, style
from kvsim.text.units import format_bytes

FIGURES = {"kl_nats": "KL (nats)", "nll_nats": "NLL (nats)", "top1_share": "same top-1"}
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
    """A row for the terminal: means, with half the width of their intervals; bytes of one sequence."""
    figures = [_shown(name, row[name]) for name in FIGURES]
    return [row["policy"], f"{row['context_tokens']:,}", *figures, *(format_bytes(n) for n in _sizes(row))]


def quality_page(document: Mapping[str, Any]) -> str:
    """The measurement as a page that loads nothing."""
    rows = document["rows"]
    page = Page("What policies change in a model's predictions", f"<p>{escape(caption(document))}</p>", {})
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    styles = {policy: style(index) for index, policy in enumerate(policies)}
    page.section(
        "Loss",
        legend((policy, own.css_border) for policy, own in styles.items()),
        page.charts(
            Chart(
                "Divergence by context",
                "Kullback-Leibler divergence from full attention in nats a token, with 95 % intervals over the places; "
                "0 loses nothing.",
                _divergence(rows, policies),
            )
        ),
    )
    page.section(
        "Every figure",
        table(
            "Means with 95 % intervals over the places; bytes of one sequence",
            ("policy", "context", *(f"{name}, 95 %" for name in FIGURES.values()), *SIZES),
            (_html_cells(row, styles[row["policy"]].css_border) for row in rows),
            texts=tuple(f"{name}, 95 %" for name in FIGURES.values()),
        ),
        "<p>KL: divergence of the predictions. NLL: by how much the text's own tokens are less likely. Same top-1: "
        "how often the likeliest token is the same. Moved: to and from host memory, for each token decoded.</p>",
    )
    return page.html()


def _html_cells(row: Mapping[str, Any], css_border: str) -> list[str]:
    sizes = [number_cell(n, format_bytes) for n in _sizes(row)]
    figures = [text_cell(_shown(name, row[name])) for name in FIGURES]
    return [
        name_cell(row["policy"], css_border),
        number_cell(row["context_tokens"], "{:,.0f}".format),
        *figures,
        *sizes,
    ]


def _divergence(rows: list[Mapping[str, Any]], policies: list[str]) -> Figure:
    lines = []
    for index, policy in enumerate(policies):
        own = [row for row in rows if row["policy"] == policy]
        kl = [row["kl_nats"] for row in own]
        reach = [0 if of["high"] is None else of["high"] - of["mean"] for of in kl]
        lines.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": escape(policy),
                "x": [row["context_tokens"] for row in own],
                "y": [of["mean"] for of in kl],
                "error_y": {"type": "data", "array": reach},
                "line": {"color": style(index).colour, "dash": style(index).dash},
            }
        )
    layout = {
        "xaxis": {"title": {"text": "tokens of context"}, "type": "log"},
        "yaxis": {"title": {"text": "KL (nats a token)"}, "rangemode": "tozero"},
        "showlegend": False,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
    }
    return {"data": lines, "layout": layout}


def _shown(name: str, interval: Mapping[str, Any]) -> str:
    digits = ".1%" if name == "top1_share" else "+.4f" if name == "nll_nats" else ".4f"
    mean = format(interval["mean"], digits)
    if interval["high"] is None:
        return mean
    return f"{mean} ±{format(interval['high'] - interval['mean'], digits.removeprefix('+'))}"


def _sizes(row: Mapping[str, Any]) -> tuple[float, float, float]:
    held = row["held_bytes"]
    return held.get("hbm", 0), held.get("ddr", 0), row["moved_bytes_per_token"]
