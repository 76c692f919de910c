"""Request logs of vLLM servers: the lines of `--enable-log-requests` and `--enable-log-outputs`.

Formats: vllm-project/vllm, `vllm/entrypoints/logger.py` at commits 01ff1262 (2025, prompt in the INFO line) and
63c2b7ab (2026, prompt in a DEBUG line), `vllm/logging_utils/formatter.py` at 00634b8a; lines as in that project's
issues 2731 (0.3), 9023 (0.6), 34503 and 43267 (2026). A line's clock has no year, no zone and no fractions of a second.

The prompt's length is known where `prompt_token_ids` lists the prompt, the output's where finish lines list theirs.
Deltas of a stream are added up; vLLM logs none for a token that made no text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from traces.arrivals import spread
from traces.checks import Rows
from traces.log_text import QUOTED, cell, without_text
from traces.schema import Floats, Trace, TraceError
from traces.table import Table

_STAMP = re.compile(r"""[^'"]*?\b(?:DEBUG|INFO) (\d\d)-(\d\d) (\d\d):(\d\d):(\d\d) \[?[\w./]+:\d+\] """)
_EVENT = re.compile(
    r"(?:Received request (?P<received>\S+)|Request (?P<details>\S+) details|"
    r"Generated response (?P<generated>\S+)(?: \(streaming \w+\))?): "
)
_PROMPT = re.compile(rf"prompt: ({QUOTED})", re.DOTALL)
_ESCAPE = re.compile(r"\\(?:x..|u.{4}|U.{8}|.)")
_IDS = re.compile(r"(?:prompt|output)_token_ids: \[([^\]]*)\]")
_LIMIT = re.compile(r"\bmax_tokens=(\d+)")
_STREAMED = re.compile(r"output: '<streaming_complete: (\d+) tokens>', ")
_LOG_LIMIT = re.compile(r"\bmax_log_len'?[:=] ?(\d+)")
OUTPUTS = ("generated", "max_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What to take for what the log does not say.

    `output` "max_tokens" takes each request's limit for its output, for servers without output logs or runs that ignore
    the end of text; `chars_per_token` above 0 estimates the length of a prompt whose tokens are not listed; `spread_s`
    moves every arrival later by a uniform draw from [0, spread_s), as the clock has whole seconds only.
    """

    output: str = "generated"
    chars_per_token: float = 0.0
    spread_s: float = 0.0

    def __post_init__(self) -> None:
        if self.output not in OUTPUTS:
            raise TraceError(f"output={self.output}: must be one of {', '.join(OUTPUTS)}")
        if not (math.isfinite(self.chars_per_token) and self.chars_per_token >= 0):
            raise TraceError(f"chars_per_token={self.chars_per_token}: must be finite and not negative; 0 guesses none")


@dataclass(slots=True)
class _Request:
    line: int
    stamp: tuple[int, ...]
    prompt: int | None
    chars: int | None
    limit: str | None
    output: int | None = None


def is_request(line: str) -> bool:
    """Whether the line is one of a vLLM request log."""
    stamp = _STAMP.match(line)
    return stamp is not None and _EVENT.match(line, stamp.end()) is not None


def load(
    lines: Iterable[tuple[int, str]],
    options: Options,
    *,
    source: str,
    name: str,
    seed: int = 0,
    skip_bad_rows: bool = False,
) -> Trace:
    """The requests of a log's numbered lines; one without a finish line, or without a length, is a bad row."""
    requests = _read(lines)
    estimated = 0
    for request in requests:
        if request.prompt is None and request.chars and options.chars_per_token:
            request.prompt, estimated = math.ceil(request.chars / options.chars_per_token), estimated + 1
    by_limit = options.output == "max_tokens"
    output_field = "max_tokens" if by_limit else "output_token_ids"
    table = Table(
        source=source,
        is_text=True,
        columns={
            "time": ["{:02}-{:02} {:02}:{:02}:{:02}".format(*request.stamp) for request in requests],
            "prompt_token_ids": [cell(request.prompt) for request in requests],
            output_field: [request.limit if by_limit else cell(request.output) for request in requests],
        },
        lines=[request.line for request in requests],
    )
    rows = Rows(table, skip_bad_rows=skip_bad_rows)
    time_s = _times_s([request.stamp for request in requests])
    rows.reject("time", np.isnan(time_s), "must be a date and time written MM-DD hh:mm:ss")
    rows.reject(
        "prompt_token_ids",
        np.array([request.prompt is None for request in requests]),
        "must list all tokens of the prompt; log at VLLM_LOGGING_LEVEL=DEBUG without --max-log-len, import the "
        "server's OpenTelemetry spans, or estimate with the option chars_per_token=4",
    )
    missing = np.array([text is None for text in table.columns[output_field]])
    rule = "the request's finish line, which lists its tokens, is missing; log with --enable-log-outputs, "
    rows.reject(output_field, missing, f"{rule}take the option output=max_tokens, or skip bad rows")
    prompt = rows.whole("prompt_token_ids", minimum=1)
    output = rows.whole(output_field, minimum=1)
    keep = rows.keep()
    first = int(np.flatnonzero(keep)[np.argmin(time_s[keep])])
    notes = [f"time 0 is {table.columns['time'][first]} by the server's clock; the log has no year, zone or fraction"]
    if estimated:
        notes.append(f"{estimated} prompt lengths are estimated at {options.chars_per_token:g} characters a token")
    if by_limit:
        notes.append("outputs are the requests' limits (max_tokens), not what was generated")
    trace = Trace.from_columns(
        name=name,
        arrival_s=time_s[keep] - time_s[first],
        prompt_tokens=prompt[keep],
        output_tokens=output[keep],
        skipped_rows=rows.skipped_rows,
        notes=notes,
    )
    return spread(trace, options.spread_s, seed)


def _read(lines: Iterable[tuple[int, str]]) -> list[_Request]:
    requests: list[_Request] = []
    latest: dict[str, _Request] = {}
    details: dict[str, tuple[int | None, int | None]] = {}
    log_limit = math.inf
    for number, line in lines:
        stamp = _STAMP.match(line)
        event = stamp and _EVENT.match(line, stamp.end())
        if not stamp or not event:
            cut = _LOG_LIMIT.search(line) if "max_log_len" in line else None
            log_limit = int(cut[1]) if cut else log_limit
            continue
        rest = line[event.end() :]
        plain = without_text(rest)
        if event["generated"]:
            request = latest.get(event["generated"])
            ids, streamed = _count(plain), _STREAMED.match(rest)
            if request and ids is not None:
                request.output = (request.output or 0) + ids
            elif request and streamed and not request.output:
                request.output = int(streamed[1])
            continue
        prompt, text = _count(plain), _PROMPT.match(rest)
        chars = len(_ESCAPE.sub("?", text[1])) - 2 if text else None
        whole = (
            (prompt if prompt is None or prompt < log_limit else None),
            (chars if (chars or 0) < log_limit else None),
        )
        if event["details"]:
            details[event["details"]] = whole
            continue
        if whole == (None, None):
            whole = details.pop(event["received"], whole)
        limit = _LIMIT.search(plain)
        request = _Request(number, tuple(map(int, stamp.groups())), *whole, limit[1] if limit else None)
        latest[event["received"]] = request
        requests.append(request)
    return requests


def _count(plain: str) -> int | None:
    """How many token ids the message lists; None when it lists none."""
    ids = _IDS.search(plain)
    return None if ids is None or not ids[1].strip() else ids[1].count(",") + 1


def _times_s(stamps: list[tuple[int, ...]]) -> Floats:
    """Seconds of (month, day, hour, minute, second) stamps; a log that runs into January goes on in the next year."""
    leap = any(stamp[:2] == (2, 29) for stamp in stamps)
    start = 2000 if leap else 2001
    years, last = 0, stamps[0][0] if stamps else 1
    times = []
    for month, day, hour, minute, second in stamps:
        late = month - last > 6  # a line of last year that came after one of this year
        if month - last < -6:
            years += 1
        last = last if late else month
        try:
            times.append(datetime(start + years - late, month, day, hour, minute, second, tzinfo=UTC).timestamp())
        except ValueError:
            times.append(math.nan)
    return np.array(times)
