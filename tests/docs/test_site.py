"""The site has every page, and its build, which ends at any broken link, passes where MkDocs is installed."""

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "scripts" / "mkdocs.yml"
HOOKS = runpy.run_path(str(ROOT / "scripts" / "site_pages.py"))
LOADED = re.compile(r"""<(?:script|link|img|iframe)[^>]*(?:src|href)=["']?(https?:)?//[^"'> ]+""")


def test_every_page_has_its_place() -> None:
    nav = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["nav"]
    named = HOOKS["pages_of"](nav)
    docs = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert len(named) == len(set(named))
    assert {page for page in named if "/" not in page} == docs | set(HOOKS["JOINED"].values())
    assert all((ROOT / "docs" / page).is_file() for page in named if "/" in page)
    assert [*nav[-1]] == ["Measured"]  # filled by the hook


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("index.md", "[a](../README.md#try-it)", "[a](about.md#try-it)"),
        ("measured/a.md", "[a](../../CONTRIBUTING.md)", "[a](../contributing.md)"),
        ("measured/a.md", "[a](../quality.md#x)", "[a](../quality.md#x)"),
        ("about.md", "[a](docs/planning.md#x), [b](CONTRIBUTING.md)", "[a](planning.md#x), [b](contributing.md)"),
        ("index.md", "[a](https://example.org/README.md), [b](#c)", "[a](https://example.org/README.md), [b](#c)"),
    ],
)
def test_links_out_of_the_docs_stay_on_the_site(page: str, link: str, expected: str) -> None:
    relinked: Callable[[str, str], str] = HOOKS["relinked"]
    assert relinked(link, page) == expected


def build(out: Path, config: Path = CONFIG) -> "subprocess.CompletedProcess[Any]":
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config), "--site-dir", str(out)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(words, check=False, capture_output=True, text=True, env=env)


def test_it_is_built_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("material")
    done = build(tmp_path / "site")
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(tmp_path / "site").as_posix(): path for path in (tmp_path / "site").rglob("*.html")}
    assert {"index.html", "tutorial.html", "measured/planning.html", "about.html"} <= pages.keys()
    for path in pages.values():
        assert not LOADED.search(path.read_text(encoding="utf-8")), path


def test_a_broken_link_ends_the_build(tmp_path: Path) -> None:
    pytest.importorskip("material")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# A\n\n[b](none.md), [c](#none)\n", encoding="utf-8")
    wanted = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    wanted |= {"docs_dir": "docs", "nav": [{"A": "index.md"}], "hooks": []}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(wanted), encoding="utf-8")
    done = build(tmp_path / "site", tmp_path / "mkdocs.yml")
    assert done.returncode != 0
    assert "none.md" in done.stderr
    assert "#none" in done.stderr
