"""OpenTelemetry spans of vLLM servers (`--otlp-traces-endpoint`), as an OTLP collector's file exporter writes them.

Formats: one OTLP/JSON object (`resourceSpans`) a line. vllm-project/vllm names its attributes in `vllm/tracing.py`
(commit 03b8a674, 2026): a span `llm_request` a request, from its arrival on (`do_tracing` of
`vllm/v1/engine/output_processor.py`), with its lengths as `gen_ai.usage.prompt_tokens` and
`gen_ai.usage.completion_tokens`. Spans of other names are left out. An output of several choices counts as one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from traces.checks import Rows
from traces.schema import Trace, TraceError
from traces.table import Table

COLUMN = "resourceSpans"
SPAN = "llm_request"
START = "startTimeUnixNano"
LENGTHS = ("gen_ai.usage.prompt_tokens", "gen_ai.usage.completion_tokens")


def load(table: Table, *, name: str, skip_bad_rows: bool = False) -> Trace:
    """The requests of the spans, by arrival; time 0 is the first one's, whose clock time a note keeps."""
    columns: dict[str, list[Any]] = {field: [] for field in (START, *LENGTHS)}
    lines = []
    for line, entry in zip(table.lines, table.columns[COLUMN], strict=True):
        try:
            for span in _spans(entry):
                values = {attribute["key"]: _value(attribute["value"]) for attribute in span["attributes"]}
                columns[START].append(str(span[START]))
                for field in LENGTHS:
                    columns[field].append(values.get(field))
                lines.append(line)
        except (KeyError, TypeError, AttributeError) as error:
            rule = f"must be spans of OTLP in JSON; {type(error).__name__}: {error}"
            raise TraceError.at(table.source, line, COLUMN, "malformed", rule) from error
    if not lines:
        raise TraceError(f"{table.source}: empty trace: no spans named {SPAN}, which vLLM writes for each request")
    spans = Table(source=table.source, is_text=True, columns=columns, lines=lines, skipped_rows=table.skipped_rows)
    rows = Rows(spans, skip_bad_rows=skip_bad_rows)
    digits = np.array([text.isdecimal() and 0 < int(text) < 2**63 for text in columns[START]])
    rows.reject(START, ~digits, "must be the nanoseconds since 1970 at which the request arrived")
    prompt, output = (rows.whole(field, minimum=1) for field in LENGTHS)
    keep = rows.keep()
    start_ns = np.array([int(text) if good else 0 for text, good in zip(columns[START], digits, strict=True)], np.int64)
    first_ns = start_ns[keep].min()
    return Trace.from_columns(
        name=name,
        arrival_s=(start_ns[keep] - first_ns) / 1e9,
        prompt_tokens=prompt[keep],
        output_tokens=output[keep],
        skipped_rows=rows.skipped_rows,
        notes=(f"time 0 is {np.datetime64(int(first_ns), 'ns')} UTC",),
    )


def _spans(entry: Any) -> Iterator[dict[str, Any]]:
    for resource in entry or ():
        for scope in resource["scopeSpans"]:
            yield from (span for span in scope["spans"] if span.get("name") == SPAN)


def _value(value: dict[str, Any]) -> Any:
    """An attribute's value; OTLP writes 64-bit integers as text, and some exporters as numbers."""
    return str(value["intValue"]) if "intValue" in value else next(iter(value.values()), None)
