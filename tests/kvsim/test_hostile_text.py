"""Text of a trace, a file or a flag that would steer a terminal, be read as markup, or fill a screen."""

import io
import json
import sys
from collections.abc import Callable
from html import escape
from pathlib import Path

import pytest

from kvsim.__main__ import main
from kvsim.cli.output import print_facts, print_table
from kvsim.report.report import report_html
from kvsim.results.summary import Result
from kvsim.text.printable import brief, printable

RED, TITLE, BELL, TURN = "\x1b[31mred\x1b[0m", "\x1b]0;owned\x07", "\x07", "\u202egnp.exe"
HOSTILE = (RED, TITLE, BELL, TURN, "\x9b31m", "\r\x1b[2K", "\u2066x\u2069", "\U000e0041", "\ud800")
MARKUP = "[red]not red[/red][link=https://example.invalid]x[/link] :smile:"


@pytest.mark.parametrize("text", HOSTILE)
def test_what_steers_a_terminal_is_written_out(text: str) -> None:
    shown = printable(f"a{text}b")
    assert all(character.isprintable() for character in shown)
    assert shown.startswith("a")
    assert shown.encode().decode("unicode_escape") == f"a{text}b"  # nothing is lost


def test_other_writing_stays_as_it_is() -> None:
    text = "naïve 日本語 עברית हिन्दी \u0645\u06cc\u200c\u062e \U0001f469\u200d\U0001f4bb"
    assert printable(text) == text
    assert printable("one\n\ttwo\x1b", layout=True) == "one\n\ttwo\\x1b"


@pytest.mark.parametrize("length", [10, 99, 100, 101, 10_000])
def test_a_long_text_keeps_both_ends(length: int) -> None:
    text = "b" + "x" * (length - 2) + "e"
    assert len(brief(text, 100)) <= 100
    assert (brief(text, 100)[0], brief(text, 100)[-1]) == ("b", "e")
    assert (brief(text, 100) == text) == (length <= 100)


@pytest.mark.parametrize("text", [*HOSTILE[:-1], MARKUP])
def test_tables_and_facts(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_table({text: "left", "n": "right"}, [[text, "1"]])
    print_facts(text, {text: text})
    out, _ = capsys.readouterr()
    assert out.count(printable(text)) == 5
    assert all(character.isprintable() or character == "\n" for character in out)


@pytest.mark.parametrize("text", [*HOSTILE, MARKUP, "x" * 10_000, "y " * 5000])
@pytest.mark.parametrize(
    "args",
    [
        ("explain", "--model"),
        ("explain", "--gpu"),
        ("explain", "--policy"),
        ("explain", "--context"),
        ("explain", "--tp"),
        ("simulate", "--trace"),
        ("simulate", "--scenario"),
        ("simulate", "--slo"),
        ("trace", "info"),
        ("hardware", "show"),
        ("model", "show"),
        (),
    ],
)
def test_an_error_names_a_value_without_obeying_it(
    args: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*args, text]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert all(character.isprintable() for character in err[:-1])
    assert len(err) <= 600


def hostile_trace(folder: Path) -> Path:
    path = folder / f"{RED}.jsonl"
    rows = [
        {"arrived_at": n, "num_prefill_tokens": 9, "num_decode_tokens": 2, "tenant": tenant, TITLE: 0, "\ud800": 0}
        for n, tenant in enumerate((RED, TURN, MARKUP, "<script>alert(1)</script>", "t" * 900))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_hostile_trace_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "info", str(hostile_trace(tmp_path))]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert all(character.isprintable() or character == "\n" for character in out)
    assert MARKUP in out
    assert printable(TITLE) in out
    assert max(map(len, out.splitlines())) < 1000


def test_a_name_that_standard_output_cannot_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens,tenant\n0,5,7,日本\n1,5,7,b\n", encoding="utf-8")
    ascii_only = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(ascii_only, encoding="ascii"))
    assert main(["trace", "info", str(path)]) == 0
    assert b"\\u65e5\\u672c" in ascii_only.getvalue()


def test_a_page_shows_tags_and_runs_none(make_result: Callable[..., Result]) -> None:
    bad = "<img src=x onerror=alert(1)>"
    result = make_result(tenants=(bad, "</script><script>alert(2)</script>", "plain"), policy=f"full {bad}")
    result.inputs["trace"], result.inputs["trace_notes"] = bad, [bad]
    page = report_html([result, make_result(policy="quest")])
    assert bad not in page
    assert escape(bad) in page
    assert "</script><script>alert(2)" not in page
