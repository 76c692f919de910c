"""Tables and paragraphs in Markdown, as the pages of docs/measured/ have them."""

import re
from collections.abc import Iterable, Sequence

WIDTH = 120
MARK = re.compile(r"(?:\d+[.)]|[-+*>|=]|#+)$")  # at the head of a line it would begin an item, or a heading


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Rows of text under their heads, so many columns to the left and the others to the right."""
    lines = [heads, [*["---"] * left, *["---:"] * (len(heads) - left)], *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def paragraph(*sentences: str, item: bool = False) -> str:
    """Sentences in lines of at most 120 characters, none of which begins as an item of a list does."""
    lines, line = [], "-" if item else ""
    for word in " ".join(sentences).split():
        fits = len(line) + 1 + len(word) <= WIDTH or MARK.match(word)
        if not line:
            line = word
        elif fits:
            line += f" {word}"
        else:
            lines.append(line)
            line = f"  {word}" if item else word
    return "\n".join([*lines, line]) + "\n"


def holding(*said: tuple[bool, str]) -> list[str]:
    """The sentences of what is said whose conditions the figures meet; a page says nothing of what they do not show."""
    return [sentence for holds, sentence in said if holds]


def share(value: float) -> str:
    """A share in percent, such as 3.5 %."""
    return f"{value * 100:.2g} %" if value < 0.1 else f"{value:.0%}".replace("%", " %")
