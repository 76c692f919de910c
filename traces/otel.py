"""OpenTelemetry spans of LLM requests: those of vLLM servers, and of whoever follows the GenAI semantic conventions.

Formats: OTLP in JSON (`resourceSpans`), as a collector's file exporter writes it, an object a line or one for all; and
one span an object, as SDKs' console exporters write them (`attributes` as an object, `start_time` in ISO 8601).
vllm-project/vllm names its attributes in `vllm/tracing.py` (commit 03b8a674, 2026): a span `llm_request` a request,
from its arrival on, with `gen_ai.usage.prompt_tokens` and `gen_ai.usage.completion_tokens`. The semantic conventions
(1.37) call them `gen_ai.usage.input_tokens` and `output_tokens`, of spans whose `gen_ai.operation.name` is one of
OPERATIONS; OpenLLMetry has `llm.request.type` for that.

Spans of other names are left out, and so are those around another one of these, whose tokens would count twice. An
output of several choices counts as one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from traces.azure import clock_ns
from traces.checks import Rows
from traces.schema import Trace, TraceError
from traces.table import Table
from traces.tabular import finish

COLUMNS = ("resourceSpans", "resource_spans")
SPAN = "llm_request"
OPERATIONS = ("chat", "text_completion", "generate_content", "completion")
OPERATION, OPENLLMETRY = "gen_ai.operation.name", "llm.request.type"
SESSION = "gen_ai.conversation.id"
START = "startTimeUnixNano"
PROMPTS = ("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens")
OUTPUTS = ("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens")


@dataclass(slots=True)
class _Span:
    line: int
    start: Any
    values: dict[str, Any]
    own: tuple[str, str]  # its trace and its number there, and those of the span around it
    parent: tuple[str, str]
    is_request: bool


def is_otel(columns: set[str]) -> bool:
    """Whether these are the columns of OTLP in JSON, or of single spans."""
    starts = {START, "start_time_unix_nano", "start_time"}
    return bool(set(COLUMNS) & columns) or ({"name", "attributes"} <= columns and bool(starts & columns))


def load(table: Table, *, name: str, skip_bad_rows: bool = False) -> Trace:
    """The requests of the spans, by arrival; time 0 is the first one's, whose clock time a note keeps."""
    spans = list(_all_spans(table))
    inner, around = _innermost(spans)
    if not inner:
        raise TraceError(
            f"{table.source}: empty trace: no spans named {SPAN}, which vLLM writes for each request, and none with "
            f"{PROMPTS[0]}, as the GenAI conventions name it"
        )
    prompt_field, output_field = (_used(inner, fields) for fields in (PROMPTS, OUTPUTS))
    columns: dict[str, list[Any]] = {
        START: [str(span.start) for span in inner],
        prompt_field: [_first(span.values, PROMPTS) for span in inner],
        output_field: [_first(span.values, OUTPUTS) for span in inner],
        SESSION: [span.values.get(SESSION) for span in inner],
    }
    lines = [span.line for span in inner]
    read = Table(source=table.source, is_text=True, columns=columns, lines=lines, skipped_rows=table.skipped_rows)
    rows = Rows(read, skip_bad_rows=skip_bad_rows)
    start_ns, bad = _starts_ns(columns[START])
    rows.reject(START, bad, "must be the nanoseconds since 1970, or the ISO 8601 time, at which the request arrived")
    prompt, output = (rows.whole(field, minimum=1) for field in (prompt_field, output_field))
    first_ns = int(start_ns[rows.keep()].min())
    notes = [f"time 0 is {np.datetime64(first_ns, 'ns')} UTC"]
    if around:
        notes.append(f"{around} spans around those of requests were left out, whose tokens they repeat")
    known = any(cell is not None for cell in columns[SESSION])
    return finish(
        rows,
        name=name,
        arrival_s=(start_ns - first_ns) / 1e9,
        prompt=prompt,
        output=output,
        session=rows.sessions(SESSION) if known else None,
        notes=tuple(notes),
    )


def _used(spans: list[_Span], fields: tuple[str, str]) -> str:
    """What these spans call a length, for messages."""
    return next((field for field in fields if any(field in span.values for span in spans)), fields[0])


