"""No sentence of a page has become a list: a line that begins like an item is one."""

import re
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "runtime").rglob("*.md")])
FENCE = re.compile(r"```.*?```", re.DOTALL)
MARK = re.compile(r"\s*(\d+[.)]|[-+*>]|#+)(?:\s|$)")
ENDED = re.compile(r"[.:;!?`)|]\**\"?$")  # so may the line before an item end: it was a sentence's last


def torn(text: str) -> list[str]:
    """Lines that a wrap made into an item or a heading: after a line without an end, or of a number out of order.

    A heading within a heading (`## # Title`) is one, too.
    """
    found, number = [], 0
    for before, line in pairwise(["", *FENCE.sub("", text).splitlines()]):
        mark = MARK.match(line)
        if mark is None:
            continue
        kind, sentence = mark[1], before.strip() and not before.startswith(("#", "<!--"))
        if kind[0].isdigit():
            out_of_order = int(kind[:-1]) not in (1, number + 1)
            number = int(kind[:-1])
        else:
            out_of_order = kind[0] == "#" and MARK.match(line[mark.end() :]) is not None
        if out_of_order or (sentence and (kind[0] == "#" or not ENDED.search(before.rstrip()))):
            found.append(line)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_sentence_is_torn(page: Path) -> None:
    assert torn(page.read_text(encoding="utf-8")) == []


def test_a_torn_sentence_is_seen() -> None:
    whole = "# Title\n\nA sum.\n- One,\n  of 5 - 3.\n- Two:\n  1. a.\n  2. b.\n\n10 of 12.\n```\na\n- b\n```\n"
    assert torn(whole) == []
    assert torn("It ends with exit code\n130. More of it.\n") == ["130. More of it."]
    assert torn("It ends in full.\n\n130. More of it.\n") == ["130. More of it."]
    assert torn("What is left of 5\n- 3 is 2.\n") == ["- 3 is 2."]
    assert torn("Text.\n# not a comment\n\n## # Twice\n") == ["# not a comment", "## # Twice"]
