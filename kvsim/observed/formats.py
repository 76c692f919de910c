"""The formats of clients' records: when a request was sent, its lengths, and what the client measured of it.

Read in their sources: vllm-project/vllm, `vllm/benchmarks/serve.py` at commit 009e6d4a (`--save-result
--save-detailed`); vllm-project/guidellm, `src/guidellm/schemas/base/request_stats.py` at 31c74ea2; ai-dynamo/aiperf,
`examples/artifacts/run1/profile_export.jsonl` at 7c31f579 (`ttft`, `timestamp_ns`) and the documentation of version
0.14 (`time_to_first_token`, `request_start_ns`). Our own is in `docs/observe.md`.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from traces import TraceError
from traces.aiperf import PHASES, STARTS
from traces.checks import Rows
from traces.guidellm import STARTS as GUIDELLM_STARTS
from traces.guidellm import UNFINISHED
from traces.observed import LENGTHS, rows_of
from traces.schema import Floats, Ints
from traces.table import Table

OBSERVE = ("kvsim_observe", "status", "sent_s", "first_token_s", "last_token_s")
VLLM = ("input_lens", "output_lens", "ttfts", "itls")
GUIDELLM = ("benchmarks",)
AIPERF = ("metadata", "metrics")

_CACHED_NOTE = 0.01  # of all prompt tokens, from which it is worth a word


class Columns(NamedTuple):
    """One entry for each request that finished; TPOT of one with a single token means nothing."""

    sent_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    ttft_s: Floats
    tpot_s: Floats
    failed: int
    notes: tuple[str, ...] = ()


def of_observe(table: Table, _run: int) -> Columns:
    """Records of `kvsim observe`."""
    rows = rows_of(table)
    first_s, last_s = rows.seconds("first_token_s"), rows.seconds("last_token_s")
    sent_s = rows.seconds("sent_s")
    prompt, output = (rows.whole(field, minimum=1) for field in LENGTHS)
    keep = rows.keep()
    statuses = table.columns["status"]
    cached = sum(count for count in table.columns.get("cached_tokens", ()) if isinstance(count, int))
    return Columns(
        sent_s[keep],
        prompt[keep],
        output[keep],
        (first_s - sent_s)[keep],
        _mean_gap_s(first_s[keep], last_s[keep], output[keep]),
        failed=sum(status is not None for status in statuses) - int(keep.sum()),
        notes=_cached_note(cached, int(prompt[keep].sum())),
    )


def of_vllm(table: Table, run: int) -> Columns:
    """One run of `vllm bench serve`: lists of an entry for each request, that of a failed one with its error."""
    row = _chosen(len(table.lines), run, table.source, "runs")
    result = {field: cells[row] for field, cells in table.columns.items() if cells[row] is not None}
    if "start_times" not in result:
        raise TraceError(
            f"{table.source}: start_times: does not say when requests were sent; save the results of a vllm bench "
            "serve that does (--save-result --save-detailed), or use kvsim observe"
        )
    fields = (*VLLM, "start_times")
    for field in (*fields, *(["errors"] if "errors" in result else [])):
        if not isinstance(result.get(field), list) or len(result[field]) != len(result[VLLM[0]]):
            raise TraceError(f"{table.source}: {field}: must be a list with an entry for each request")
    n = len(result[VLLM[0]])
    if not n:
        raise TraceError(f"{table.source}: the run sent no requests")
    errors = result.get("errors", [""] * n)
    columns = {field: result[field] for field in fields}
    columns["itls"] = [_sum_s(gaps) for gaps in result["itls"]]
    rows = Rows(Table(source=table.source, columns=columns, lines=list(range(1, n + 1))), skip_bad_rows=False)
    failed = np.array([bool(error) or not tokens for error, tokens in zip(errors, result[VLLM[1]], strict=True)])
    _some_finished(failed, table.source)
    rows.leave_out(failed)
    prompt, output = (rows.whole(field, minimum=1) for field in VLLM[:2])
    sent_s, ttft_s, later_s = (rows.seconds(field) for field in ("start_times", "ttfts", "itls"))
    keep = rows.keep()
    tpot_s = later_s[keep] / np.maximum(1, output[keep] - 1)
    return Columns(sent_s[keep], prompt[keep], output[keep], ttft_s[keep], tpot_s, failed=int(failed.sum()))


def of_guidellm(table: Table, run: int) -> Columns:
    """The successful requests of one benchmark of a GuideLLM report."""
    runs = [one for cell in table.columns[GUIDELLM[0]] for one in (cell if isinstance(cell, list) else [cell])]
    by_status = _of(runs[_chosen(len(runs), run, table.source, "benchmarks")], "requests")
    requests = _of(by_status, "successful")
    if not isinstance(requests, list) or not requests or not all(isinstance(request, dict) for request in requests):
        raise TraceError(f"{table.source}: requests.successful: must list requests; save the report as JSON, whole")
    start = next((name for name in GUIDELLM_STARTS if any(name in request for request in requests)), GUIDELLM_STARTS[0])
    columns = {
        name: [request.get(name) for request in requests]
        for name in (start, *LENGTHS, "time_to_first_token_ms", "inter_token_latency_ms")
    }
    rows = Rows(
        Table(source=table.source, columns=columns, lines=list(range(1, len(requests) + 1))), skip_bad_rows=False
    )
    sent_s, ttft_ms = rows.seconds(start), rows.seconds("time_to_first_token_ms")
    prompt, output = (rows.whole(field, minimum=1) for field in LENGTHS)
    itl_ms = _where_several(rows, "inter_token_latency_ms", output)
    keep = rows.keep()
    cached = sum(count for request in requests if isinstance(count := request.get("cached_tokens"), int))
    failed = sum(len(found) for name in UNFINISHED if isinstance(found := _of(by_status, name), list))
    notes = _cached_note(cached, int(prompt[keep].sum()))
    return Columns(sent_s[keep], prompt[keep], output[keep], ttft_ms[keep] / 1e3, itl_ms[keep] / 1e3, failed, notes)


def of_aiperf(table: Table, _run: int) -> Columns:
    """The profiled requests of AIPerf; turns of conversations are refused, whose lengths may leave out what is past."""
    metadata, metrics = (table.columns[field] for field in AIPERF)
    errors = table.columns.get("error", [None] * len(table.lines))
    start = next((name for name in STARTS if any(_of(cell, name) is not None for cell in metadata)), STARTS[0])
    names = ("time_to_first_token", "ttft")
    first = next((name for name in names if any(_of(cell, name) is not None for cell in metrics)), names[0])
    lengths = ("input_sequence_length", "output_sequence_length")
    columns: dict[str, list[Any]] = {
        start: [_of(cell, start) for cell in metadata],
        **{name: [_value(cell, name) for cell in metrics] for name in (*lengths, first, "inter_token_latency")},
    }
    rows = Rows(Table(source=table.source, columns=columns, lines=table.lines), skip_bad_rows=False)
    warm = np.array([any(_of(cell, name) == "warmup" for name in PHASES) for cell in metadata])
    failed = ~warm & np.array([bool(error) for error in errors])
    _some_finished(failed | warm, table.source)
    rows.leave_out(failed | warm)
    if any(_of(cell, "turn_index") not in (None, 0) for cell in metadata):
        raise TraceError(
            f"{table.source}: turn_index: has turns of conversations, whose lengths may leave out what came before; "
            "profile requests of one turn"
        )
    sent_ns = rows.nanoseconds(start)
    prompt, output = (rows.whole(name, minimum=1) for name in lengths)
    ttft_ms, itl_ms = rows.seconds(first), _where_several(rows, "inter_token_latency", output)
    keep = rows.keep()
    sent_s = (sent_ns[keep] - sent_ns[keep].min()) / 1e9
    return Columns(
        sent_s, prompt[keep], output[keep], ttft_ms[keep] / 1e3, itl_ms[keep] / 1e3, failed=int(failed.sum())
    )


def _where_several(rows: Rows, name: str, output: Ints) -> Floats:
    """A time between tokens, which a request of one token has not."""
    values = rows.numbers(name)
    bad = (output > 1) & ~(np.isfinite(values) & (values >= 0))
    rows.reject(name, bad, "must be a finite number that is not negative, where there are several tokens")
    return values


def _mean_gap_s(first_s: Floats, last_s: Floats, output: Ints) -> Floats:
    return (last_s - first_s) / np.maximum(1, output - 1)


def _chosen(runs: int, run: int, source: str, what: str) -> int:
    if runs > 1 and not run:
        raise TraceError(f"{source}: holds {runs} {what}; choose one, as FILE:run=1 to FILE:run={runs}")
    if not 0 <= run <= runs or not runs:
        raise TraceError(f"{source}: run={run}: must be from 1 to {runs}")
    return max(run, 1) - 1


def _some_finished(gone: np.ndarray, source: str) -> None:
    if gone.all():
        raise TraceError(f"{source}: no request finished; measure a server that answers")


def _sum_s(gaps: Any) -> float | None:
    try:
        return math.fsum(gaps)
    except (TypeError, ValueError, OverflowError):
        return None


def _cached_note(cached: int, prompts: int) -> tuple[str, ...]:
    if cached < _CACHED_NOTE * prompts:
        return ()
    words = (
        f"the server took {cached / prompts:.0%} of the prompts from its prefix cache, and here they count whole; "
        "measure with prompts that differ, or without that cache"
    )
    return (words,)


def _of(cell: Any, field: str) -> Any:
    return cell.get(field) if isinstance(cell, dict) else None


def _value(cell: Any, field: str) -> Any:
    return _of(_of(cell, field), "value")
