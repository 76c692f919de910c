"""A page in another format than HTML: as Markdown by the same layout, as JSON whole, as CSV its main table.

Text of traces, files and flags stays text: Markdown escapes what would mark it up and HTML within it, a command stands
in a fence that it cannot end, and CSV quotes what a spreadsheet would take for a formula.
"""

import csv
import io
import json
import re
from collections.abc import Mapping
from html import unescape
from typing import Any

from kvsim.report.page import MISSING, Cell, Chart, Contents, Table, html_of, page_templates
from kvsim.results.summary import plain

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def in_format(contents: Contents, name: str) -> str:
    """The page as one of `kvsim.results.documents.FORMATS`."""
    return {"html": html_of, "md": markdown_of, "json": json_of, "csv": csv_of}[name](contents)


def markdown_of(contents: Contents) -> str:
    """Tables and words; charts are left out."""
    given = {"shell": "page.md.j2", "parts": "parts.md.j2", "title": contents.title}
    text = page_templates().get_template(f"{contents.layout}.j2").render(**given, **contents.shown)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def json_of(contents: Contents) -> str:
    """All that the page shows under the names that its layout gives it: exact figures, and the points of charts."""
    named = {name: _value(contents, one) for name, one in contents.shown.items()}
    document = {"title": contents.title, "identity": dict(contents.identity), **named}
    return json.dumps(plain(document), indent=2, allow_nan=False) + "\n"


def csv_of(contents: Contents) -> str:
    """The main table, its figures exact; a page without one has a line that says so."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\r\n")
    if contents.main is None:
        rows.writerow(["nothing to list"])
        return out.getvalue()
    rows.writerow([_quoted(heading) for heading, _ in contents.main.headings])
    rows.writerows([_csv_cell(cell) for cell in row] for row in contents.main.rows)
    return out.getvalue()


def _value(contents: Contents, one: Any) -> Any:
    if isinstance(one, Table):
        rows = [[cell.text if cell.kind != "figure" else _number(cell) for cell in row] for row in one.rows]
        return {"caption": one.caption, "columns": [heading for heading, _ in one.headings], "rows": rows}
    if isinstance(one, Chart):
        figure = contents.figures[one.number]
        lines = [
            {"name": unescape(str(line.get("name", ""))), "x": line.get("x"), "y": line.get("y")}
            for line in figure["data"]
        ]
        axes = {axis: unescape(figure["layout"][f"{axis}axis"]["title"]["text"]) for axis in ("x", "y")}
        return {"title": one.title, "caption": one.caption, "axes": axes, "lines": lines}
    if isinstance(one, Mapping):
        return {name: _value(contents, each) for name, each in one.items()}
    if isinstance(one, list | tuple):
        return [_value(contents, each) for each in one]
    return one


def _number(cell: Cell) -> float | None:
    """A figure as it was, to the last bit; None where there is none."""
    if cell.exact is None:
        return None
    return int(cell.exact) if cell.exact.removeprefix("-").isdigit() else float(cell.exact)


def _csv_cell(cell: Cell) -> str:
    if cell.kind == "figure":
        return cell.exact or ""
    return "" if cell.text == MISSING else _quoted(cell.text)


def _quoted(text: str) -> str:
    """Text that no spreadsheet computes."""
    return f"'{text}" if text.lstrip(" ").startswith(_FORMULA) else text
