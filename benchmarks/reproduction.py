"""Recompute published figures and write them beside what was published, whether they agree or not.

`python benchmarks/reproduction.py` writes docs/measured/reproduction.md and benchmarks/results/reproduction.json.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from published import four_costs, minference, mooncake, quest, retrieval_attention, retroinfer, shadowkv
from published.comparison import Comparison, Section

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "measured" / "reproduction.md"
RESULTS = ROOT / "benchmarks" / "results" / "reproduction.json"

INTRODUCTION = """\
# Published figures, recomputed

Written by `python benchmarks/reproduction.py`; a test fails when this page is out of date.

Every row is a published figure, where it comes from, what kvsim finds for the same setting, and the error, good or bad.
Sources: **R** is printed in the paper or its repository, **R2** is quoted from it by others, **C** is recomputed from
the paper's own formula or public data, since the printed figure is rounded. Rates are those of the hardware catalogue,
each with its source there (`kvsim hardware show a100-80g-sxm`). No constant is fitted to a single row; where a
catalogue figure was taken from one of these papers, the section says so.
"""


def sections() -> list[Section]:
    """All comparisons, grouped by paper."""
    papers = (four_costs, shadowkv, retrieval_attention, retroinfer, minference, mooncake, quest)
    return [paper.section() for paper in papers]


def document(papers: Sequence[Section]) -> str:
    """The page as Markdown."""
    parts = [INTRODUCTION]
    for paper in papers:
        parts += [
            f"\n## {paper.title}\n\n{paper.prose}\n\n",
            "| what | published | source | kvsim | error | assumption |\n",
        ]
        parts.append("|---|---:|---|---:|---:|---|\n")
        parts += [_line(row) for row in paper.comparisons]
    return "".join(parts)


def results(papers: Sequence[Section]) -> str:
    """The same comparisons as JSON, rounded so that the last bits of a float do not matter."""
    rows = [
        {
            "paper": paper.title,
            "what": row.what,
            "unit": row.unit,
            "published": float(f"{row.published:.6g}"),
            "source": row.source,
            "kvsim": float(f"{row.kvsim:.6g}"),
            "error_percent": round(row.error_percent, 1) + 0.0,
            "assumption": row.assumption,
        }
        for paper in papers
        for row in paper.comparisons
    ]
    return json.dumps({"schema_version": 1, "comparisons": rows}, indent=1) + "\n"


def main() -> None:
    """Write both files."""
    papers = sections()
    for path, text in ((DOCUMENT, document(papers)), (RESULTS, results(papers))):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _line(row: Comparison) -> str:
    error = f"{row.error_percent:+.1f} %".replace("-0.0", "0.0").replace("+0.0", "0.0")
    published, found = (f"{_figure(value)} {row.unit}" for value in (row.published, row.kvsim))
    return f"| {row.what} | {published} | {row.source} | {found} | {error} | {row.assumption} |\n"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


if __name__ == "__main__":
    main()
