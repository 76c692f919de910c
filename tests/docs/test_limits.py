"""docs/limits.md is the one page of limits: each line names the tests that hold it, and no other page has more."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "limits.md"
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
FENCE = re.compile(r"```.*?```", re.DOTALL)
ERRORS = ("pytest.raises", "== 2", "error", "refused(")  # of these a test that something is refused has one
WRITTEN = {"quality.md", "options.md"}  # by a script
LATER = re.compile(
    r"not modelled|not model\b|\b(?:does|do|is|are) not\b[^.]{0,40}\byet\b|unsupported|not supported|to do\b",
    re.IGNORECASE,
)


def lines(text: str) -> list[tuple[str, str]]:
    """Each item of the page's lists, under its heading."""
    found, heading = [], ""
    for block in re.split(r"\n(?=- |## )|\n\n", text):
        if block.startswith("## "):
            heading = block.partition("\n")[0].removeprefix("## ")
        elif block.startswith("- "):
            found.append((heading, block))
    return found


@cache
def functions(path: Path) -> dict[str, str]:
    """The source of every function of a file by its name, with its decorators."""
    source = path.read_text(encoding="utf-8")
    rows = source.splitlines()
    return {
        node.name: "\n".join(
            rows[min([node.lineno, *(one.lineno for one in node.decorator_list)]) - 1 : node.end_lineno]
        )
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
    }


def unheld(text: str, root: Path = ROOT) -> list[str]:
    """The lines that name no test, or one that does not exist, or, of what is refused, one that expects no error."""
    found = []
    for heading, line in lines(text):
        named = TEST.findall(line)
        sources = [functions(root / path).get(name, "") if (root / path).is_file() else "" for path, name in named]
        refuses = heading.startswith("Refused")
        if not named or not all(sources) or (refuses and not all(any(x in s for x in ERRORS) for s in sources)):
            found.append(line)
    return found


def test_every_line_names_a_test_that_holds_it() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(lines(text)) > 40
    assert {heading.partition(" ")[0] for heading, _ in lines(text)} == {"Not", "Simplified", "Refused"}
    assert unheld(text) == []


def test_a_line_without_a_test_is_seen(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text(
        "def test_one():\n    with pytest.raises(ValueError):\n        f()\n\n\ndef test_two():\n    assert f() == 1\n"
    )
    page = (
        "# L\n\n## Refused\n\n- a.\n  `tests/test_a.py::test_one`\n- b, for good.\n- c. `tests/test_a.py::test_two`\n"
        "- d. `tests/test_a.py::test_three`\n- e. `tests/test_b.py::test_one`\n\n## Not modelled\n\n"
        "- f. `tests/test_a.py::test_two`\n"
    )
    assert [line[2] for line in unheld(page, tmp_path)] == ["b", "c", "d", "e"]


def paragraphs(page: Path) -> list[str]:
    """A page's paragraphs and items, without tables and code."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [" ".join(x.split()) for x in re.split(r"\n\n|\n(?=\s*- |\s*\d+\. |\|)", text) if not x.startswith("|")]


PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").glob("*.md") if page.name not in WRITTEN)]


@pytest.mark.parametrize("page", [page for page in PAGES if page != PAGE], ids=lambda page: page.stem)
def test_other_pages_leave_limits_to_it(page: Path) -> None:
    """What another page says is missing, or refused, stands beside the test that holds it, or the way to the limits."""
    alone = [x for x in paragraphs(page) if LATER.search(x) or re.search(r"\brefuse", x)]
    assert [x for x in alone if "limits.md" not in x and "`tests/" not in x] == []
