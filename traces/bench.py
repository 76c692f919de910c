"""Results of `vllm bench serve` and `sglang.bench_serving` as traces of the requests that they sent.

Formats: vllm-project/vllm, `vllm/benchmarks/serve.py` at commit 009e6d4a (2026; `--save-result --save-detailed`, one
JSON object a file, or several after `--append-result`); sgl-project/sglang, `python/sglang/bench_serving.py` at
00331680 and `python/sglang/benchmark/serving.py` at 00f9ec47 (2026; `--output-file --output-details`, a JSON line a
run). Texts in them are not read.

vLLM records when a request was sent (`start_times`); without that column, as in SGLang's results, arrivals are those
that the client's own rules give: gamma gaps at `request_rate` (drawn with the seed), all at once for an infinite rate,
and never more than `max_concurrency` in flight, with the recorded latencies.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from traces.checks import Rows
from traces.schema import Floats, Trace, TraceError
from traces.table import Table

COLUMNS = ("input_lens", "output_lens")
SUMMARY = ("total_input_tokens", "total_output_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """`run` is the number, from 1, of the run in a file of several; 0 takes the only one."""

    run: int = 0


def load(table: Table, options: Options, *, name: str, seed: int = 0, skip_bad_rows: bool = False) -> Trace:
    """The requests of one run, its first at time 0; in errors the number after the file is the request's, from 1.

    A failed request has no output and is a bad row.
    """
    row, runs = options.run - 1 if options.run else 0, len(table.lines)
    if runs > 1 and not options.run:
        raise TraceError(f"{table.source}: holds {runs} runs; choose one with the option run=1 to run={runs}")
    if not 0 <= row < runs:
        raise TraceError(f"{table.source}: run={options.run}: must be from 1 to {runs}")
    result = {field: cells[row] for field, cells in table.columns.items() if cells[row] is not None}
    line = table.lines[row]
    if not set(COLUMNS) <= set(result):
        raise undetailed(table.source, line)
    fields = (*COLUMNS, *(field for field in ("start_times",) if field in result))
    for field in fields:
        cells = result[field]
        if not isinstance(cells, list) or len(cells) != len(result[COLUMNS[0]]):
            shown = cells
            if isinstance(cells, list):
                shown = f"{len(cells)} entries beside {len(result[COLUMNS[0]])} of {COLUMNS[0]}"
            raise TraceError.at(table.source, line, field, shown, "must be a list, one entry for each request")
    requests = Table(
        source=table.source if runs == 1 else f"{table.source} run {row + 1}",
        columns={field: result[field] for field in fields},
        lines=list(range(1, len(result[COLUMNS[0]]) + 1)),
    )
    if not requests.lines:
        raise TraceError(f"{table.source}: empty trace: the run sent no requests")
    rows = Rows(requests, skip_bad_rows=skip_bad_rows)
    prompt, output = (rows.whole(field, minimum=1) for field in COLUMNS)
    if "start_times" in result:
        start_s, note = rows.seconds("start_times"), "arrivals are the times at which the client sent the requests"
    else:
        start_s, note = _started_s(result, table.source, line, len(prompt), seed)
    keep = rows.keep()
    return Trace.from_columns(
        name=name,
        arrival_s=start_s[keep] - start_s[keep].min(),
        prompt_tokens=prompt[keep],
        output_tokens=output[keep],
        skipped_rows=rows.skipped_rows,
        notes=(note,),
    )


def undetailed(source: str, line: int) -> TraceError:
    """The error for a result that has only averages."""
    rule = "the result has no entry for each request; run vllm bench serve with --save-detailed, sglang.bench_serving"
    return TraceError.at(source, line, COLUMNS[0], None, f"{rule} with --output-details")


def _started_s(result: dict[str, Any], source: str, line: int, n: int, seed: int) -> tuple[Floats, str]:
    """When each of n requests was sent by the client's own rules, and a note that says so."""
    rate, limit = result.get("request_rate"), result.get("max_concurrency")
    try:
        rate_rps, burstiness = float(rate), float(result.get("burstiness", 1.0))  # type: ignore[arg-type]
        good = rate_rps > 0 and burstiness > 0
    except (TypeError, ValueError):
        good = False
    if not good:
        rule = "the result has no start_times and no rate to draw them at; replay the trace that the benchmark replayed"
        raise TraceError.at(source, line, "request_rate", rate, rule)
    arrived_s = np.zeros(n)
    if math.isinf(rate_rps):
        note = "the client sent all requests at once"
    else:
        # Both clients wait a drawn gap after each request: the first is sent at once.
        gaps_s = np.random.default_rng(seed).gamma(burstiness, 1 / (rate_rps * burstiness), n)
        arrived_s[1:] = np.cumsum(gaps_s[:-1])
        note = (
            f"the result has no start_times: drawn at {rate_rps:g} requests/s, burstiness {burstiness:g}, seed {seed}"
        )
    if limit is None:
        return arrived_s, note
    if type(limit) is not int or limit < 1:
        raise TraceError.at(source, line, "max_concurrency", limit, "must be a whole number from 1, or null: no limit")
    latencies_s = _latencies_s(result, source, line, n)
    free_s = [0.0] * limit
    for i, arrived in enumerate(arrived_s):
        arrived_s[i] = max(arrived, heapq.heappop(free_s))
        heapq.heappush(free_s, arrived_s[i] + latencies_s[i])
    return arrived_s, f"{note}; no more than {limit} in flight, by the recorded latencies"


def _latencies_s(result: dict[str, Any], source: str, line: int, n: int) -> Floats:
    """Each request's latency: time to its first token and between its tokens."""
    ttfts, itls = result.get("ttfts"), result.get("itls")
    if isinstance(ttfts, list) and isinstance(itls, list) and len(ttfts) == len(itls) == n:
        try:
            latencies = np.array([float(ttft) + math.fsum(itl) for ttft, itl in zip(ttfts, itls, strict=True)])
        except (TypeError, ValueError):
            latencies = np.full(n, np.nan)
        if np.isfinite(latencies).all() and latencies.min() >= 0:
            return latencies
    raise TraceError.at(
        source, line, "ttfts, itls", "incomplete", "must say how long each request took, to place the others behind it"
    )
