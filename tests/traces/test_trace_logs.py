"""Request logs, benchmark results and spans of real servers' formats (made-up requests) as traces."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest

import traces
from kvsim.__main__ import main
from traces import TraceError
from traces.log_text import without_text

LOGS = Path(__file__).parent / "logs"
# (file and options) -> arrivals in s, prompt tokens, output tokens, rows skipped with --skip-bad-rows
LOADED = {
    # 23:59:59 on New Year's Eve, 00:00:01 after it: two seconds, whatever the year.
    "vllm_info.log:output=max_tokens": ([0.0, 2.0], [5, 2], [16, 32], 1),
    # 30 characters at 4 a token: 7.5, rounded up.
    "vllm_info.log:output=max_tokens,chars_per_token=4": ([0.0, 2.0, 5.0], [5, 2, 8], [16, 32, 8], 0),
    # Two deltas of one and two tokens; a stream that says its total; an aborted request without output.
    "vllm_debug.log": ([0.0, 1.0, 4.0], [3, 2, 1], [4, 3, 6], 1),
    "vllm_debug.log:output=max_tokens": ([0.0, 1.0, 4.0, 7.0], [3, 2, 1, 4], [100, 100, 100, 64], 0),
    "sglang_text.log": ([0.0, 2.0], [40, 900], [64, 3], 1),
    # From 1779262961.5 to 1779262962.640887 s.
    "sglang_target.log": ([0.0, 1.140887], [12, 32472], [7, 23297], 0),
    "sglang_json.log": ([0.0, 0.5], [9, 17], [30, 5], 1),
    "otel_spans.jsonl": ([0.0, 0.5], [7, 1200], [2, 30], 0),
}
RUN = {
    "request_rate": "inf",
    "burstiness": 1.0,
    "max_concurrency": 2,
    "completed": 3,
    "total_input_tokens": 60,
    "total_output_tokens": 6,
    "input_lens": [10, 20, 30],
    "output_lens": [1, 2, 3],
    "ttfts": [0.5, 1.0, 0.25],
    "itls": [[], [0.5], [0.25, 0.25]],
    "generated_texts": ["a", "b", "c"],
}


@pytest.fixture
def saved(tmp_path):
    """A function that saves benchmark runs, changed as told, to a file and gives its name."""

    def save(*changes, name="bench.json", separator="\n"):
        (tmp_path / name).write_text(separator.join(json.dumps(RUN | change) for change in changes))
        return str(tmp_path / name)

    return save


@pytest.mark.parametrize("text", LOADED)
def test_logs_become_traces(text):
    arrival_s, prompt, output, skipped = LOADED[text]
    trace = traces.load(str(LOGS / text), skip_bad_rows=True)
    np.testing.assert_allclose(trace.arrival_s, arrival_s, rtol=0, atol=1e-6)
    assert trace.prompt_tokens.tolist() == prompt
    assert trace.output_tokens.tolist() == output
    assert trace.skipped_rows == skipped


@pytest.mark.parametrize("text", LOADED)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_convert_keeps_the_requests_and_no_text(text, suffix, tmp_path, capsys):
    target = tmp_path / f"trace{suffix}"
    assert main(["trace", "convert", str(LOGS / text), str(target), "--skip-bad-rows"]) == 0
    trace, again = traces.load(str(LOGS / text), skip_bad_rows=True), traces.load(str(target))
    for column in ("arrival_s", "prompt_tokens", "output_tokens"):
        np.testing.assert_array_equal(getattr(again, column), getattr(trace, column))
    assert capsys.readouterr().out == ""
    written = {word for row in target.read_text().splitlines()[:1] for word in re.findall(r"[A-Za-z_]+", row)}
    assert written <= {
        "arrived_at",
        "num_prefill_tokens",
        "num_decode_tokens",
        "timestamp",
        "input_length",
        "output_length",
    }


def test_info_counts_what_was_skipped(capsys):
    assert main(["trace", "info", str(LOGS / "vllm_debug.log"), "--skip-bad-rows", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["requests"], info["skipped_rows"]) == (3, 1)
    assert (info["prompt_tokens"], info["output_tokens"]) == (6, 13)
    assert info["notes"] == ["time 0 is 05-21 00:19:06 by the server's clock; the log has no year, zone or fraction"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vllm_info.log", r"vllm_info\.log:3: output_token_ids=None: the request's finish line, which lists its tok"),
        ("vllm_info.log:output=max_tokens", r"vllm_info\.log:8: prompt_token_ids=None: must list all tokens of the p"),
        ("vllm_info.log:output=guess", r"output=guess: must be one of generated, max_tokens"),
        ("vllm_info.log:chars_per_token=-1", r"chars_per_token=-1\.0: must be finite and not negative"),
        ("vllm_info.log:spread_s=nan,output=max_tokens,chars_per_token=4", r"spread_s=nan: must be finite"),
        ("vllm_info.log:chars=4", r"unknown trace option key 'chars'; known, nearest first: chars_per_token"),
        ("vllm_debug.log", r"vllm_debug\.log:16: output_token_ids=None: the request's finish line"),
        ("sglang_text.log", r"sglang_text\.log:9: completion_tokens=None: the request's finish line is missing"),
        ("sglang_json.log", r"sglang_json\.log:6: completion_tokens=None: the request's finish line is missing or cut"),
        ("sglang_text.log:output=max_tokens", r"unknown trace option key 'output'; known, nearest first: spread_s"),
        ("otel_spans.jsonl:run=1", r"takes no options, got 'run'"),
    ],
)
def test_what_a_log_does_not_say_is_named(text, message):
    with pytest.raises(TraceError, match=message):
        traces.load(str(LOGS / text))


def test_a_cut_list_of_prompt_tokens_is_no_length(tmp_path):
    text = (LOGS / "vllm_info.log").read_text().replace("max_log_len=None", "max_log_len=5")
    (tmp_path / "cut.log").write_text(text)
    with pytest.raises(TraceError, match=r"cut\.log:3: prompt_token_ids=None: .*without --max-log-len"):
        traces.load(f"{tmp_path}/cut.log:output=max_tokens")
    trace = traces.load(f"{tmp_path}/cut.log:output=max_tokens,chars_per_token=4", skip_bad_rows=True)
    assert (trace.prompt_tokens.tolist(), trace.skipped_rows) == ([2], 2)  # the prompts were cut to 5 characters too


def test_dates_that_do_not_exist_are_named(tmp_path):
    text = (LOGS / "vllm_info.log").read_text()
    (tmp_path / "bad.log").write_text(text.replace("INFO 01-01 00:00:01", "INFO 01-32 00:00:01"))
    with pytest.raises(TraceError, match=r"bad\.log:6: time=01-32 00:00:01: must be a date and time written MM-DD"):
        traces.load(f"{tmp_path}/bad.log:output=max_tokens")
    # The 29th of February exists in leap years alone, and puts a day between the 28th and the 1st of March.
    leap = text.replace("12-31 23:59:59", "02-28 00:00:00").replace("01-01 00:00:01", "02-29 00:00:00")
    (tmp_path / "leap.log").write_text(leap.replace("01-01 00:00:04", "03-01 00:00:00"))
    trace = traces.load(f"{tmp_path}/leap.log:output=max_tokens,chars_per_token=4")
    assert trace.arrival_s.tolist() == [0, 86400, 172800]


def test_rotated_and_gzipped_logs_with_foreign_bytes(tmp_path):
    content = (LOGS / "sglang_text.log").read_bytes().replace(b"never answered", b"\xff\xfe")
    (tmp_path / "host_0.log.2026-05-20_08").write_bytes(content)
    (tmp_path / "server.log.gz").write_bytes(gzip.compress(content))
    for name in ("host_0.log.2026-05-20_08", "server.log.gz"):
        assert len(traces.load(str(tmp_path / name), skip_bad_rows=True)) == 2
    (tmp_path / "cut.log.gz").write_bytes(gzip.compress(content)[:-20])
    with pytest.raises(TraceError, match=r"cut\.log\.gz: truncated or damaged archive"):
        traces.load(str(tmp_path / "cut.log.gz"))
    (tmp_path / "other.log").write_text("INFO 01-01 00:00:00 [x.py:1] nothing here\n")
    with pytest.raises(TraceError, match=r"other\.log: no requests in the log; run vLLM with --enable-log-requests"):
        traces.load(str(tmp_path / "other.log"))
    with pytest.raises(TraceError, match=r"missing\.log: no such file"):
        traces.load("missing.log")


def test_sglang_clocks_in_order_of_precision(tmp_path):
    text = (LOGS / "sglang_text.log").read_text()
    no_receive = "".join(line for line in text.splitlines(keepends=True) if "Receive: obj" not in line)
    (tmp_path / "finish.log").write_text(no_receive)
    trace = traces.load(str(tmp_path / "finish.log"))
    # b2: 08:02:49 - 3.25 s = :45.75; a1: 08:02:50 - 6.5 s = :43.5
    assert (trace.arrival_s.tolist(), trace.prompt_tokens.tolist()) == ([0.0, 2.25], [40, 900])
    assert trace.notes[0].startswith("arrivals are by the finish line less e2e_latency")
    (tmp_path / "none.log").write_text(no_receive.replace("'e2e_latency'", "'latency'"))
    with pytest.raises(TraceError, match=r"none\.log: no clock that all requests have"):
        traces.load(str(tmp_path / "none.log"))
    (tmp_path / "bad.log").write_text(no_receive.replace("'prompt_tokens': 900", "'prompt_tokens': -3"))
    with pytest.raises(TraceError, match=r"bad\.log:4: prompt_tokens=-3: must be a whole number from 1"):
        traces.load(str(tmp_path / "bad.log"))


def test_whole_second_clocks_can_be_spread():
    trace = traces.load(str(LOGS / "vllm_debug.log:spread_s=1"), seed=3, skip_bad_rows=True)
    assert (np.floor(trace.arrival_s) == [0, 1, 4]).all()
    assert (trace.arrival_s != np.floor(trace.arrival_s)).all()


def test_no_quoted_text_survives():
    assert (
        without_text("""a='it\\'s [1]', b="say 'x'", c='bare_word', d='cut [2""") == "a='', b='', c='bare_word', d=''"
    )


def test_a_result_with_start_times_is_what_was_sent(saved):
    trace = traces.load(saved({"start_times": [907.5, 906.0, 908.25]}))
    assert trace.arrival_s.tolist() == [0.0, 1.5, 2.25]
    assert trace.prompt_tokens.tolist() == [20, 10, 30]


def test_two_in_flight_start_when_one_ends(saved):
    # Latencies 0.5 and 1.5 s start at once; the third follows the first.
    trace = traces.load(saved({}))
    assert trace.arrival_s.tolist() == [0.0, 0.0, 0.5]
    assert trace.notes == ("the client sent all requests at once; no more than 2 in flight, by the recorded latencies",)
    assert traces.load(saved({"max_concurrency": None})).arrival_s.tolist() == [0.0, 0.0, 0.0]


def test_rates_are_drawn_with_the_seed(saved):
    n = 40_000
    many = {"request_rate": 8.0, "burstiness": 0.25, "max_concurrency": None} | {
        field: [1] * n for field in ("input_lens", "output_lens")
    }
    path = saved(many)
    trace = traces.load(path, seed=1)
    gaps_s = np.diff(trace.arrival_s)
    # Gamma gaps of shape 1/4 have a CV of 2; the mean of 40,000 has a standard error of 1 %.
    assert gaps_s.mean() == pytest.approx(1 / 8, rel=0.05)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(2, rel=0.1)
    np.testing.assert_array_equal(traces.load(path, seed=1).arrival_s, trace.arrival_s)
    assert (traces.load(path, seed=2).arrival_s != trace.arrival_s).any()


def test_runs_of_one_file_are_chosen_by_number(saved):
    for name, separator in (("bench.json", "\n"), ("bench.json", ""), ("bench.jsonl", "\n")):
        path = saved({}, {"input_lens": [7, 8, 9]}, name=name, separator=separator)
        assert traces.load(f"{path}:run=2").prompt_tokens.tolist() == [7, 8, 9]
        with pytest.raises(TraceError, match="holds 2 runs; choose one with the option run=1 to run=2"):
            traces.load(path)
        with pytest.raises(TraceError, match="run=3: must be from 1 to 2"):
            traces.load(f"{path}:run=3")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_lens": [1, 0, 3]}, r"bench\.json:2: output_lens=0: must be a whole number from 1"),
        ({"input_lens": None}, r"bench\.json:1: input_lens=None: the result has no entry for each request; run vllm"),
        ({"output_lens": [1]}, r"bench\.json:1: output_lens=1 entries beside 3 of input_lens: must be a list, one"),
        ({"input_lens": 7}, r"bench\.json:1: input_lens=7: must be a list, one entry for each request"),
        ({"request_rate": "trace"}, r"bench\.json:1: request_rate=trace: the result has no start_times and no rate"),
        ({"request_rate": None}, r"request_rate=None: the result has no start_times and no rate"),
        ({"max_concurrency": 0}, r"max_concurrency=0: must be a whole number from 1"),
        ({"itls": None}, r"ttfts, itls=incomplete: must say how long each request took"),
        ({"start_times": [1.0, "x", 2.0]}, r"bench\.json:2: start_times=x: must be a finite number"),
        ({"input_lens": [], "output_lens": [], "ttfts": [], "itls": []}, r"empty trace: the run sent no requests"),
    ],
)
def test_faulty_results_say_what_is_wrong(saved, change, message):
    with pytest.raises(TraceError, match=message):
        traces.load(saved(change))


def test_failed_requests_are_counted(saved):
    trace = traces.load(saved({"output_lens": [1, 0, 3], "start_times": [5.0, 0.0, 7.0]}), skip_bad_rows=True)
    assert (trace.arrival_s.tolist(), trace.skipped_rows) == ([0.0, 2.0], 1)


def test_summaries_and_broken_json_are_refused(tmp_path):
    summary = {field: RUN[field] for field in ("total_input_tokens", "total_output_tokens", "request_rate")}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(TraceError, match=r"summary\.json:1: input_lens=None: .*--save-detailed"):
        traces.load(str(tmp_path / "summary.json"))
    (tmp_path / "cut.json").write_text('{"input_lens": [1],\n"output_lens": [')
    with pytest.raises(TraceError, match=r"cut\.json:1: file=malformed: must be JSON objects; Expecting value"):
        traces.load(str(tmp_path / "cut.json"))
    (tmp_path / "list.json").write_text("\n[1]")
    with pytest.raises(TraceError, match=r"list\.json:2: file=list: must be JSON objects, one after another"):
        traces.load(str(tmp_path / "list.json"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            '"intValue": "1200"',
            '"stringValue": "many"',
            r":1: gen_ai\.usage\.prompt_tokens=many: must be a whole number",
        ),
        ('"1779264164500000000"', '"soon"', r":1: startTimeUnixNano=soon: must be the nanoseconds since 1970"),
        (
            '"scopeSpans"',
            '"instrumentationLibrarySpans"',
            r":1: resourceSpans=malformed: must be spans of OTLP in JSON",
        ),
        ("llm_request", "request", r"empty trace: no spans named llm_request"),
    ],
)
def test_faulty_spans_say_what_is_wrong(tmp_path, old, new, message):
    (tmp_path / "spans.jsonl").write_text((LOGS / "otel_spans.jsonl").read_text().replace(old, new))
    with pytest.raises(TraceError, match=message):
        traces.load(str(tmp_path / "spans.jsonl"))
