"""Hooks of the site: pages from outside docs/ join it, and links that lead out of docs/ lead to them."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
JOINED = {"README.md": "about.md", "CONTRIBUTING.md": "contributing.md"}
"""Pages of the project's root by the names that they have on the site."""

_LINK = re.compile(r"\]\((?P<target>[^)\s#]+)(?P<heading>#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """List the measured pages, whose scripts make more of them."""
    named = set(pages_of(config.nav))
    found = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs" / "measured").glob("*.md"))
    config.nav[-1]["Measured"] = [page for page in found if page not in named]
    return config


def pages_of(nav: Any) -> list[str]:
    """The pages that a navigation names, in its order."""
    if isinstance(nav, str):
        return [nav]
    return [page for item in (nav.values() if isinstance(nav, dict) else nav) for page in pages_of(item)]


def on_files(files: Any, config: Any) -> Any:
    """Let the pages of the root join those of docs/."""
    from mkdocs.structure.files import File

    for name, joined in JOINED.items():
        files.append(File.generated(config, joined, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The text of a page with its links as the site has them."""
    return relinked(markdown, page.file.src_uri)


def relinked(markdown: str, page: str) -> str:
    """Links to a joined page, and from one into docs/, by the names of the site; `page` is the one that has them."""
    out_of_docs = "../" * (page.count("/") + 1)

    def new(link: re.Match[str]) -> str:
        target, heading = link["target"], link["heading"] or ""
        if "://" in target:
            return link[0]
        if page in JOINED.values():
            target = JOINED.get(target, target.removeprefix("docs/"))
        elif target.removeprefix(out_of_docs) in JOINED:
            target = out_of_docs.removesuffix("../") + JOINED[target.removeprefix(out_of_docs)]
        return f"]({target}{heading})"

    return _LINK.sub(new, markdown)
