"""Text within Markdown: escaped, so that nothing of a trace, a file or a flag marks it up."""

import re
from html import escape

_MARKS = re.compile(r"([\\`*_{}\[\]|~$#])")
_STARTS = re.compile(r"^(\s*)([-+](?=\s|$)|-(?=[-\s]*$)|=|\d+(?=[.)](?:\s|$)))")  # of lists, rules and headings
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def marked(text: object) -> str:
    """Text on one line: marks stand for themselves, and so does HTML."""
    line = escape(_CONTROL.sub(" ", str(text)), quote=False)
    return _STARTS.sub(_start, _MARKS.sub(r"\\\1", line))


def _start(found: "re.Match[str]") -> str:
    """What would begin a list, say, as it is: a number's mark behind it is escaped, another one itself."""
    space, mark = found.groups()
    return f"{space}{mark}\\" if mark.isdigit() else f"{space}\\{mark}"


def fenced(text: object) -> str:
    """A command in a fence that is longer than any run of the same marks in it, and so ends where the command does."""
    words = str(text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", words)), default=0))
    return f"{fence}\n{words}\n{fence}"