def _first(values: dict[str, Any], fields: tuple[str, ...]) -> Any:
    return next((values[field] for field in fields if values.get(field) is not None), None)


def _innermost(spans: list[_Span]) -> tuple[list[_Span], int]:
    """The spans of requests that hold no other one, and how many hold one."""
    parents = {span.own: span.parent for span in spans if span.own[1]}
    around = set[tuple[str, str]]()
    for span in spans:
        if span.is_request:
            at, steps = span.parent, 0
            while at in parents and at not in around and at != span.own and steps < 1000:
                around.add(at)
                at, steps = parents[at], steps + 1
    requests = [span for span in spans if span.is_request]
    inner = [span for span in requests if span.own not in around or not span.own[1]]
    return inner, len(requests) - len(inner)


def _all_spans(table: Table) -> Iterator[_Span]:
    nested = next((field for field in COLUMNS if field in table.columns), None)
    if nested is None:
        names = list(table.columns)
        for line, *cells in zip(table.lines, *table.columns.values(), strict=True):
            row = dict(zip(names, cells, strict=True))
            yield _checked(row, line, table.source, "attributes")
        return
    for line, entry in zip(table.lines, table.columns[nested], strict=True):
        try:
            for resource in entry or ():
                for scope in resource["scopeSpans"] if "scopeSpans" in resource else resource["scope_spans"]:
                    for span in scope.get("spans") or ():
                        yield _checked(span, line, table.source, nested)
        except (KeyError, TypeError, AttributeError) as error:
            raise _malformed(table.source, line, nested, error) from error


def _checked(span: dict[str, Any], line: int, source: str, field: str) -> _Span:
    try:
        return _span(span, line)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _malformed(source, line, field, error) from error


def _malformed(source: str, line: int, field: str, error: Exception) -> TraceError:
    rule = f"must be spans of OTLP in JSON; {type(error).__name__}: {str(error)[:80]}"
    return TraceError.at(source, line, field, "malformed", rule)


def _span(span: dict[str, Any], line: int) -> _Span:
    held = span.get("attributes") or {}
    values = dict(held) if isinstance(held, dict) else {pair["key"]: _value(pair["value"]) for pair in held}
    operation = values.get(OPERATION, values.get(OPENLLMETRY))
    is_request = span.get("name") == SPAN or (
        _first(values, PROMPTS) is not None if operation in OPERATIONS else operation is None and PROMPTS[0] in values
    )
    start = _start(span) if is_request else None
    context: Any = span.get("context")
    named = {**context, **span} if isinstance(context, dict) else span
    whose, number = (str(_key(named, field, field) or "") for field in ("traceId", "spanId"))
    parent = str(_key(span, "parentSpanId", "parent_id") or "")
    return _Span(line, start, values, (whose, number), (whose, parent), is_request)


def _start(span: dict[str, Any]) -> Any:
    """When a span began; under a name without a unit a number counts only as nanoseconds since 1970 can."""
    start = _key(span, START, "start_time")
    if start is None:
        raise KeyError(START)
    if start is span.get("start_time") and str(start).isdecimal() and len(str(start)) < 18:
        return f"{start} of no unit"
    return start


def _key(span: dict[str, Any], name: str, other: str) -> Any:
    """What is under a name as OTLP in JSON has it, as Protobuf has it, or under another."""
    snake = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)
    return next((span[key] for key in (name, snake, other) if span.get(key) is not None), None)


def _value(value: dict[str, Any]) -> Any:
    """An attribute's value; OTLP writes 64-bit integers as text, and some exporters as numbers."""
    whole = value.get("intValue", value.get("int_value"))
    return str(whole) if whole is not None else next(iter(value.values()), None)


def _starts_ns(texts: list[str]) -> tuple[Any, Any]:
    """Nanoseconds since 1970, and which are none; a text of digits counts them."""
    digits = np.array([text.isdecimal() and len(text) <= 19 and 0 < int(text) < 2**63 for text in texts])
    clock = clock_ns(["" if counted else text for text, counted in zip(texts, digits, strict=True)])
    bad = ~digits & np.isnat(clock)
    of_clock = np.where(np.isnat(clock), 0, clock.astype(np.int64))
    return np.array([int(t) if c else int(o) for t, c, o in zip(texts, digits, of_clock, strict=True)], np.int64), bad
