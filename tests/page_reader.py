"""A page of kvsim as the tests read it."""

import json
from html.parser import HTMLParser
from typing import Any


class Document(HTMLParser):
    """What the tests look at: tags with attributes, text, scripts, and tables as {caption: rows}.

    A cell is its exact value where it has one, otherwise its text.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.tables: dict[str, list[list[Any]]] = {}
        self.strong: list[float] = []
        self.text = ""
        self._open: list[str] = []
        self._cell = self._caption = ""
        self._value: float | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag in ("meta", "wbr"):
            return
        self._open.append(tag)
        if tag == "script":
            self.scripts.append("")
        elif tag == "caption":
            self._caption = ""
        elif tag == "tr":
            self.tables[self._caption].append([])
        elif tag in ("td", "th"):
            self._cell, self._value = "", None
        elif tag == "data":
            self._value = float(dict(attributes)["value"] or "")
            if "strong" in self._open:
                self.strong.append(self._value)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, "elements are nested"
        if tag == "caption":
            self.tables[self._caption] = []
        elif tag in ("td", "th"):
            self.tables[self._caption][-1].append(self._cell if self._value is None else self._value)

    def handle_data(self, data: str) -> None:
        if "script" in self._open:
            self.scripts[-1] += data
        elif "style" not in self._open:
            self.text += data
            self._cell += data
            if "caption" in self._open:
                self._caption += data

    def table(self, caption: str) -> list[dict[str, Any]]:
        """Rows by heading of the table whose caption begins so."""
        (rows,) = (rows for name, rows in self.tables.items() if name.startswith(caption))
        return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]

    @property
    def figures(self) -> list[dict[str, Any]]:
        """Plotly's figures, in the order of the page."""
        return json.loads(self.scripts[0])
