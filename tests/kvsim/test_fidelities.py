"""The step fidelity against the op fidelity on a fixed slice of the random design whose table docs/measured has."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SEED = 0
# Of all kinds: alone and beside others, ranks, tiers, tight memory, closed sessions; those that op has done soon.
SLICE = (0, 4, 5, 6, 9, 10, 11, 14, 16, 18, 23, 25, 26, 38, 40, 42, 47)
PIPED = (4, 6, 7, 10, 15)  # of those with stages: by policy, alone and beside others


@pytest.fixture
def fidelities() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import fidelities

        yield fidelities
        sys.modules.pop("fidelities")


@pytest.mark.parametrize("number", SLICE)
def test_step_is_within_its_bounds_of_op(number: int, fidelities: Any) -> None:
    row = fidelities.compare((SEED, number))
    assert fidelities.is_within(row, means=0.02, others=0.05), fidelities.errors(row)


@pytest.mark.parametrize("number", PIPED)
def test_step_is_within_its_bounds_of_op_for_pipelines(number: int, fidelities: Any) -> None:
    row = fidelities.compare((SEED, number), pipelines=True)
    assert fidelities.is_within(row, means=0.02, others=0.05), fidelities.errors(row)


def test_the_page_is_of_the_committed_result(fidelities: Any) -> None:
    result, piped = (json.loads(path.read_text()) for path in (fidelities.RESULT, fidelities.PIPED_RESULT))
    page = (ROOT / "docs" / "measured" / "fidelities.md").read_text(encoding="utf-8")
    assert page == fidelities.page(result)
    for rows, kinds, share in (
        (result["rows"], fidelities.POLICIES, 0.95),
        (piped["rows"], fidelities.PIPED_POLICIES, 0.9),
    ):
        assert len({row["policy"] for row in rows}) == len(kinds)
        assert sum(fidelities.is_within(row, 0.02, 0.05) for row in rows) >= share * len(rows)
