"""Text for a terminal: what would steer it, or reorder or hide what stands beside it, is written as an escape."""

import re

# Controls (C0, C1), marks that turn the direction of writing, line separators, invisible tags, lone surrogates.
_STEERING = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)
_LAYOUT = "\n\t"


def printable(text: str, *, layout: bool = False) -> str:
    """The text as a terminal may show it: `\\x1b[31m` is written out; `layout` leaves newlines and tabs as they are."""
    return _STEERING.sub(lambda found: found[0] if layout and found[0] in _LAYOUT else _escaped(found[0]), text)


def brief(text: str, most: int) -> str:
    """At most so many characters of the text: its beginning, three dots, and its end, which has the fix."""
    if len(text) <= most:
        return text
    tail = most // 3
    return f"{text[: most - tail - 5]} ... {text[-tail:]}"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
