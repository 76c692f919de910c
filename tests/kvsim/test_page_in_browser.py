"""Pages in a browser, where one is installed: nothing on its console, every chart drawn, wide tables say so."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvsim import plan
from kvsim.report.plan import plan_page
from kvsim.report.report import report_html
from kvsim.report.sweep import sweep_page
from kvsim.results.summary import Result

EVIL = "<script>alert(1)</script>"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")


def opened(html: str, folder: Path, width: int) -> str:
    """The page as it stands after its scripts; what a console was told fails the test."""
    path = folder / "page.html"
    path.write_text(html, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--enable-logging=stderr"]
    command = [str(BROWSER), *flags, f"--user-data-dir={folder}", f"--window-size={width},900", "--dump-dom"]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, check=True, timeout=120)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    return done.stdout


def drawn(page: str) -> int:
    return len(re.findall(r'class="plot js-plotly-plot"', page))


def test_a_report_draws_every_chart_and_runs_no_name(make_result: Callable[..., Result], tmp_path: Path) -> None:
    html = report_html([make_result(policy=f"{name}{EVIL}", tenants=(EVIL, "b")) for name in ("full", "quest")])
    page = opened(html, tmp_path, 500)
    assert drawn(page) == html.count('class="plot"') > 5
    assert EVIL not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert 'data-scrolls="this table scrolls sideways"' in page


def test_a_plan_draws_its_curves_on_a_phone(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"trace": "azure-2023-conv", "limit": 60, "rate_scale": 40.0, "model": "llama-3.1-8b"}
    found = plan(gpu="h100-sxm", policy=["full", "shadowkv"], slo="ttft_p99=1s", pools=False, tp=1, **asked)
    html = plan_page(found.to_dict(), f"kvsim plan --scenario '{EVIL}'")
    page = opened(html, tmp_path, 500)
    assert drawn(page) == html.count('class="plot"') >= 4  # by the load of a GPU, by offered load, goodput, cost
    assert EVIL not in page
    assert "If things turn out otherwise" in page
    assert 'data-scrolls="this table scrolls sideways"' in page


def test_a_table_says_that_it_scrolls_where_it_does(tmp_path: Path) -> None:
    figures = {"status": "done", "reason": None, "output_tokens_per_s": 5.0, "bottleneck": "hbm"}
    rows = [{"point": i, "gpus": i, **figures} for i in range(200)]
    document = {"over": {"gpus": [*range(200)]}, "draw": None, "options": {"trace": "a"}}
    page = opened(sweep_page(document, rows, "kvsim sweep"), tmp_path, 1600)
    assert drawn(page) == 1
    assert re.findall(r'data-scrolls="([^"]*)"', page) == ["this table scrolls up and down"]
