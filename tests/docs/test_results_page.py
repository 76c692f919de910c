"""docs/results.md describes every key and column that results have, and none that they lack."""

import json
import re
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from kvsim.__main__ import main
from kvsim.scenario.scenario_file import OPTIONS

PAGE = Path(__file__).parents[2] / "docs" / "results.md"
CODE = re.compile(r"`([^`]+)`")
ROW = re.compile(r"^\| (`.+?) \|", re.MULTILINE)
NOT_RECORDED = {"acceptance", "draft", "draft_share", "params", "speculate", "tree"}  # but what comes of them
OPEN = {"NODE": r"(?:gpu\d+\.hbm|host\d+\.(?:ddr|nvme)|remote)", "NAME": r"[\w-]+"}
COMMON = "--limit 40 --model llama-3.1-8b --gpu h100-sxm"
RUNS = (  # every feature that adds keys, in as few runs as go together
    (
        "--trace mooncake-conversation --gpus 2 --prefix-cache-hbm 10GB --prefix-cache-ddr 20GB "
        "--prefix-cache-nvme 1TB --prefix-cache-remote 1TB --prefix-cache-prefetch --seeds 2"
    ),
    "--trace azure-2023-code --gpus 16 --prefill-gpus 8",
    "--trace azure-2023-code --gpus 2 --tp 2 --speculate 3 --acceptance 0.5 --draft lookup",
    "--trace agentic-coding --gpus 16 --tp 8 --pp 2 --sessions closed --session-kv cheapest",
    (
        "--trace servegen-deepseek-r1:span_s=600 --scheduler fair --tenant client-*:slo_class=x --timeout 5s --seeds 2 "
        "--slo-class x:ttft=1s,tpot=1s,e2e=9s,queue=1s"
    ),
)


def section(title: str, text: str) -> str:
    """What stands under a heading."""
    level = title.partition(" ")[0]
    return re.split(rf"\n#{{1,{len(level)}}} ", text.split(f"\n{title}\n", 1)[1])[0]


def keys(table: str) -> list[str]:
    """The keys in the first column of a section's tables, alternatives in braces one by one."""
    found = []
    for cell in ROW.findall(table):
        for key in CODE.findall(cell):
            parts = [part.split(",") for part in re.split(r"[{}]", key)] if "{" in key else [[key]]
            found += ["".join(chosen) for chosen in product(*parts)]
    return found


def described(text: str) -> list[str]:
    """Every key of a run's summary that the page describes; NODE and NAME are left to be matched."""
    stands_for = {name: CODE.findall(line) for name, line in _names(text).items()}
    whole = keys(section("### Of the whole run, and of each tenant", text))
    found = whole + keys(section("### Of the whole run", text)) + keys(section("### Inputs", text))
    for key in keys(section("### Of each tenant", text)):
        found += [key.replace("KEY", one) for one in whole] if key.endswith(".KEY") else [key]
    stands_for["OPTION"] = sorted({one.recorded or one.name for one in OPTIONS} - NOT_RECORDED)
    for name, values in stands_for.items():
        if name not in OPEN:
            found = [key.replace(name, value) for key in found for value in (values if name in key else [""])]
    return found


def _names(text: str) -> dict[str, str]:
    table = section("## Keys of a summary", text).split("\n###")[0]
    return dict(re.findall(r"^\| `([A-Z]+)` \| (.*?)(?: \(|;|:| \|$)", table, re.MULTILINE))


def paths(value: object, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Every key of a summary that holds a figure, a text, a list or null, as the page writes it."""
    if isinstance(value, Mapping) and path[:2] not in [("inputs", one) for one in NESTED]:
        for key, inner in value.items():
            yield from paths(inner, (*path, key))
        if not value and path:
            yield ".".join(path)
    else:
        yield ".".join(path)


NESTED = ("tenants", "slo_classes", "slo", "counts", "speculation", "prefix_cache_quota")  # options of several values


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The results of every run."""
    found = []
    for number, run in enumerate(RUNS):
        found.append(tmp_path_factory.mktemp("results") / str(number))
        assert main(["simulate", *f"{run} {COMMON}".split(), "--out", str(found[-1])]) == 0
    return found


def test_every_key_is_described_and_every_described_key_is_there(folders: list[Path]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    real = {path for folder in folders for path in paths(json.loads((folder / "summary.json").read_text()))}
    said = described(text)
    assert len(said) == len(set(said))
    patterns = {key: _pattern(key) for key in said}
    known = re.compile("|".join(patterns.values()))
    assert sorted(path for path in real if not known.fullmatch(path)) == []
    together = "\n".join(sorted(real))
    absent = [key for key, pattern in patterns.items() if not re.search(rf"^{pattern}$", together, re.MULTILINE)]
    assert sorted(absent) == []


def _pattern(key: str) -> str:
    escaped = re.escape(key)
    for name, pattern in OPEN.items():
        escaped = escaped.replace(name, pattern)
    return escaped


def test_every_column_is_described(folders: list[Path]) -> None:
    text = section("## Columns", PAGE.read_text(encoding="utf-8"))
    requests, series = text.split("| column of `series.parquet`")
    for name, table in (("requests", requests), ("series", series)):
        real = {column for folder in folders for column in pq.read_schema(folder / f"{name}.parquet").names}
        assert sorted(keys(table)) == sorted(real)


def test_a_comparison_has_what_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(
        ["compare", *f"--trace azure-2023-code {COMMON}".split(), "--policy", "full", "--policy", "quest", "--json"]
    )
    assert code == 0
    summary: dict[str, Any] = json.loads(capsys.readouterr().out)
    said = CODE.findall(section("### Of a comparison", PAGE.read_text(encoding="utf-8")))
    assert sorted(said) == sorted(summary)
    assert len(summary["runs"]) == 2
