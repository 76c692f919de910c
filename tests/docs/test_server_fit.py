"""What is kept of fits to servers that are known: the page is written from it, and the constants come near."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULT = json.loads((ROOT / "benchmarks" / "results" / "server_fit.json").read_text(encoding="utf-8"))


def test_the_page_is_written_from_its_result() -> None:
    page = runpy.run_path(str(ROOT / "benchmarks" / "server_fit.py"))["page"](RESULT)
    written = (ROOT / "docs" / "measured" / "server_fit.md").read_text(encoding="utf-8")
    assert written == page, "python benchmarks/server_fit.py --pages"


@pytest.mark.parametrize("fit", RESULT["fits"], ids=lambda fit: f"{fit['load']}, {fit['scatter']:.0%}")
def test_constants_come_near(fit: dict) -> None:
    true, found, left = RESULT["true"], fit["constants"], fit["error_left"]
    assert found["kernel_slowdown"] == pytest.approx(true["kernel_slowdown"], rel=0.05)
    assert found["iteration_overhead"] == pytest.approx(true["iteration_overhead"], abs=0.0008)
    # To a share of what requests wait: of some 50 ms on a server at ease, of seconds in a queue.
    ttft_s = left["ttft_s"]["measured_p50_s"]
    assert found["request_overhead"] == pytest.approx(true["request_overhead"], abs=max(0.003, 0.02 * ttft_s))
    # Half of lognormal factors are within two thirds of sigma; what was left before is far more.
    assert left["tpot_s"]["median"] < 0.85 * fit["scatter"] + 0.02
    assert left["tpot_s"]["median_before"] > left["tpot_s"]["median"] + 0.1
