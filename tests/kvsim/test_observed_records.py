"""Clients' records, whoever wrote them: the same three requests come out of each format."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import traces
from kvsim.observed.records import FORMATS, read_records
from traces import TraceError

S = 1_760_000_000  # seconds since 1970
# sent, tokens in and out, to the first token, from it to the last
REQUESTS = ((0.5, 300, 11, 0.2, 0.3), (0.0, 100, 5, 0.125, 0.1), (2.25, 40, 1, 0.0625, 0.0))


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def observe(*requests: tuple[float, int, int, float, float]) -> str:
    head = {"kvsim_observe": 1, "url": "http://localhost/v1", "requests": 4}
    failed = {"request": 9, "status": "timeout", "sent_s": 0.1, "first_token_s": None, "last_token_s": None}
    return lines(
        head,
        failed,
        *(
            {
                "request": i,
                "status": "finished",
                "sent_s": 3 + sent,
                "first_token_s": 3 + sent + ttft,
                "last_token_s": 3 + sent + ttft + later,
                "prompt_tokens": prompt,
                "output_tokens": output,
                "cached_tokens": None,
                "error": "",
            }
            for i, (sent, prompt, output, ttft, later) in enumerate(requests)
        ),
    )


def vllm(*requests: tuple[float, int, int, float, float]) -> str:
    rows = [*requests, (1.0, 77, 0, 0.0, 0.0)]
    result = {
        "date": "20261101",
        "completed": len(requests),
        "input_lens": [prompt for _, prompt, *_ in rows],
        "output_lens": [output for _, _, output, *_ in rows],
        "ttfts": [ttft for *_, ttft, _ in rows],
        # Several tokens may come at once: gaps are those of chunks.
        "itls": [[later / 2] * 2 if output > 1 else [] for _, _, output, _, later in rows],
        "start_times": [1234.5 + sent for sent, *_ in rows],
        "errors": [""] * len(requests) + ["broken"],
    }
    return json.dumps(result)


def guidellm(*requests: tuple[float, int, int, float, float]) -> str:
    successful = [
        {
            "prompt_tokens": prompt,
            "output_tokens": output,
            "request_start_time": S + sent,
            "time_to_first_token_ms": 1000 * ttft,
            "inter_token_latency_ms": 1000 * later / (output - 1) if output > 1 else None,
        }
        for sent, prompt, output, ttft, later in requests
    ]
    found = {"successful": successful, "incomplete": [], "errored": [{"prompt_tokens": 1}]}
    return json.dumps({"metadata": {"version": 1}, "benchmarks": [{"requests": found}]})


def aiperf(*requests: tuple[float, int, int, float, float], first: str = "time_to_first_token") -> str:
    def row(sent: float, metrics: dict[str, float], phase: str = "profiling", error: Any = None) -> dict[str, Any]:
        at = {"request_start_ns": S * 10**9 + round(sent * 1e9), "benchmark_phase": phase, "turn_index": 0}
        return {
            "metadata": at,
            "metrics": {name: {"value": x, "unit": "?"} for name, x in metrics.items()},
            "error": error,
        }

    def metrics(prompt: int, output: int, ttft: float, later: float) -> dict[str, float]:
        found = {"input_sequence_length": prompt, "output_sequence_length": output, first: 1000 * ttft}
        return found | ({"inter_token_latency": 1000 * later / (output - 1)} if output > 1 else {})

    return lines(
        row(-5, metrics(9, 9, 1, 1), "warmup"),
        row(0.2, {"error_request_count": 1}, error={"type": "Cancelled"}),
        *(row(sent, metrics(*others)) for sent, *others in requests),
    )


WRITERS = {
    "kvsim observe": (observe, "a.jsonl"),
    "vllm bench serve": (vllm, "a.json"),
    "GuideLLM": (guidellm, "a.json"),
    "AIPerf": (aiperf, "a.jsonl"),
}


def test_every_format_has_a_case() -> None:
    assert [known.written_by for known in FORMATS] == [*WRITERS]


@pytest.mark.parametrize("name", WRITERS)
def test_all_formats_say_the_same(name: str, tmp_path: Path) -> None:
    writer, file = WRITERS[name]
    path = tmp_path / file
    path.write_text(writer(*REQUESTS), encoding="utf-8")
    found = read_records(str(path))
    assert found.written_by == name
    assert found.failed == 1
    assert found.trace.arrival_s == pytest.approx([0.0, 0.5, 2.25], abs=1e-6)
    assert found.trace.prompt_tokens.tolist() == [100, 300, 40]
    assert found.trace.output_tokens.tolist() == [5, 11, 1]
    assert found.ttft_s == pytest.approx([0.125, 0.2, 0.0625], abs=1e-6)
    assert found.tpot_s == pytest.approx([0.025, 0.03, np.nan], abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("name", WRITERS)
def test_records_replay_as_a_trace(name: str, tmp_path: Path) -> None:
    writer, file = WRITERS[name]
    path = tmp_path / file
    path.write_text(writer(*REQUESTS), encoding="utf-8")
    trace = traces.load(str(path), skip_bad_rows=True)
    assert trace.same_requests(read_records(str(path)).trace)


def test_the_first_version_of_aiperf(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    text = aiperf(*REQUESTS, first="ttft").replace("request_start_ns", "timestamp_ns")
    path.write_text(text.replace("benchmark_phase", "credit_phase"), encoding="utf-8")
    assert read_records(str(path)).ttft_s == pytest.approx([0.125, 0.2, 0.0625])


def test_one_run_of_several_is_chosen(tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    path.write_text(vllm(*REQUESTS[:1]) + vllm(*REQUESTS[1:]), encoding="utf-8")
    assert len(read_records(f"{path}:run=1")) == 1
    assert len(read_records(f"{path}:run=2")) == 2
    for text, words in ((str(path), "holds 2 runs; choose one"), (f"{path}:run=3", "must be from 1 to 2")):
        with pytest.raises(TraceError, match=words):
            read_records(text)


def test_cached_prompts_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(observe(*REQUESTS).replace('"cached_tokens": null', '"cached_tokens": 44'), encoding="utf-8")
    assert "took 30% of the prompts from its prefix cache" in read_records(str(path)).notes[0]


BROKEN = [
    ("a.jsonl", observe(), "no request finished"),
    (
        "a.jsonl",
        observe(*REQUESTS).replace('"prompt_tokens": 300', '"prompt_tokens": null'),
        "a.jsonl:3: prompt_tokens",
    ),
    ("a.jsonl", observe(*REQUESTS).replace('"first_token_s": 3.7', '"first_token_s": "soon"'), "first_token_s"),
    ("a.json", vllm(*REQUESTS).replace("start_times", "started"), "does not say when requests were sent"),
    ("a.json", vllm(*REQUESTS).replace("[0.2, 0.125,", "["), "ttfts: must be a list with an entry for each"),
    ("a.json", vllm(*REQUESTS).replace("0.125", "-1"), "ttfts=-1"),
    ("a.json", vllm(*REQUESTS).replace("[0.05, 0.05]", '"fast"'), "itls"),
    ("a.json", vllm(), "no request finished"),
    ("a.json", guidellm(), "must list requests"),
    (
        "a.json",
        guidellm(*REQUESTS).replace('"inter_token_latency_ms": 25.0', '"inter_token_latency_ms": null'),
        "where",
    ),
    ("a.jsonl", aiperf(*REQUESTS).replace('"turn_index": 0', '"turn_index": 2'), "turns of conversations"),
    ("a.jsonl", aiperf(), "no request finished"),
    ("a.jsonl", '{"timestamp": 1, "input_length": 3}\n', "no records of requests' latencies"),
    ("a.jsonl", "nonsense\n", "must be a JSON object"),
]


@pytest.mark.parametrize(("file", "text", "words"), BROKEN, ids=[str(i) for i in range(len(BROKEN))])
def test_what_is_no_record_is_told(file: str, text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TraceError) as told:
        read_records(str(path))
    assert words in str(told.value)
