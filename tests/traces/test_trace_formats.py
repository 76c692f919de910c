"""Each format that is told from its columns: a small file written after the published format, its values by hand."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import traces
from kvsim.__main__ import main
from traces import TraceError
from traces.formats import FORMATS, as_markdown


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(header, *rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header.split(","), *rows])
    return text.getvalue()


def span(name, start, attributes, own="1", parent=""):
    keyed = [{"key": key, "value": value} for key, value in attributes.items()]
    place = {"traceId": "t", "spanId": own, "parentSpanId": parent}
    return place | {"name": name, "startTimeUnixNano": start, "attributes": keyed}


def otlp(*spans):
    return {"resourceSpans": [{"resource": {}, "scopeSpans": [{"scope": {}, "spans": list(spans)}]}]}


def usage(prompt, output):
    return {
        "gen_ai.usage.input_tokens": {"intValue": str(prompt)},
        "gen_ai.usage.output_tokens": {"intValue": output},
    }


CHAT = {"gen_ai.operation.name": {"stringValue": "chat"}}
S = 1_760_000_000  # seconds since 1970


def aiperf(start_ns, prompt, output, phase="profiling", turn=0, whose="a", error=None):
    lengths = {"input_sequence_length": prompt, "output_sequence_length": output}
    sent = {"request_start_ns": start_ns, "benchmark_phase": phase, "turn_index": turn, "x_correlation_id": whose}
    measured = {} if error else {key: {"value": value, "unit": "tokens"} for key, value in lengths.items()}
    return {"metadata": sent, "metrics": measured, "error": error}


# name of the file and options -> content, then arrivals in s, prompts, outputs, and what else is to be found
CASES = {
    "bailian.jsonl": (
        lines(
            *(
                dict(
                    zip(
                        ("chat_id", "parent_chat_id", "timestamp", "input_length", "output_length", "type", "turn"),
                        row,
                        strict=True,
                    ),
                    hash_ids=ids,
                )
                for *row, ids in (
                    (7, -1, 0.25, 40, 5, "text", 1, [1, 2, 3]),
                    (9, -1, 1.5, 16, 6, "image", 1, [4]),
                    (8, 7, 61.114, 52, 7, "text", 2, [1, 2, 5, 6]),
                    (12, 8, 70, 33, 8, "text", 3, [1, 2]),
                )
            )
        ),
        [0.25, 1.5, 61.114, 70.0],
        [40, 16, 52, 33],
        [5, 6, 7, 8],
        {"block_tokens": 16, "session": [0, 1, 0, 0], "block_ids": [1, 2, 3, 4, 1, 2, 5, 6, 1, 2]},
    ),
    "dynamo.jsonl": (
        lines(
            {"session_id": "x", "timestamp": 0, "input_length": 130, "output_length": 9, "hash_ids": [0, 1, 2]},
            {"session_id": "y", "timestamp": 500, "input_length": 64, "output_length": 8, "hash_ids": [3]},
            {"session_id": "x", "delay": 250, "input_length": 200, "output_length": 7, "hash_ids": [0, 1, 4, 5]},
            {"session_id": "x", "delay": 1500.0, "input_length": 600, "output_length": 6, "hash_ids": [*range(10)]},
        ),
        [0.0, 0.25, 0.5, 1.75],  # later turns: the delays alone after the turns before
        [130, 200, 64, 600],
        [9, 7, 8, 6],
        {"block_tokens": 64, "session": [0, 0, 1, 0], "think_s": [np.nan, 0.25, np.nan, 1.5]},
    ),
    "aliases.jsonl": (
        lines(
            {"session_id": "x", "created_time": 3000, "input_tokens": 10, "output_tokens": 9, "delay_ms": None},
            {"session_id": "x", "created_time": None, "input_tokens": 30, "output_tokens": 7, "delay_ms": 50.5},
        ),
        [3.0, 3.0505],
        [10, 30],
        [9, 7],
        {"session": [0, 0]},
    ),
    # AIPerf's turns state what is new: prompts of 1,000, then 1,000 + 100 + 600, then 1,700 + 24 + 326. The second
    # block is full only in the second turn, where it has the answer in it; the third turn has one full block more.
    "deltas.jsonl": (
        lines(
            {"session_id": "x", "timestamp": 0.0, "input_length": 1000, "output_length": 100, "hash_ids": [0, 9]},
            {"session_id": "x", "delay": 20.5, "input_length": 600, "output_length": 24, "hash_ids": [30, 31]},
            {"session_id": "x", "delay": 1000, "input_length": 326, "output_length": 5, "hash_ids": [32]},
            {"session_id": "y", "timestamp": 5000, "input_length": 512, "output_length": 1, "hash_ids": [0]},
        ),
        [0.0, 0.0205, 1.0205, 5.0],
        [1000, 1700, 2050, 512],
        [100, 24, 5, 1],
        {"block_tokens": 512, "block_ids": [0, 1, 0, 5, 6, 0, 5, 6, 7, 0], "block_offsets": [0, 2, 5, 9, 10]},
    ),
    "deltas_told.jsonl:turns=delta": (
        lines(
            {"session_id": "x", "timestamp": 0, "input_length": 10, "output_length": 5},
            {"session_id": "x", "timestamp": 1000, "input_length": 20, "output_length": 5},
        ),
        [0.0, 1.0],
        [10, 35],
        [5, 5],
        {"block_tokens": 0},
    ),
    # Without timestamps: two first turns drawn, the others their delays behind.
    "closed.jsonl:rate_rps=4": (
        lines(
            {"session_id": "x", "input_length": 10, "output_length": 9},
            {"session_id": "y", "input_length": 20, "output_length": 8},
            {"session_id": "y", "input_length": 30, "output_length": 7, "delay": 0},
        ),
        None,
        [10, 20, 30],
        [9, 8, 7],
        {"session": [0, 1, 1], "think_s": [np.nan, np.nan, 0.0]},
    ),
    "stated.jsonl:time_unit=s": (
        lines(
            {"session_id": "x", "timestamp": 0.5, "input_length": 10, "output_length": 9, "delay": None},
            {"session_id": "x", "timestamp": None, "input_length": 30, "output_length": 7, "delay": 2},
        ),
        [0.5, 2.5],
        [10, 30],
        [9, 7],
        {"think_s": [np.nan, 2.0]},
    ),
    "epoch.jsonl": (
        lines(*({"timestamp": 1000 * S + t, "input_length": 10, "output_length": 9} for t in (0, 250, 1000))),
        [0.0, 0.25, 1.0],
        [10] * 3,
        [9] * 3,
        {},
    ),
    "burstgpt.csv": (
        table(
            "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type",
            (5, "ChatGPT", 472, 18, 490, "Conversation log"),
            (45, "GPT-4", 30, 0, 30, "API log"),
            (45, "GPT-4", 0, 0, 0, "API log"),
            (118, "GPT-4", 417, 276, 693, "API log"),
        ),
        [5.0, 118.0],
        [472, 417],
        [18, 276],
        {"skipped_rows": 2, "session": [-1, -1]},
    ),
    "burstgpt_3.csv": (
        "\ufeff"
        + table(
            "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type",
            ("19440110.0", "1722ac82-0a46", 43, "GPT-4", 906, 446, 1352, "Conversation log"),
            ("19440161.0", "d5983bf9-4b48", 2, "ChatGPT", 36, 29, 65, "Conversation log"),
            ("19440192.5", "1722ac82-0a46", 8, "GPT-4", 1779, 123, 1902, "Conversation log"),
            ("19440193.0", "", 8, "GPT-4", 7, 6, 13, "API log"),
        ).replace("\n", "\r\n"),
        [0.0, 51.0, 82.5, 83.0],
        [906, 36, 1779, 7],
        [446, 29, 123, 6],
        {"session": [0, 1, 0, -1]},
    ),
    "splitwise.csv": (
        table(
            "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,token_size",
            (0, 2, 0, 0.0, 1, 4096, 32),
            (1, 2, 0, 0.52, 1, 2048, 8),
        ),
        [0.0, 0.52],
        [4096, 2048],
        [32, 8],
        {},
    ),
    "servingsim.jsonl": (
        lines(
            {"input_toks": 3, "output_toks": 10, "arrival_time_ns": 46926808, "input_tok_ids": [1, 2, 3]},
            {"input_toks": 5, "output_toks": 12, "arrival_time_ns": 2 * 10**9, "input_tok_ids": [1, 2, 4, 5, 6]},
        ),
        [0.046926808, 2.0],
        [3, 5],
        [10, 12],
        {"block_tokens": 0},
    ),
    # Full blocks of two tokens: 1-2 is in both, 4-5 behind it in the second alone.
    "named.jsonl:block_tokens=2": (
        lines(
            {"input_toks": 3, "output_toks": 10, "arrival_time_ns": 0, "input_tok_ids": [1, 2, 3]},
            {"input_toks": 5, "output_toks": 12, "arrival_time_ns": 1, "input_tok_ids": [1, 2, 4, 5, 6]},
            {"input_toks": 4, "output_toks": 12, "arrival_time_ns": 2, "input_tok_ids": [4, 5, 1, 2]},
        ),
        [0.0, 1e-9, 2e-9],
        [3, 5, 4],
        [10, 12, 12],
        {"block_tokens": 2, "block_ids": [0, 0, 1, 2, 3]},
    ),
    # Eight characters are two tokens, nine are three; a prompt is all that was said before it.
    "sharegpt.json:chars_per_token=4,rate_rps=1,turns=all,think_s=10": (
        json.dumps(
            [
                {
                    "id": "a",
                    "conversations": [{"from": "human", "value": "8 letter"}, {"from": "gpt", "value": "9 letters"}],
                },
                {
                    "id": "b",
                    "conversations": [
                        {"from": "system", "value": "1234"},
                        {"from": "human", "value": "é" * 5},
                        {"from": "gpt", "value": "x" * 12},
                        {"from": "human", "value": "?"},
                        {"from": "gpt", "value": "x" * 4},
                        {"from": "human", "value": "unanswered"},
                    ],
                },
            ],
            indent=1,
        ),
        None,
        [2, 3, 7],
        [3, 3, 1],
        {"session": [0, 1, 1], "think_s": [np.nan, np.nan, 10.0]},
    ),
    "messages.jsonl:chars_per_token=2,rate_rps=5,turns=first": (
        lines(
            {"conversations": [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "abcd"}] * 2},
            {"conversations": [{"role": "assistant", "content": "abc"}]},
        ),
        [0.0],
        [2],
        [2],
        {"session": [0]},
    ),
    "llmperf.json:rate_rps=2": (
        json.dumps(
            [
                {
                    "error_code": None,
                    "end_to_end_latency_s": 2.1,
                    "number_output_tokens": 150,
                    "number_input_tokens": 550,
                },
                {
                    "error_code": None,
                    "end_to_end_latency_s": 2.0,
                    "number_output_tokens": 151,
                    "number_input_tokens": 560,
                },
            ]
        ),
        None,
        [550, 560],
        [150, 151],
        {},
    ),
    "observed.jsonl": (
        lines(
            {"kvsim_observe": 1, "url": "http://localhost/v1"},
            {"status": "finished", "sent_s": 1.75, "prompt_tokens": 30, "output_tokens": 5},
            {"status": "timeout", "sent_s": 1.0, "prompt_tokens": None, "output_tokens": None},
            {"status": "finished", "sent_s": 1.5, "prompt_tokens": 40, "output_tokens": 6},
        ),
        [0.0, 0.25],
        [40, 30],
        [6, 5],
        {"skipped_rows": 2},
    ),
    "guidellm.json": (
        json.dumps(
            {
                "metadata": {"version": 1},
                "benchmarks": [
                    {
                        "requests": {
                            "successful": [
                                {"prompt_tokens": 256, "output_tokens": 128, "request_start_time": S + 0.25},
                                {"prompt_tokens": 255, "output_tokens": 127, "request_start_time": S + 3.5},
                            ],
                            "incomplete": [{"prompt_tokens": 1}],
                            "errored": [],
                        }
                    }
                ],
            }
        ),
        [0.0, 3.25],
        [256, 255],
        [128, 127],
        {},
    ),
    "guidellm_old.json:run=2": (
        json.dumps(
            {
                "benchmarks": [
                    {"requests": {"successful": [{"prompt_tokens": 1, "output_tokens": 1, "start_time": S}]}},
                    {"requests": {"successful": [{"prompt_tokens": 7, "output_tokens": 8, "start_time": S + 9.1}]}},
                ]
            }
        ),
        [0.0],
        [7],
        [8],
        {},
    ),
    "aiperf.jsonl": (
        lines(
            aiperf(S * 10**9, 9, 9, phase="warmup"),
            aiperf(S * 10**9 + 2_000_000_000, 550, 9),
            aiperf(S * 10**9 + 1_000_000_001, 100, 8, whose="b"),
            aiperf(S * 10**9 + 4_000_000_000, 700, 7, turn=1),
        ),
        [0.0, 0.999999999, 2.999999999],
        [100, 550, 700],
        [8, 9, 7],
        {"session": [1, 0, 0], "skipped_rows": 1},
    ),
    "aiperf_turns.jsonl:turns=delta": (
        lines(
            aiperf(S * 10**9, 100, 9, whose="b"),
            aiperf(S * 10**9 + 5, 30, 8, turn=1, whose="b"),
            aiperf(S * 10**9 + 10**9, 7, 6, turn=2, whose="b"),
        ),
        [0.0, 5e-9, 1.0],
        [100, 139, 154],
        [9, 8, 6],
        {"session": [0, 0, 0]},
    ),
    # As version 0.1 wrote them.
    "aiperf_0.1.jsonl": (
        lines(
            *(
                {
                    "metadata": {"timestamp_ns": S * 10**9 + ns, "credit_phase": "profiling", "turn_index": 0},
                    "metrics": {key: {"value": n} for key in ("input_sequence_length", "output_sequence_length")},
                    "error": None,
                }
                for ns, n in ((157, 5), (0, 7))
            )
        ),
        [0.0, 157e-9],
        [7, 5],
        [7, 5],
        {"session": [-1, -1]},
    ),
    "spans.jsonl": (
        lines(
            otlp(span("chat m", f"{S}500000000", usage(512, 77) | CHAT, own="c")),
            otlp(
                span("invoke_agent", str(S * 10**9), usage(900, 90) | {"gen_ai.operation.name": {"stringValue": "x"}}),
                span(
                    "embeddings", str(S * 10**9), usage(5, 5) | {"gen_ai.operation.name": {"stringValue": "embeddings"}}
                ),
                span("http", str(S * 10**9), {}),
            ),
            otlp(span("text", f"{S}000000000", usage(300, 30), own="d")),
        ),
        [0.0, 0.5],
        [300, 512],
        [30, 77],
        {"session": [-1, -1]},
    ),
    # A client's span around the server's own: one request.
    "nested.json": (
        json.dumps(
            otlp(
                span("chat", f"{S}000000000", usage(100, 10) | CHAT, own="client"),
                span("http", f"{S}010000000", {}, own="http", parent="client"),
                span(
                    "llm_request",
                    f"{S}020000000",
                    {
                        "gen_ai.usage.prompt_tokens": {"intValue": "101"},
                        "gen_ai.usage.completion_tokens": {"intValue": "10"},
                    },
                    own="server",
                    parent="http",
                ),
            ),
            indent=2,
        ),
        [0.0],
        [101],
        [10],
        {},
    ),
    # What the console exporter of an SDK prints: objects over several lines, attributes by name, clocks with zones.
    "console.json": (
        "\n".join(
            json.dumps(
                {
                    "name": "chat m",
                    "context": {"trace_id": "0x1", "span_id": own},
                    "parent_id": None,
                    "start_time": start,
                    "attributes": {
                        "gen_ai.operation.name": "chat",
                        "gen_ai.usage.input_tokens": prompt,
                        "gen_ai.usage.output_tokens": 4,
                        "gen_ai.conversation.id": "c",
                    },
                },
                indent=4,
            )
            for own, start, prompt in (
                ("0xa", "2025-07-15T17:20:01.500000Z", 20),
                ("0xb", "2025-07-15T19:20:00.000000+02:00", 30),
            )
        ),
        [0.0, 1.5],
        [30, 20],
        [4, 4],
        {"session": [0, 0]},
    ),
    "azure.csv": (
        table(
            "TIMESTAMP,ContextTokens,GeneratedTokens",
            ("2024-05-10 02:00:01.5+02:00", 10, 1),
            ("2024-05-10T00:00:00.25Z", 20, 2),
            ("2024-05-09 23:59:59", 30, 3),
        ),
        [0.0, 1.25, 2.5],
        [30, 20, 10],
        [3, 2, 1],
        {},
    ),
    "lengths.csv:rate_rps=3": (table("num_prefill_tokens,num_decode_tokens", (5, 6), (7, 8)), None, [5, 7], [6, 8], {}),
}


def saved(tmp_path, text, content):
    name, _, options = text.partition(":")
    (tmp_path / name).write_text(content, encoding="utf-8")
    return f"{tmp_path / name}:{options}" if options else str(tmp_path / name)


@pytest.mark.parametrize("text", CASES)
def test_a_format_is_read_as_counted_by_hand(tmp_path, text):
    content, arrival_s, prompts, outputs, others = CASES[text]
    trace = traces.load(saved(tmp_path, text, content))
    if arrival_s is not None:
        assert trace.arrival_s.tolist() == pytest.approx(arrival_s, abs=1e-12)
    assert (trace.prompt_tokens.tolist(), trace.output_tokens.tolist()) == (prompts, outputs)
    for field, expected in others.items():
        np.testing.assert_array_equal(getattr(trace, field), expected)


def test_every_format_has_a_case():
    """Two formats are tried elsewhere: results of vLLM and SGLang, and the plain table."""
    found = set()
    for text, (content, *_) in CASES.items():
        found.add(text.partition(".")[0])
        assert content
    assert len(FORMATS) == 14
    assert len(found) == len(CASES)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("text", CASES)
def test_what_was_read_is_written_and_read_back_the_same(tmp_path, text, suffix):
    trace = traces.load(saved(tmp_path, text, CASES[text][0]))
    traces.write(trace, tmp_path / f"again{suffix}")
    again = traces.load(str(tmp_path / f"again{suffix}"))
    assert again.same_requests(trace)
    np.testing.assert_array_equal(again.think_s, trace.think_s)
    assert again.block_tokens == trace.block_tokens


GOOD = {name.partition(":")[0]: case[0] for name, case in CASES.items()}
REFUSED = {
    "burstgpt.csv": [
        ("472", "-472", r":2: Request tokens=-472: must be a whole number"),
        ("472", "nan", r":2: Request tokens=nan: must be a whole number"),
        ("5,Chat", "soon,Chat", r":2: Timestamp=soon: must be a finite number"),
        ("Timestamp", "TIMESTAMP", r"missing column"),
        ("Model", "Timestamp", r":1: header=Timestamp: column given twice"),
    ],
    "splitwise.csv": [
        (",1,4096", ",2,4096", r":2: batch_size=2: must be 1: a request is one sequence"),
        ("4096", "1e30", r":2: prompt_size=1e30: must be a whole number"),
        ("0.52", "-0.52", r":3: arrival_timestamp=-0\.52: must be a finite number"),
    ],
    "servingsim.jsonl": [
        ("46926808", "-1", r":1: arrival_time_ns=-1: must be a whole number of nanoseconds"),
        ("46926808", "0.5", r":1: arrival_time_ns=0\.5: must be a whole number of nanoseconds"),
        ("46926808", "1" + "0" * 30, r":1: arrival_time_ns=10+: must be a whole number of nanoseconds"),
        (
            '"input_toks": 3',
            '"input_toks": 4',
            r":1: input_tok_ids=\[1, 2, 3\]: must list as many tokens as input_toks",
        ),
        ('"output_toks": 10', '"output_toks": true', r":1: output_toks=True: must be a whole number"),
    ],
    "bailian.jsonl": [
        ('"chat_id": 7', '"chat_id": "7"', r":1: chat_id=7: must be the whole number of a chat"),
        ('"chat_id": 7', '"chat_id": 1.5', r":1: chat_id=1\.5: must be the whole number of a chat"),
        ('"timestamp": 0.25', '"timestamp": null', r":1: timestamp=None: must be a finite number"),
        ('"input_length": 52', '"input_length": 520', r":3: hash_ids=\[1, 2, 5, 6\]: must have one id for each 16-"),
    ],
    "dynamo.jsonl": [
        ('"delay": 250', '"delay": -250', r":3: delay=-250: must be a finite number"),
        ('"delay": 250', '"later": 250', r":3: timestamp=None: must be known for the first turn of a session"),
        ('"timestamp": 0', '"timestamp": null', r":1: timestamp=None: must be known for the first turn of a session"),
        ('"session_id": "x"', '"session_id": ["x"]', r":1: session_id=\['x'\]: must be text"),
        ('"hash_ids": [3]', '"hash_ids": [3, 9]', r":2: hash_ids=\[3, 9\]: must have one id for each 64-token block"),
    ],
    "llmperf.json": [
        ('"error_code": null', '"error_code": 429', r":1: error_code=429: the request failed; skip bad rows"),
        ("550", "5.5", r":1: number_input_tokens=5\.5: must be a whole number"),
    ],
    "observed.jsonl": [
        ('"prompt_tokens": 30', '"prompt_tokens": null', r":2: prompt_tokens=None: must be a whole number"),
        ("finished", "timeout", r"no request finished; observe a server that answers"),
    ],
    "guidellm.json": [
        ('"successful"', '"total"', r"requests\.successful: must list the benchmark's requests"),
        ("128", "null", r":1: output_tokens=None: must be a whole number"),
        (f"{S}.25", '"now"', r":1: request_start_time=now: must be a finite number"),
    ],
    "guidellm_old.json": [("{}", "{}", r"holds 2 benchmarks; choose one with the option run=1 to run=2")],
    "aiperf.jsonl": [
        ('"value": 550', '"value": 0', r":2: input_sequence_length=0: must be a whole number"),
        (
            '"error": null',
            '"error": {"type": "Cancelled"}',
            r":2: error=Cancelled: the request failed or was cancelled",
        ),
        (f'"request_start_ns": {S + 2}', '"request_start_ns": "', r":2: row=.*must be a JSON object"),
    ],
    "spans.jsonl": [
        ('"intValue": "512"', '"intValue": "-512"', r":1: gen_ai\.usage\.input_tokens=-512: must be a whole number"),
        ('"intValue": 77', '"arrayValue": {}', r":1: gen_ai\.usage\.output_tokens=.*: must be a whole number"),
        (f'"{S}500000000"', '"yesterday"', r":1: startTimeUnixNano=yesterday: must be the nanoseconds"),
        (f'"{S}500000000"', '"' + "9" * 5000 + '"', r":1: startTimeUnixNano=9{80}: must be the nanoseconds"),
    ],
    "console.json": [
        ("2025-07-15T17:20:01.500000Z", "1752600000", r":1: startTimeUnixNano=1752600000 of no unit: must be the nano"),
        (
            "2025-07-15T17:20:01.500000Z",
            "2025-07-15 17:20",
            r":1: startTimeUnixNano=2025-07-15 17:20: must be the nano",
        ),
    ],
    "epoch.jsonl": [
        ('"output_length"', '"input_length"', r":1: row=.*the key 'input_length' is given twice; keep one")
    ],
    "azure.csv": [("2024-05-10 02:00:01.5+02:00", "2024-05-10 02:00:01.5+2", r":2: TIMESTAMP=.*: must be a time")],
}


@pytest.mark.parametrize(
    ("name", "old", "new", "message"), [(name, *case) for name, cases in REFUSED.items() for case in cases]
)
def test_what_is_refused_is_named(tmp_path, name, old, new, message):
    options = "rate_rps=2" if name == "llmperf.json" else ""
    with pytest.raises(TraceError, match=message) as found:
        traces.load(saved(tmp_path, f"{name}:{options}", GOOD[name].replace(old, new)))
    assert len(str(found.value).replace(str(tmp_path), "")) < 600


ASKED = {
    "llmperf.json": r"records no times, so no arrivals are recorded; say how many requests .*: rate_rps=1",
    "lengths.csv": r"no column arrived_at, so no arrivals are recorded; .*: rate_rps=1",
    "sharegpt.json": r"holds texts, no tokens; say how many characters a token has: chars_per_token=4",
    "sharegpt.json:chars_per_token=4": r"up to 2 turns; say turns=first, or turns=all and think_s",
    "sharegpt.json:chars_per_token=4,turns=all": r"turns=all needs think_s",
    "sharegpt.json:chars_per_token=4,turns=first": r"records no times.* how many conversations .*: rate_rps=1",
    "sharegpt.json:chars_per_token=4,turns=some": r"turns=some: must be first or all",
    "sharegpt.json:chars_per_token=nan": r"chars_per_token=nan: must be finite",
    "sharegpt.json:think_s=-2": r"think_s=-2\.0: must be finite and not negative",
    "llmperf.json:rate_rps=-1": r"rate_rps=-1\.0: must be finite and above 0",
    "llmperf.json:time_unit=s": r"unknown trace option key 'time_unit'",
    "azure.csv:time_unit=s": r"takes no options, got 'time_unit'",
    "dynamo.jsonl:rate_rps=1": r"rate_rps=1: its arrivals are recorded; leave it out",
    "aiperf_turns.jsonl": r"could be whole prompts or only what is new in each; say which .*turns=whole or turns=delta",
    "deltas.jsonl:turns=half": r"turns=half: must be whole .* or delta",
    "epoch.jsonl:turns=whole": r"turns=whole: there is no column session_id or delay",
    "dynamo.jsonl:time_unit=h": r"time_unit=h: must be one of s, ms, us, ns",
    "dynamo.jsonl:block_tokens=-1": r"block_tokens=-1: must be a whole number from 1",
    "dynamo.jsonl:block_tokens=32": r":1: hash_ids=\[0, 1, 2\]: must have one id for each 32-token block",
    "guidellm_old.json:run=3": r"run=3: must be from 1 to 2",
}


@pytest.mark.parametrize("text", ASKED)
def test_what_a_file_does_not_say_is_asked_for(tmp_path, text):
    with pytest.raises(TraceError, match=ASKED[text]):
        traces.load(saved(tmp_path, text, GOOD[text.partition(":")[0]]))


def test_options_as_arguments_are_those_of_the_text(tmp_path):
    rows = [{"timestamp": 0.5 + t, "input_length": 100, "output_length": 2, "hash_ids": [t]} for t in range(3)]
    path = saved(tmp_path, "t.jsonl", lines(*rows))
    by_text, by_argument = (
        traces.load(f"{path}:time_unit=s,block_tokens=128"),
        traces.load(path, time_unit="s", block_tokens=128),
    )
    assert by_text.same_requests(by_argument)
    assert (by_text.block_tokens, by_text.arrival_s.tolist()) == (128, [0.5, 1.5, 2.5])
    with pytest.raises(TraceError, match=r"time_unit=ms: given twice"):
        traces.load(f"{path}:time_unit=s", time_unit="ms")


HOSTILE = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        0.5,
        1e308,
        float("nan"),
        float("inf"),
        10**30,
        "",
        "7",
        "x" * 200,
        "\x1b[31m",
        [],
        [[1]],
        {},
        {"value": 1},
    ]
)


def _replaced(value, draw):
    """The value, or a part of it, replaced by something else."""
    if isinstance(value, dict) and value and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(value)))
        return value | {key: _replaced(value[key], draw)}
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], _replaced(value[at], draw), *value[at + 1 :]]
    return draw(HOSTILE)


def refusal(path, skip):
    """The words with which a file is refused, or ""; what is read must keep the rules of a trace."""
    try:
        traces.load(path, skip_bad_rows=skip).validate()
    except TraceError as error:
        return str(error)
    return ""


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_stands_in_a_row_is_read_or_refused_with_its_place(tmp_path, data):
    """Values of every kind wherever a format has one: a trace that keeps its rules, or one line that names the file."""
    text = data.draw(st.sampled_from(sorted(name for name in CASES if ".json" in name)))
    content, name, options = CASES[text][0], *text.partition(":")[::2]
    whole = name.endswith(".json") and not name.startswith("console")
    rows = (
        json.loads(content) if whole else [json.loads(row) for row in content.splitlines()] if ".jsonl" in name else []
    )
    if not rows:
        return
    rows = _replaced(rows, data.draw)
    damaged = (
        json.dumps(rows) if whole or not isinstance(rows, list) else "".join(json.dumps(row) + "\n" for row in rows)
    )
    path = saved(tmp_path, f"{name}:{options}", damaged)
    for skip in (False, True):
        refused = refusal(path, skip)
        assert refused == "" or (name in refused and "\n" not in refused)


def test_the_documented_table_is_the_one_that_is_read_by():
    text = (Path(__file__).parents[2] / "docs" / "traces.md").read_text()
    assert as_markdown() in text


def test_formats_are_listed(capsys):
    assert main(["trace", "list", "--formats", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["formats"]
    assert [row["name"] for row in listed] == [known.name for known in FORMATS]
    assert {row["name"]: row["option_names"] for row in listed}["BurstGPT"] == "time_unit"
    assert main(["trace", "list", "--formats"]) == 0
    assert "Qwen-Bailian" in capsys.readouterr().out
