"""The shell of the report: a self-contained HTML page with tables and Plotly charts, readable in light and dark.

The page loads nothing: Plotly stands in it once, and its content security policy allows no network and no script but
the two that are named by their hashes, so that not even a mistake in escaping could run a trace's text.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

from kvsim.report.plots import Figure
from kvsim.results.summary import plain

MISSING = "-"  # shown for a figure that there is none of


class Chart(NamedTuple):
    """A figure with its title, and a caption that says what to see in it."""

    title: str
    caption: str
    figure: Figure


def swatch(css_border: str) -> str:
    """A short line in a run's style, or nothing."""
    return f'<span class="swatch" style="border-top:3px {css_border}"></span>' if css_border else ""


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """A list of (label, CSS border) that says which line or bar is which."""
    items = "".join(f"<li>{swatch(border)}{escape(label)}</li>" for label, border in entries)
    return f'<ul class="legend">{items}</ul>'


def number_cell(value: float | None, show: Callable[[float], str], best: bool = False) -> str:
    """A figure as `<td>`: shown by `show`, the exact value in a `<data>` element; bold for the `best` of a column."""
    if value is None:
        return f"<td>{MISSING}</td>"
    shown = f'<data value="{value!r}">{escape(show(value))}</data>'
    return f"<td><strong>{shown}</strong></td>" if best else f"<td>{shown}</td>"


def text_cell(text: str) -> str:
    """A text as `<td>`, left-aligned."""
    return f'<td class="text">{escape(text)}</td>'


def name_cell(text: str, css_border: str = "") -> str:
    """The name of a row as `<th>`, after a run's line where it has one."""
    breakable = escape(text).replace(",", ",<wbr>").replace(":", ":<wbr>")  # between the parameters of a policy
    return f'<th scope="row">{swatch(css_border)}{breakable}</th>'


def table(caption: str, headings: Sequence[str], rows: Iterable[Sequence[str]], texts: Collection[str] = ()) -> str:
    """A table of HTML cells, which scrolls by itself when the screen is narrow.

    The first column holds names, those headed by one of `texts` hold text, the others figures.
    """
    left = {headings[0], *texts}
    kinds = [' class="text"' if heading in left else "" for heading in headings]
    head = "".join(f'<th scope="col"{kind}>{escape(h)}</th>' for h, kind in zip(headings, kinds, strict=True))
    body = "".join(f"<tr>{''.join(row)}</tr>\n" for row in rows)
    shown = f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody>"
    return f'<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0"><table>{shown}</table></div>'


class Page:
    """Collects sections and charts in the order of reading; `html` gives the page."""

    def __init__(self, title: str, lead: str, identity: Mapping[str, str]) -> None:
        self._title, self._identity = title, identity
        self._body = [f"<header><h1>{escape(title)}</h1>{lead}</header>"]
        self._figures: list[Figure] = []

    def section(self, heading: str, *parts: str) -> None:
        """Add a section of HTML parts under a heading."""
        self._body.append(f"<section><h2>{escape(heading)}</h2>{''.join(parts)}</section>")

    def charts(self, *charts: Chart) -> str:
        """The charts side by side as HTML, to be put into a section of this page."""
        shown = []
        for title, caption, figure in charts:
            plot = f'<div class="plot" id="plot-{len(self._figures)}" role="img" aria-label="{escape(title)}"></div>'
            shown.append(f"<figure><h3>{escape(title)}</h3>{plot}<figcaption>{escape(caption)}</figcaption></figure>")
            self._figures.append(figure)
        return f'<div class="charts">{"".join(shown)}</div>'

    def html(self) -> str:
        """The whole page."""
        from plotly.offline import get_plotlyjs

        scripts = [get_plotlyjs(), _DRAW]
        figures = json.dumps(plain(self._figures), allow_nan=False, separators=(",", ":"))
        for character in "<>&":  # none of them may end the script element or begin a comment in it
            figures = figures.replace(character, f"\\u{ord(character):04x}")
        hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts)
        policy = (
            f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
            "base-uri 'none'; form-action 'none'"
        )
        return "\n".join(
            [
                '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
                f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                *(f'<meta name="kvsim-{name}" content="{escape(own)}">' for name, own in self._identity.items()),
                f"<title>{escape(self._title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>",
                *self._body,
                "</main>\n<noscript><p>The charts need JavaScript; the tables hold the figures.</p></noscript>",
                f'<script type="application/json" id="figures">{figures}</script>',
                *(f"<script>{script}</script>" for script in scripts),
                "</body>\n</html>\n",
            ]
        )


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


_DRAW = """
JSON.parse(document.getElementById("figures").textContent).forEach((figure, i) =>
  Plotly.newPlot("plot-" + i, figure.data, figure.layout, {responsive: true, displayModeBar: false}));
"""

_CSS = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b222c; --muted: #56606e; --line: #d8dee6; --band: #f4f6f9; }
@media (prefers-color-scheme: dark) {
  :root { --page: #12161c; --ink: #e7ebf0; --muted: #a3adb9; --line: #323b47; --band: #1a2029; }
}
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 90rem; margin: 0 auto; padding: 1.5rem 1.25rem 3rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0.5rem 0 0.75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.75rem 0 0.5rem; padding-top: 0.75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 0.25rem; overflow-wrap: anywhere; }
p, li { max-width: 60rem; overflow-wrap: anywhere; }
.facts { display: flex; flex-wrap: wrap; gap: 0.5rem 2.5rem; margin: 0; }
.facts dt { color: var(--muted); font-size: 0.85rem; }
.facts dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.finding { font-size: 1.1rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); padding-bottom: 0.4rem; }
th, td { padding: 0.35rem 0.5rem; text-align: right; white-space: nowrap; }
thead th { color: var(--muted); white-space: normal; border-bottom: 2px solid var(--line); vertical-align: bottom; }
th { font-weight: 600; }
thead th.text { overflow-wrap: normal; }
th[scope=row], .text { text-align: left; white-space: normal; overflow-wrap: anywhere; max-width: 32rem; }
th[scope=row] { min-width: 11rem; }
.text { min-width: 5rem; }
tbody tr { border-bottom: 1px solid var(--line); }
tbody tr:hover { background: var(--band); }
.swatch { display: inline-block; width: 1.5em; margin-right: 0.6em; vertical-align: middle; }
.legend { display: flex; flex-wrap: wrap; gap: 0.2rem 1.5rem; padding: 0; margin: 0.75rem 0; list-style: none; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1.5rem 2rem; }
figure { margin: 0.75rem 0 0; min-width: 0; }
figcaption { margin-top: 0.25rem; color: var(--muted); font-size: 0.9rem; }
.plot .main-svg :is(.xtick, .ytick, .g-xtitle, .g-ytitle, .annotation) text { fill: var(--ink) !important; }
@media print { .scroll { overflow: visible; } section { break-inside: avoid; } }
"""
