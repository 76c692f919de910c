"""The published figures: the committed page is up to date, and kvsim stays within the bounds that it promises."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reproduction() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import reproduction

        yield reproduction


@pytest.fixture(scope="module")
def papers(reproduction: ModuleType) -> Sequence[Any]:
    sections: Sequence[Any] = reproduction.sections()
    return sections


def comparisons(papers: Sequence[Any], paper: str, *prefixes: str) -> list[Any]:
    """The rows of one paper whose names begin with one of `prefixes`."""
    (section,) = (section for section in papers if section.title.startswith(paper))
    return [row for row in section.comparisons if row.what.startswith(prefixes)]


def errors_percent(rows: Sequence[Any]) -> dict[str, float]:
    return {f"{row.what} [{row.source}]": row.error_percent for row in rows}


def test_the_committed_page_and_results_are_up_to_date(reproduction: ModuleType, papers: Sequence[Any]) -> None:
    how = "run python benchmarks/reproduction.py and commit what it writes"
    assert reproduction.DOCUMENT.read_text(encoding="utf-8") == reproduction.document(papers), how
    assert reproduction.RESULTS.read_text(encoding="utf-8") == reproduction.results(papers), how


@pytest.mark.parametrize(
    ("paper", "prefixes", "rows", "bound_percent"),
    [
        ("ShadowKV", ("throughput",), 8, 15),
        ("ShadowKV", ("gain",), 4, 10),
        ("ShadowKV", ("infinite batch",), 4, 0.1),
        ("ShadowKV", ("equivalent bandwidth", "memory saving"), 2, 5),
        ("RetrievalAttention", ("per token, Flat", "per token, IVF", "per token, RetrievalAttention"), 9, 25),
        ("Dense prefill", ("prefill",), 5, 10),
        ("Mooncake", ("break-even",), 4, 10),
        ("Mooncake", ("KV cache", "tokens in", "LRU"), 5, 2),
        ("Quest", ("per token", "attention"), 13, 15),
    ],
)
def test_errors_stay_within_their_bounds(
    paper: str, prefixes: tuple[str, ...], rows: int, bound_percent: float, papers: Sequence[Any]
) -> None:
    errors = errors_percent(comparisons(papers, paper, *prefixes))
    assert len(errors) == rows
    assert {what: error for what, error in errors.items() if abs(error) > bound_percent} == {}


def test_the_four_costs_match_the_papers_formulas(papers: Sequence[Any]) -> None:
    rows = [row for row in comparisons(papers, "Challenges", "") if row.source == "C"]
    errors = errors_percent([row for row in rows if row.assumption == "paper mode"])
    assert len(errors) == 12
    assert {what: error for what, error in errors.items() if abs(error) > 2} == {}


def test_physical_prefill_is_a_quarter_above_the_paper(papers: Sequence[Any]) -> None:
    printed, recomputed = sorted(
        comparisons(papers, "Challenges", "prefill, 50K, physical"), key=lambda row: row.published
    )
    assert printed.error_percent == pytest.approx(26, abs=2)  # c = 2 where the paper has c = 1
    assert abs(recomputed.error_percent) < 2


def test_the_largest_batches_are_within_two_of_the_published(papers: Sequence[Any]) -> None:
    rows = comparisons(papers, "ShadowKV", "largest batch")
    assert len(rows) == 8
    assert {row.what: row.kvsim for row in rows if abs(row.kvsim - row.published) > 2} == {}


def test_no_row_is_empty(papers: Sequence[Any]) -> None:
    rows = [row for section in papers for row in section.comparisons]
    assert all(row.published > 0 and row.kvsim > 0 and row.source in ("R", "R2", "C") and row.unit for row in rows)
    names = [(section.title, row.what, row.source) for section in papers for row in section.comparisons]
    assert len(names) == len(set(names)), "each figure is compared once"
