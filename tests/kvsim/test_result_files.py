"""The result files: what is in them, where they stand, and that none is ever half-written."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from kvsim import result_files
from kvsim.result_files import prepare, write
from kvsim.results import Result, summarize

Make = Callable[..., Result]
FILES = {"summary.json", "requests.parquet", "series.parquet", "trace.perfetto.json", "report.html"}


@pytest.fixture(autouse=True)
def short_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_files, "report_html", lambda results, **_: f"<p>{len(results)} results ≤ ∞</p>")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_one_result_gives_its_files_in_a_new_folder(make_result: Make, tmp_path: Path) -> None:
    result, out = make_result(), tmp_path / "deep" / "out"
    write([result], out, slo={"ttft_s": 2.0}, warmup_s=30.0)
    assert names(out) == FILES
    assert json.loads((out / "summary.json").read_text()) == summarize(result, {"ttft_s": 2.0}, 30.0)
    assert (out / "report.html").read_text(encoding="utf-8") == "<p>1 results ≤ ∞</p>"


def test_the_tables_hold_every_row_and_null_for_what_did_not_happen(make_result: Make, tmp_path: Path) -> None:
    result = make_result(tenants=("ö", "b"))
    write([result], tmp_path)
    requests = parquet.read_table(tmp_path / "requests.parquet").to_pydict()
    assert requests["tenant"][:3] == ["ö", "b", "ö"]
    rejected = [index for index, status in enumerate(requests["status"]) if status == "rejected"]
    assert [index for index, time_s in enumerate(requests["ttft_s"]) if time_s is None] == rejected
    for name, values in result.requests.items():
        if values.dtype.kind != "U":
            stored = np.array([np.nan if value is None else value for value in requests[name]])
            np.testing.assert_array_equal(stored, values)
    waited = np.array(requests["ttft_s"][:10]) + np.array(requests["arrival_s"][:10])
    np.testing.assert_allclose(waited, requests["first_token_s"][:10])
    series = parquet.read_table(tmp_path / "series.parquet")
    assert series.column_names == list(result.series)
    np.testing.assert_array_equal(series["hbm_bytes"].to_numpy(), result.series["hbm_bytes"])


def test_several_results_get_a_folder_each_and_one_report(make_result: Make, tmp_path: Path) -> None:
    policies = ["full", "shadowkv:budget_tokens=2048,rank=160", "full", "../../etc:Evil", "FULL", "…"]
    results = [make_result(policy=policy, seed=seed) for seed, policy in enumerate(policies)]
    write(results, tmp_path)
    folders = ["full", "shadowkv-budget_tokens=2048-rank=160", "full-2", "etc-Evil", "FULL-3", "run"]
    assert names(tmp_path) == {"summary.json", "report.html", *folders}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert sorted(summary) == ["runs", "schema_version"]
    for run, folder, result in zip(summary["runs"], folders, results, strict=True):
        assert names(tmp_path / folder) == FILES - {"report.html"}
        assert run == json.loads((tmp_path / folder / "summary.json").read_text()) == summarize(result)


def test_the_same_results_give_the_same_bytes(make_result: Make, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write([make_result(seed=3)], tmp_path / folder)
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_failure_leaves_the_earlier_files_whole(
    make_result: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write([make_result(seed=1)], tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in FILES}

    def interrupted(table: object, path: Path) -> None:
        path.write_bytes(b"half of a table")
        raise KeyboardInterrupt

    monkeypatch.setattr(parquet, "write_table", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write([make_result(seed=2)], tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def test_a_file_in_the_way_is_named(make_result: Make, tmp_path: Path) -> None:
    file = tmp_path / "out"
    file.write_text("mine")
    for out in (file, file / "below"):
        with pytest.raises(ValueError, match=r"/out is a file; results need a folder, so choose another name for it"):
            write([make_result()], out)
    assert file.read_text() == "mine"


def test_a_folder_that_takes_no_files_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(**_: object) -> None:
        raise PermissionError(13, "Permission denied")  # what a user gets; root may write anywhere

    monkeypatch.setattr(result_files.tempfile, "TemporaryFile", denied)
    with pytest.raises(ValueError, match="Permission denied; results need a folder that takes files"):
        prepare(tmp_path)


def test_preparing_leaves_nothing_but_the_folder(tmp_path: Path) -> None:
    prepare(tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == set()


def test_no_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are 0 results to write; a report needs at least 1"):
        write([], tmp_path)
