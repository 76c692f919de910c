"""`kvsim observe` against a real server on this machine: what it records, what it sends, and every way to fail."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from openai_server import Fault, Server, even, serving

from kvsim.__main__ import main
from kvsim.observed.address import address
from kvsim.observed.stream import Answer, NonsenseError

WORKLOAD = "synthetic:rate=40,prompt=fixed:30,output=fixed:5"


def observe(server: Server | str, out: Path, *more: str, trace: str = WORKLOAD, requests: int = 8) -> int:
    url = server if isinstance(server, str) else server.url
    words = ["observe", url, "--trace", trace, "--limit", str(requests), "--out", str(out), *more]
    return main(words)


def records(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    head, *lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    return head, lines


def test_latencies_are_those_of_the_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "seen.jsonl"
    with serving(even(0.1, 0.02)) as server:
        assert observe(server, out, "--token-times") == 0
    head, lines = records(out)
    assert head["url"] == f"{server.url}/v1"
    assert head["model"] == "tiny"
    assert sorted(line["request"] for line in lines) == list(range(8))
    for line in lines:
        assert line["status"] == "finished"
        assert (line["prompt_tokens"], line["output_tokens"]) == (30, 5)
        # No sooner than the server was told to, and on a busy machine not much later.
        assert 0.099 <= line["first_token_s"] - line["sent_s"] <= 1.0
        assert 0.07 <= line["last_token_s"] - line["first_token_s"] <= 1.0
        assert len(line["token_s"]) == 5
        assert line["token_s"] == sorted(line["token_s"])
    assert "8 of 8 requests finished" in capsys.readouterr().out


def test_requests_are_sent_when_the_trace_says(tmp_path: Path) -> None:
    out = tmp_path / "seen.jsonl"
    with serving(even(0.3, 0)) as server:  # answers do not hold up what comes after them
        assert observe(server, out, "--rate", "20", requests=6) == 0
    _, lines = records(out)
    lines.sort(key=lambda line: line["request"])
    assert lines[0]["due_s"] == 0
    assert lines[-1]["due_s"] == pytest.approx(5 / 20)  # five gaps at 20 requests/s
    assert max(line["sent_s"] - line["due_s"] for line in lines) < 0.3  # one after the other would be 0.3 s apart


def test_prompts_begin_alike_where_those_of_the_trace_do(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 1300, "output_length": 2, "hash_ids": [7, 8, 9]},
        {"timestamp": 10, "input_length": 1100, "output_length": 2, "hash_ids": [7, 8, 4]},
        {"timestamp": 20, "input_length": 1100, "output_length": 2, "hash_ids": [5, 6, 3]},
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with serving(even(0.01, 0)) as server:
        assert observe(server, tmp_path / "seen.jsonl", trace=str(trace), requests=3) == 0
    one, two, other = sorted((body["prompt"] for body in server.bodies), key=lambda ids: (-len(ids), ids[:1]))
    if two[:1024] != one[:1024]:
        two, other = other, two
    assert len(one) == 1300
    assert one[:1024] == two[:1024]
    assert one[1024:1100] != two[1024:1100]
    assert one[:512] != other[:512]


def test_what_is_sent_is_what_engines_take(tmp_path: Path) -> None:
    with serving(even(0.01, 0)) as server:
        assert observe(server, tmp_path / "a.jsonl", requests=1) == 0
        assert observe(server, tmp_path / "b.jsonl", "--endpoint", "chat", "--no-exact", requests=1) == 0
        assert observe(server, tmp_path / "c.jsonl", "--text", "--model", "tiny", requests=1) == 0
    plain, chat, text = server.bodies
    assert plain["stream"] is True
    assert plain["stream_options"] == {"include_usage": True}
    assert (plain["max_tokens"], plain["min_tokens"], plain["ignore_eos"]) == (5, 5, True)
    assert [type(token) for token in plain["prompt"]] == [int] * 30
    assert "ignore_eos" not in chat
    assert len(chat["messages"][0]["content"].split()) == 30
    assert len(text["prompt"].split()) == 30
    posted = [path for path in server.paths if path != "/v1/models"]
    assert posted == ["/v1/completions", "/v1/chat/completions", "/v1/completions"]
    assert not any("authorization" in {name.lower() for name in headers} for headers in server.headers)


def test_no_proxy_key_or_redirect_that_was_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(even(0.01, 0)) as other, socket.socket() as trap:
        trap.bind(("127.0.0.1", 0))
        trap.listen()
        trap.settimeout(0.2)
        proxy = f"http://127.0.0.1:{trap.getsockname()[1]}"
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        with serving(even(0.01, 0), faults=lambda number: Fault("redirect", f"{other.url}/v1/completions")) as server:
            assert observe(server, tmp_path / "seen.jsonl", requests=3) == 2
        with pytest.raises(TimeoutError):
            trap.accept()
    assert not other.paths  # nothing went where the server pointed
    assert len(server.bodies) == 3
    assert not any("secret" in str(headers) for headers in server.headers)
    assert "not followed" in capsys.readouterr().err


def test_a_key_and_a_proxy_are_used_where_they_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    with serving(even(0.01, 0)) as proxy:  # it sees the whole URL, as a proxy does
        words = ("--api-key-env", "MY_KEY", "--proxy", proxy.url, "--model", "tiny")
        assert observe("http://example.invalid:8000", tmp_path / "seen.jsonl", *words, requests=1) == 0
    assert proxy.paths == ["http://example.invalid:8000/v1/models", "http://example.invalid:8000/v1/completions"]
    assert proxy.headers[0]["Authorization"] == "Bearer secret"
    assert "secret" not in (tmp_path / "seen.jsonl").read_text(encoding="utf-8")


FAULTS = {
    "nonsense": ("nonsense", "where an event was due"),
    "plain": ("nonsense", "where an event was due"),
    "break": ("nonsense", "broke off before its end"),
    "flood": ("nonsense", "a line of more than"),
    "error": ("nonsense", "out of memory"),
    "refuse": ("http", "HTTP 503: 'overloaded'"),
    "hang": ("timeout", "nothing came for 0.3 s"),
    "stall": ("timeout", "nothing came for 0.3 s"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_said_and_recorded(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, words = FAULTS[kind]
    out = tmp_path / "seen.jsonl"
    with serving(even(0.01, 0), faults=lambda _number: Fault(kind)) as server:
        assert observe(server, out, "--stall-timeout", "300ms", requests=2) == 2
    told = capsys.readouterr().err
    assert "no request finished" in told
    assert words in told
    assert "\x1b" not in told
    _, lines = records(out)
    assert [line["status"] for line in lines] == [status] * 2
    assert all(words in line["error"] for line in lines)


def test_a_whole_answer_that_takes_too_long_ends(tmp_path: Path) -> None:
    out = tmp_path / "seen.jsonl"
    with serving(even(0.05, 0.1)) as server:
        assert observe(server, out, "--request-timeout", "250ms", requests=1) == 2
    _, (line,) = records(out)
    assert line["status"] == "timeout"
    assert line["first_token_s"] is not None  # what came by then is kept


def test_some_failures_leave_partial_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "seen.jsonl"
    with serving(even(0.01, 0), faults=lambda number: Fault("refuse") if number % 2 else None) as server:
        assert observe(server, out) == 0
    assert "4 requests failed: the results are partial; most often: HTTP 503" in capsys.readouterr().err


def test_it_gives_up_on_a_server_that_has_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "seen.jsonl"
    trace = "synthetic:rate=300,prompt=fixed:5,output=fixed:1"
    with serving(even(0, 0), faults=lambda number: Fault("refuse") if number else None) as server:
        assert observe(server, out, trace=trace, requests=600) == 2
    assert "gave up after 50 failures in a row" in capsys.readouterr().err
    assert len(records(out)[1]) < 600


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (Fault("hang"), "nothing came for 0.3 s"),
        (Fault("nonsense"), "where a list of models was due"),
        (Fault("refuse"), "HTTP 503"),
        (Fault("redirect", "http://example.invalid/"), "not followed"),
        (("one", "two"), "serves 2 models"),
        (None, "does not say what it serves"),
    ],
)
def test_a_server_that_is_none_is_told_before_anything_is_written(
    models: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "seen.jsonl"
    with serving(even(0.01, 0), models=models) as server:
        assert observe(server, out, "--stall-timeout", "300ms", "--connect-timeout", "2s") == 2
    told = capsys.readouterr().err
    assert words in told
    assert not out.exists()
    assert not server.bodies


def test_a_list_of_models_may_be_missing_where_one_is_named(tmp_path: Path) -> None:
    with serving(even(0.01, 0), models=None) as server:
        assert observe(server, tmp_path / "seen.jsonl", "--model", "own", requests=1) == 0
    assert server.bodies[0]["model"] == "own"


def test_nobody_listens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    assert observe(url, tmp_path / "seen.jsonl") == 2
    assert "no connection" in capsys.readouterr().err


def test_answers_without_counts_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(even(0.01, 0), usage=False) as server:
        assert observe(server, tmp_path / "seen.jsonl", requests=2) == 0
    assert "did not count the tokens (usage) of 2 requests" in capsys.readouterr().err


def test_an_interruption_keeps_records(tmp_path: Path) -> None:
    out = tmp_path / "seen.jsonl"
    with serving(lambda number, _prompt, output: [0.01 if number < 3 else 30.0] * output) as server:
        words = [sys.executable, "-m", "kvsim", "observe", server.url, "--trace", WORKLOAD, "--limit", "6"]
        process = subprocess.Popen([*words, "--out", str(out)], stderr=subprocess.PIPE, text=True)
        deadline_s = time.monotonic() + 30
        while len(server.bodies) < 6 and time.monotonic() < deadline_s:
            time.sleep(0.05)
        time.sleep(0.3)
        os.kill(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in told
    assert "Traceback" not in told
    _, lines = records(out)
    assert sorted(line["status"] for line in lines) == ["finished"] * 3 + ["interrupted"] * 3


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["ftp://host"], "no URL of http or https"),
        (["localhost:8000"], "no URL of http or https"),
        (["http://"], "no URL of http or https"),
        (["http://user:secret@host"], "leave it out"),
        (["http://host/v1?x=1"], "a query or a fragment"),
        (["http://host:99999"], "is no URL"),
        (["http://h", "--stall-timeout", "0s"], "must be above 0"),
        (["http://h", "--rate", "0"], "must be from 1e-06"),
        (["http://h", "--rate", "1", "--rate-scale", "2"], "give one of them"),
        (["http://h", "--proxy", "nowhere"], "no URL of http or https"),
        (["http://h", "--api-key-env", "KVSIM_NO_SUCH_KEY"], "has no key under that name"),
        (["http://h", "--out", "records.json"], "must end in .jsonl"),
    ],
)
def test_what_is_asked_wrongly_is_told(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = [] if "--out" in words else ["--out", "never.jsonl"]
    assert main(["observe", *words, "--trace", WORKLOAD, *out]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "secret" not in error


def test_a_file_that_exists_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "seen.jsonl"
    out.write_text("mine", encoding="utf-8")
    with serving(even(0.01, 0)) as server:
        assert observe(server, out) == 2
    assert "left as it is" in capsys.readouterr().err
    assert out.read_text(encoding="utf-8") == "mine"
    assert not server.bodies


def test_a_full_disk_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was written before is whole."""
    from kvsim.observed.record import RecordFile

    keep, kept = RecordFile.keep, []

    def full(self: RecordFile, record: Any) -> None:
        if len(kept) == 3:
            raise OSError(28, "No space left on device")
        kept.append(record)
        keep(self, record)

    monkeypatch.setattr(RecordFile, "keep", full)
    out = tmp_path / "seen.jsonl"
    with serving(even(0.01, 0)) as server:
        assert observe(server, out) == 2
    assert "No space left on device; it has the requests that ended before" in capsys.readouterr().err
    assert len(records(out)[1]) == 3


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://host:8000", "http://host:8000/v1"),
        ("http://host:8000/", "http://host:8000/v1"),
        ("https://host/v1/", "https://host/v1"),
        ("https://host/api/openai/v1/chat/completions", "https://host/api/openai/v1"),
        ("http://[::1]:80", "http://[::1]:80/v1"),
    ],
)
def test_addresses(url: str, base: str) -> None:
    assert address(url).base == base


def test_a_stream_is_read_however_it_is_cut() -> None:
    stream = (
        b': ping\r\n\r\ndata: {"choices": [{"text": "\\u00e9", "finish_reason": null}]}\r\n\r\n'
        b'data: {"choices": [{"text": "", "finish_reason": "stop"}]}\n\n'
        b'data: {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2, '
        b'"prompt_tokens_details": {"cached_tokens": 4}}}\n\ndata: [DONE]\n\n'
    )
    for size in (1, 7, len(stream)):
        answer = Answer(chat=False)
        for at in range(0, len(stream), size):
            answer.feed(stream[at : at + size], float(at))
        answer.check_whole()
        assert (answer.prompt_tokens, answer.output_tokens, answer.cached_tokens) == (9, 2, 4)
        assert len(answer.token_s) == 2


@pytest.mark.parametrize("line", [b"data: {", b"data: 7", b"data: [[[", b'data: {"usage": {"prompt_tokens": -1}}'])
def test_a_stream_of_something_else_is_refused(line: bytes) -> None:
    with pytest.raises(NonsenseError):
        Answer(chat=False).feed(line + b"\n", 0.0)
