"""`kvsim trace` against published statistics, and against the files that it writes."""

import json
from pathlib import Path

import numpy as np
import pytest

import traces
from kvsim.__main__ import main
from traces.synthetic import Tenant, synthesize

CHAT = "name=chat,rate=2,prompt=fixed:1000,output=fixed:10,prefix=1024"


def out_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Standard output of a command that must succeed and say nothing else."""
    code = main(args)
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def error_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line of a command that must fail for bad input, without its newline."""
    code = main(args)
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    return err.removesuffix("\n")


def test_list_names_every_bundled_trace_and_its_licence(capsys: pytest.CaptureFixture[str]) -> None:
    listed = json.loads(out_of(capsys, "trace", "list", "--json"))
    assert listed["schema_version"] == 1
    names = {trace["name"] for trace in listed["traces"]}
    assert names >= {"mooncake-conversation", "mooncake-synthetic", "azure-2023-code", "azure-2023-conv"}
    assert names >= {"agentic-coding", "servegen-deepseek-r1"}
    assert all(trace["licence"] and trace["attribution"] for trace in listed["traces"])
    table = out_of(capsys, "trace", "list")
    assert all(name in table for name in names)


def test_info_has_the_published_figures(capsys: pytest.CaptureFixture[str]) -> None:
    # Of the conversation trace of Mooncake (FAST 2025); counts of its 12,031 published rows.
    info = json.loads(out_of(capsys, "trace", "info", "mooncake-conversation", "--json", "--lru", "1k,288500"))
    assert info["schema_version"] == 1
    assert (info["requests"], info["block_tokens"]) == (12_031, 512)
    assert (info["prompt_tokens"], info["output_tokens"]) == (144_793_823, 4_122_048)
    assert info["infinite_cache_hit_ratio"] == pytest.approx(0.3664, abs=5e-5)
    # A cache with room for every access never evicts.
    assert info["lru_hit_ratio"]["288500"] == info["infinite_cache_hit_ratio"]
    assert 0 < info["lru_hit_ratio"]["1000"] < info["infinite_cache_hit_ratio"]


def test_info_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    out = out_of(capsys, "trace", "info", "mooncake-conversation", "--lru", "10000")
    assert "12,031" in out
    assert "36.64%" in out
    assert "LRU of 10,000" in out


def test_limit_takes_the_first_requests(capsys: pytest.CaptureFixture[str]) -> None:
    info = json.loads(out_of(capsys, "trace", "info", "mooncake-conversation", "--limit", "1k", "--json"))
    first = traces.load("mooncake-conversation").head(1000)
    assert info["requests"] == 1000
    assert info["prompt_tokens"] == first.prompt_tokens.sum()


def test_figures_that_a_trace_cannot_give_are_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "one.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,5,7\n", encoding="utf-8")
    info = json.loads(out_of(capsys, "trace", "info", str(path), "--lru", "1", "--json"), parse_constant=pytest.fail)
    assert (info["prompt_tokens"], info["output_tokens"]) == (5, 7)
    assert (info["rate_rps"], info["infinite_cache_hit_ratio"], info["lru_hit_ratio"]) == (None, None, {"1": None})
    assert "no block ids" in out_of(capsys, "trace", "info", str(path), "--lru", "1")


def test_bad_rows_are_refused_or_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,5,7\n1,-5,7\n", encoding="utf-8")
    error = error_of(capsys, "trace", "info", str(path))
    assert error.startswith(f"error: {path}:3: num_prefill_tokens=-5: ")
    info = json.loads(out_of(capsys, "trace", "info", str(path), "--skip-bad-rows", "--json"))
    assert (info["requests"], info["skipped_rows"]) == (1, 1)
    assert "skipped rows" in out_of(capsys, "trace", "info", str(path), "--skip-bad-rows")


def test_convert_keeps_every_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "head.parquet"
    assert out_of(capsys, "trace", "convert", "mooncake-conversation", str(path), "--limit", "500") == ""
    written, source = traces.load(str(path)), traces.load("mooncake-conversation", limit=500)
    for column in ("arrival_s", "prompt_tokens", "output_tokens", "block_ids", "block_offsets"):
        assert np.array_equal(getattr(written, column), getattr(source, column)), column


def test_a_file_is_replaced_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.csv"
    path.write_text("precious", encoding="utf-8")
    command = ("trace", "convert", "azure-2023-code", str(path), "--limit", "10")
    assert "exists already" in error_of(capsys, *command)
    assert path.read_text(encoding="utf-8") == "precious"
    out_of(capsys, *command, "--overwrite")
    assert len(traces.load(str(path))) == 10


def test_synth_writes_what_the_generator_makes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "synth.parquet"
    code = "name=code,rate=1,prompt=fixed:3000,output=fixed:20"
    command = ("trace", "synth", "--tenant", CHAT, "--tenant", code, "--duration", "5m", "--seed", "7")
    assert out_of(capsys, *command, "--out", str(path)) == ""
    # Every default of the command is the generator's.
    expected = synthesize([Tenant.parse(CHAT), Tenant.parse(code)], duration_s=300, seed=7)
    written = traces.load(str(path))
    assert len(written) == len(expected) > 0
    assert written.tenants == expected.tenants
    for column in ("prompt_tokens", "output_tokens", "tenant", "block_offsets"):
        assert np.array_equal(getattr(written, column), getattr(expected, column)), column
    table = out_of(capsys, "trace", "info", str(path))
    assert "chat" in table
    assert "code" in table


def test_synth_counts_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "synth.jsonl.gz"
    out_of(capsys, "trace", "synth", "--tenant", CHAT, "--requests", "0.25k", "--out", str(path))
    assert len(traces.load(str(path))) == 250


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["info", "mooncake-conversatoin"],
            "error: unknown trace 'mooncake-conversatoin'; known, nearest first: mooncake",
        ),
        (["info", "azure-2023-code", "--lru", "0"], "error: LRU capacity_blocks=0: must be at least 1 block"),
        (["info", "azure-2023-code", "--lru", "1,x"], "error: token count 'x' is not a finite number >= 0"),
        (["info", "azure-2023-code", "--lru", ""], "error: token count '' is not a finite number >= 0"),
        (["info", "azure-2023-code", "--limit", "-1"], "error: Invalid value for '--limit': token count '-1' is not"),
        (["info", "azure-2023-code", "--limit", "0"], "error: limit=0: must be at least 1 request"),
        (["synth", "--tenant", CHAT, "--out", "x.csv"], "error: duration_s=None and n_requests=None: give exactly one"),
        (["synth", "--tenant", "name=a", "--requests", "5", "--out", "x.csv"], "error: tenant 'name=a': rate missing"),
        (["synth", "--requests", "5", "--out", "x.csv"], "error: Missing option '--tenant'."),
        (
            ["synth", "--tenant", CHAT, "--duration", "5M", "--out", "x.csv"],
            "error: Invalid value for '--duration': dur",
        ),
        (["convert", "azure-2023-code", "x.doc"], "error: x.doc: unknown file type; use one of .jsonl"),
    ],
)
def test_bad_input_is_one_line(
    args: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert error_of(capsys, "trace", *args).startswith(message)
    assert list(tmp_path.iterdir()) == []
