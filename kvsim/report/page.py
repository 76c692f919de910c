"""What a page is made of, and how it becomes HTML: tables and Plotly charts, readable in light and dark.

Templates escape whatever they are given. The page loads nothing: Plotly stands in it once, and its content security
policy allows no network and no script but the two that are named by their hashes, so that not even a mistake in
escaping could run a trace's text.
"""

import base64
import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from kvsim.report.markdown import fenced, marked
from kvsim.report.plots import Figure
from kvsim.results.summary import plain

if TYPE_CHECKING:
    from jinja2 import Environment

MISSING = "-"  # shown for a figure that there is none of


class Chart(NamedTuple):
    """A figure of a page with its title, and a caption that says what to see in it."""

    number: int
    title: str
    caption: str


class Cell(NamedTuple):
    """A cell of a table: a row's name, after its run's line if any, a text, or a figure with its exact value."""

    kind: Literal["name", "text", "figure"]
    text: str
    exact: str | None = None
    best: bool = False
    css_border: str = ""
    about: str = ""  # shown when a pointer rests on it


class Table(NamedTuple):
    """A table: its caption, each column's heading and whether it is left-aligned, and its rows.

    A `tall` one scrolls within its own height.
    """

    caption: str
    headings: list[tuple[str, bool]]
    rows: list[list[Cell]]
    tall: bool = False


def number_cell(value: float | None, show: Callable[[float], str], best: bool = False) -> Cell:
    """A figure as `show` writes it; bold for the `best` of a column."""
    return Cell("figure", MISSING) if value is None else Cell("figure", show(value), repr(value), best)


def text_cell(text: str) -> Cell:
    """A text, left-aligned."""
    return Cell("text", text)


def name_cell(text: str, css_border: str = "", about: str = "") -> Cell:
    """The name of a row, and what it is about."""
    return Cell("name", text, css_border=css_border, about=about)


def table(caption: str, headings: Sequence[str], rows: Iterable[Sequence[Cell]], texts: Collection[str] = ()) -> Table:
    """A table whose first column holds names, those headed by one of `texts` text, and the others figures."""
    left = {headings[0], *texts}
    return Table(caption, [(heading, heading in left) for heading in headings], [list(row) for row in rows])


class Page:
    """The charts of one page, numbered in the order of reading, and the page itself."""

    def __init__(self) -> None:
        self._figures: list[Figure] = []

    def chart(self, title: str, caption: str, figure: Figure) -> Chart:
        """The next chart of the page."""
        self._figures.append(figure)
        return Chart(len(self._figures) - 1, title, caption)

    def figure(self, chart: Chart) -> Figure:
        """What a chart of this page draws."""
        return self._figures[chart.number]

    def contents(
        self, layout: str, title: str, identity: Mapping[str, str], main: Table | None = None, **shown: Any
    ) -> "Contents":
        """What the page says: `shown` as the layout of this name puts it, `main` the table that a CSV file has."""
        return Contents(layout, title, identity, self._figures, main, shown)

    def html(self, layout: str, title: str, identity: Mapping[str, str], **shown: Any) -> str:
        """The whole page."""
        return html_of(self.contents(layout, title, identity, **shown))


class Contents(NamedTuple):
    """A page before it is written in some format."""

    layout: str
    title: str
    identity: Mapping[str, str]
    figures: Sequence[Figure]
    main: Table | None
    shown: Mapping[str, Any]


def html_of(contents: Contents) -> str:
    """The page as one file that loads nothing."""
    from plotly.offline import get_plotlyjs

    templates = page_templates()
    scripts = [get_plotlyjs(), templates.get_template("draw.js").render()]
    given = {
        "shell": "page.html.j2",
        "parts": "parts.html.j2",
        "title": contents.title,
        "identity": contents.identity,
        "figures": plain(contents.figures),
        "scripts": {_sha256(script): script for script in scripts},
    }
    return templates.get_template(f"{contents.layout}.j2").render(**given, **contents.shown)


def fragment(words: str, tables: Iterable[Table]) -> str:
    """Words and tables as HTML for a page that is not ours."""
    return page_templates().get_template("fragment.html.j2").render(words=words, tables=list(tables))


@cache
def page_templates() -> "Environment":
    """The layouts and parts of pages, which escape whatever they are given."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(
        loader=PackageLoader("kvsim.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {"md": marked, "fenced": fenced}
    templates.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return templates


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
