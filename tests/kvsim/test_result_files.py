"""The result files: what is in them, where they stand, and that none is ever half-written."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from kvsim.report import written
from kvsim.report.written import write_held, write_results
from kvsim.results.files import holding
from kvsim.results.summary import Result, summarize
from kvsim.version import __version__

Make = Callable[..., Result]
FILES = {"summary.json", "requests.parquet", "series.parquet", "trace.perfetto.json", "report.html"}


@pytest.fixture(autouse=True)
def short_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "report_html", lambda results, **_: f"<p>{len(results)} results ≤ ∞</p>")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_one_result_gives_its_files_in_a_new_folder(make_result: Make, tmp_path: Path) -> None:
    result, out = make_result(), tmp_path / "deep" / "out"
    write_results([result], out, slo={"ttft_s": 2.0}, warmup_s=30.0)
    assert names(out) == FILES
    assert json.loads((out / "summary.json").read_text()) == summarize(result, {"ttft_s": 2.0}, 30.0)
    assert (out / "report.html").read_text(encoding="utf-8") == "<p>1 results ≤ ∞</p>"


def test_the_tables_hold_every_row_and_null_for_what_did_not_happen(make_result: Make, tmp_path: Path) -> None:
    result = make_result(tenants=("ö", "b"))
    write_results([result], tmp_path)
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
    write_results(results, tmp_path)
    folders = ["full", "shadowkv-budget_tokens=2048-rank=160", "full-2", "etc-Evil", "FULL-3", "run"]
    assert names(tmp_path) == {"summary.json", "report.html", *folders}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert sorted(summary) == [
        "inputs_sha256",
        "missing",
        "partial",
        "run_id",
        "runs",
        "schema_version",
        "version",
    ]
    assert (summary["partial"], summary["missing"]) == (False, [])
    for run, folder, result in zip(summary["runs"], folders, results, strict=True):
        assert names(tmp_path / folder) == FILES - {"report.html"}
        assert run == json.loads((tmp_path / folder / "summary.json").read_text()) == summarize(result)


def test_the_same_results_give_the_same_bytes(make_result: Make, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_results([make_result(seed=3)], tmp_path / folder)
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_failure_leaves_the_earlier_files_whole(
    make_result: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_results([make_result(seed=1)], tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in FILES}

    def interrupted(table: object, path: Path) -> None:
        path.write_bytes(b"half of a table")
        raise KeyboardInterrupt

    monkeypatch.setattr(parquet, "write_table", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_results([make_result(seed=2)], tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before
    assert [path.name for path in tmp_path.parent.glob(".kvsim-*")] == []


def test_a_file_in_the_way_is_named(make_result: Make, tmp_path: Path) -> None:
    file = tmp_path / "out"
    file.write_text("mine")
    for out in (file, file / "below"):
        with pytest.raises(ValueError, match=r"/out is a file; results need a folder, so choose another name for it"):
            write_results([make_result()], out)
    assert file.read_text() == "mine"


def test_a_folder_that_takes_no_files_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(**_: object) -> None:
        raise PermissionError(13, "Permission denied")  # what a user gets; root may write anywhere

    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    with (
        pytest.raises(ValueError, match="Permission denied; results need a folder that takes files"),
        holding(tmp_path / "new"),
    ):
        pytest.fail("the work has begun")
    assert names(tmp_path) == set()


def test_holding_leaves_nothing_but_the_folder(tmp_path: Path) -> None:
    with holding(tmp_path / "a" / "b"):
        pass
    assert names(tmp_path / "a" / "b") == set()


def test_folders_of_earlier_policies_go_and_what_is_not_ours_stays(make_result: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_results([make_result(policy=policy) for policy in ("full", "quest", "snapkv")], out)
    mine = {"notes.txt": "a", "quest/notes.txt": "b", "series.csv": "c", "snapkv.d": "d"}
    for name, text in mine.items():
        (out / name).write_text(text)
    (out / "link").symlink_to("notes.txt")
    write_results([make_result(policy=policy) for policy in ("full", "shadowkv")], out)
    assert names(out) == {"summary.json", "report.html", "full", "shadowkv", "quest", "link", *mine} - {
        "quest/notes.txt"
    }
    assert names(out / "quest") == {"notes.txt"}
    write_results([make_result()], out)
    assert names(out) == FILES | {"quest", "link", "notes.txt", "series.csv", "snapkv.d"}
    assert {name: (out / name).read_text() for name in mine} == mine
    assert (out / "link").readlink() == Path("notes.txt")


def test_files_of_another_program_are_not_taken_for_earlier_results(make_result: Make, tmp_path: Path) -> None:
    for text in ('{"runs": [{"inputs": {}}]}', "[" * 100_000, '{"mine": 1}', "no JSON"):
        (tmp_path / "summary.json").write_text(text)
        (tmp_path / "series.parquet").write_text("mine")
        write_results([make_result(policy=policy) for policy in ("full", "quest")], tmp_path)
        assert (tmp_path / "series.parquet").read_text() == "mine"
        assert names(tmp_path) == {"summary.json", "report.html", "full", "quest", "series.parquet"}
        (tmp_path / "series.parquet").unlink()


def test_all_files_of_a_set_share_its_identity(make_result: Make, tmp_path: Path) -> None:
    results = [make_result(policy=policy) for policy in ("full", "quest")]
    write_results(results, tmp_path / "two")
    write_results(results[:1], tmp_path / "one")
    two = json.loads((tmp_path / "two" / "summary.json").read_text())
    one = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert one["run_id"] == two["runs"][0]["run_id"]
    assert len({two["run_id"], *(run["run_id"] for run in two["runs"])}) == 3
    folders = [(tmp_path / "one", one), *((tmp_path / "two" / run["inputs"]["policy"], run) for run in two["runs"])]
    for folder, run in folders:
        own = {name: run[name] for name in ("run_id", "inputs_sha256", "version")}
        assert own["version"] == __version__
        for name in ("requests.parquet", "series.parquet"):
            metadata = parquet.read_schema(folder / name).metadata
            assert {key.decode(): value.decode() for key, value in metadata.items()} == own
        assert own.items() <= json.loads((folder / "trace.perfetto.json").read_text())["otherData"].items()


def test_an_id_tells_results_apart_and_not_their_timing(make_result: Make) -> None:
    first = summarize(make_result())
    assert summarize(make_result(wall_s=9.0, cpu_s=8.0, setup_cpu_s=7.0))["run_id"] == first["run_id"]
    for other in (make_result(partial=True), make_result(makespan_s=651.0)):
        found = summarize(other)
        assert found["run_id"] != first["run_id"]
        assert found["inputs_sha256"] == first["inputs_sha256"]
    assert summarize(make_result(policy="quest"))["inputs_sha256"] != first["inputs_sha256"]


def test_what_is_no_number_is_null(make_result: Make, tmp_path: Path) -> None:
    write_results([make_result(busy={"compute": np.nan, "hbm": np.inf}, makespan_s=float("nan"))], tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert (summary["makespan_s"], summary["busy"]) == (None, {"compute": None, "hbm": None})


def test_what_was_left_no_time_is_missing(make_result: Make, tmp_path: Path) -> None:
    with holding(tmp_path) as folder:
        write_held([make_result(partial=True)], folder, missing=["quest"])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["partial"], summary["missing"], len(summary["runs"])) == (True, ["quest"], 1)
    assert summary["runs"][0]["partial"]
    assert names(tmp_path) == {"summary.json", "report.html", "full"}
    write_results([make_result()], tmp_path)
    assert names(tmp_path) == FILES


def test_what_is_in_the_way_is_named_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    for policies in ([], ["full", "quest"]):
        with (
            pytest.raises(ValueError, match=r"report\.html is in the way: results need a file"),
            holding(tmp_path, policies),
        ):
            pytest.fail("the work has begun")
    (tmp_path / "report.html").rmdir()
    (tmp_path / "quest").symlink_to(tmp_path.parent)
    with (
        pytest.raises(ValueError, match=r"quest is in the way: .* move it elsewhere"),
        holding(tmp_path, ["full", "quest"]),
    ):
        pytest.fail("the work has begun")
    with holding(tmp_path, ["full"]):
        pass


def test_no_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are 0 results to write; a report needs at least 1"):
        write_results([], tmp_path)
