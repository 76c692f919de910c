"""Whatever a page names is there: files and folders of the project by their paths, and what its links lead to."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "runtime").rglob("*.md")])
HISTORY = "CHANGELOG.md"  # names what once was
ROOMS = ("kvsim", "runtime", "policies", "traces", "tests", "docs", "examples", "benchmarks", "scripts")
PATH = re.compile(rf"`(?:python )?((?:{'|'.join(ROOMS)})/[\w.*/-]*)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
MODULE = re.compile(r"`([\w-]+\.py)`")
FENCE = re.compile(r"```.*?```", re.DOTALL)


def missing(page: Path, root: Path = ROOT) -> list[str]:
    """The paths, names of modules and relative links of a page that lead nowhere.

    A path is written from the root of the project, with `*` or NAME for any part of a name; a bare name of a module
    lies in the root.
    """
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    paths = [found for found in PATH.findall(text) if not any(root.glob(found.rstrip("/").replace("NAME", "*")))]
    names = [found for found in MODULE.findall(text) if not (root / found).is_file()]
    links = []
    for link in LINK.findall(text):
        target, _, heading = link.partition("#")
        at = page.parent / target if target else page
        if "://" in link or link.startswith("mailto:"):
            continue
        if not at.exists() or (heading and heading not in headings(at)):
            links.append(link)
    return [*paths, *names, *links]


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    lines = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != HISTORY], ids=lambda page: page.stem)
def test_what_a_page_names_is_there(page: Path) -> None:
    assert missing(page) == []


def test_what_is_not_there_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "page.md"
    (tmp_path / "kvsim").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "kvsim" / "loop.py").touch()
    page.write_text(
        "# One two\n`kvsim/loop.py`, `kvsim/*.py`, `kvsim/none.py`, `loop.py`, [here](#one-two), [a](page.md#one-two), "
        "[b](other.md), [c](#three), [d](https://example.org/none)\n```\n`kvsim/shown.py`\n```\n",
        encoding="utf-8",
    )
    assert missing(page, tmp_path) == ["kvsim/none.py", "loop.py", "other.md", "#three"]


def reachable(start: Path) -> set[Path]:
    """The pages that links lead to from one, over others, itself included."""
    found, todo = {start}, [start]
    while todo:
        page = todo.pop()
        for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
            at = (page.parent / link.partition("#")[0]).resolve()
            if at.suffix == ".md" and at.is_file() and at not in found:
                found.add(at)
                todo.append(at)
    return found


def test_every_page_is_reached_from_the_index() -> None:
    pages = {page for page in PAGES if ROOT / "docs" in page.parents}
    assert len(pages) > 20
    assert sorted(page.name for page in pages - reachable(ROOT / "docs" / "index.md")) == []


def test_a_page_without_a_way_to_it_is_seen(tmp_path: Path) -> None:
    for name, text in (
        ("index", "[a](a.md#x), [b](https://b.md)"),
        ("a", "[c](c.md), [a](a.md)"),
        ("b", ""),
        ("c", ""),
    ):
        (tmp_path / f"{name}.md").write_text(text)
    assert sorted(page.stem for page in reachable(tmp_path / "index.md")) == ["a", "c", "index"]


def long_lines(page: Path) -> list[str]:
    """Lines of prose above 120 characters: tables and code are as wide as they are."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [line for line in text.splitlines() if len(line) > 120 and not line.startswith(("|", "<!--"))]


HOUSE = [page for page in PAGES if page.parent in (ROOT, ROOT / "docs") and page.name not in (HISTORY, "quality.md")]


@pytest.mark.parametrize("page", HOUSE, ids=lambda page: page.stem)
def test_prose_is_wrapped(page: Path) -> None:
    assert long_lines(page) == []
