"""The formats of tables and JSON files, in the order in which they are tried: how each is recognised, read and refused.

`kvsim trace list --formats` and `docs/traces.md` show this list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from traces import (
    aiperf,
    azure,
    bailian,
    bench,
    burstgpt,
    guidellm,
    llmperf,
    llmservingsim,
    mooncake,
    observed,
    otel,
    sharegpt,
    splitwise,
    tabular,
)
from traces.options import parse_pairs
from traces.schema import Trace, TraceError
from traces.table import Table
from traces.units import TimeUnit

OptionsT = TypeVar("OptionsT")
NONE = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class NoOptions:
    """Nothing to choose."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A format that is told from a file's columns or keys; `options` are what its reader lets one say.

    `draws` says whether the reader takes a seed.
    """

    name: str
    recognised_by: str
    times: str
    blocks: str
    refused: str
    matches: Callable[[Table, set[str]], bool]
    load: Callable[..., Trace]
    options: type = NoOptions
    draws: bool = False

    @property
    def option_names(self) -> str:
        """The names of its options, as in a trace's text."""
        return ", ".join(option.name for option in fields(self.options)) or NONE


SHOWN = ("name", "recognised_by", "times", "blocks", "refused", "option_names")
"""The columns of a table of formats."""


def as_markdown() -> str:
    """The table of `docs/traces.md`."""
    heads = ("format", "recognised by", "times", "block of an id", "refused, or asked for", "options")
    rows = [[str(getattr(known, name)) for name in SHOWN] for known in FORMATS]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


def _has(*columns: str) -> Callable[[Table, set[str]], bool]:
    return lambda _table, found: set(columns) <= found


def _has_mooncake(_table: Table, found: set[str]) -> bool:
    return mooncake.is_mooncake(found)


FORMATS = (
    Format(
        name="Qwen-Bailian",
        recognised_by="timestamp, input_length, output_length, chat_id, parent_chat_id",
        times="seconds",
        blocks="16 tokens",
        refused="whole numbers that would be fewer than one request in 100 s",
        matches=_has(*bailian.REQUIRED),
        load=bailian.load,
        options=bailian.Options,
    ),
    Format(
        name="Mooncake, Dynamo, AIPerf traces",
        recognised_by="timestamp, input_length, output_length; any of hash_ids, session_id, delay",
        times="whole milliseconds; delay after the answer before",
        blocks="512 tokens, or the one usual size that fits all rows",
        refused="fractions, over 100 requests/s, a start after day 11, columns of chats; sizes alike; turns in doubt",
        matches=_has_mooncake,
        load=mooncake.load,
        options=mooncake.Options,
        draws=True,
    ),
    Format(
        name="vLLM bench serve, SGLang bench_serving",
        recognised_by="input_lens, output_lens",
        times="start_times in seconds, or drawn by the client's own rules",
        blocks=NONE,
        refused="failed requests",
        matches=_has(*bench.COLUMNS),
        load=bench.load,
        options=bench.Options,
        draws=True,
    ),
    Format(
        name="GuideLLM report",
        recognised_by="benchmarks, each with requests.successful",
        times="seconds since 1970",
        blocks=NONE,
        refused="several benchmarks, unless run= chooses one",
        matches=_has(guidellm.COLUMN),
        load=guidellm.load,
        options=guidellm.Options,
    ),
    Format(
        name="AIPerf records",
        recognised_by="metadata, metrics.input_sequence_length",
        times="nanoseconds since 1970",
        blocks=NONE,
        refused="failed and cancelled requests; turns in doubt",
        matches=lambda table, _found: aiperf.is_aiperf(table),
        load=aiperf.load,
        options=aiperf.Options,
    ),
    Format(
        name="kvsim observe records",
        recognised_by="kvsim_observe, status, sent_s",
        times="seconds since the first request was due",
        blocks=NONE,
        refused="requests that failed are left out",
        matches=_has(*observed.COLUMNS),
        load=observed.load,
    ),
    Format(
        name="OpenTelemetry spans",
        recognised_by="resourceSpans, or name, attributes and startTimeUnixNano or start_time",
        times="nanoseconds since 1970, or ISO 8601",
        blocks=NONE,
        refused="spans without gen_ai.usage lengths",
        matches=lambda _table, found: otel.is_otel(found),
        load=otel.load,
    ),
    Format(
        name="LLMPerf responses",
        recognised_by="number_input_tokens, number_output_tokens",
        times="none: rate_rps must be stated",
        blocks=NONE,
        refused="failed requests",
        matches=_has(*llmperf.COLUMNS),
        load=llmperf.load,
        options=llmperf.Options,
        draws=True,
    ),
    Format(
        name="ShareGPT conversations",
        recognised_by="conversations of from and value (or role and content)",
        times="none: rate_rps must be stated, and turns and think_s",
        blocks=NONE,
        refused="without chars_per_token; empty answers",
        matches=_has(sharegpt.COLUMN),
        load=sharegpt.load,
        options=sharegpt.Options,
        draws=True,
    ),
    Format(
        name="BurstGPT",
        recognised_by="Timestamp, Request tokens, Response tokens",
        times="seconds",
        blocks=NONE,
        refused="requests without a response are left out",
        matches=_has(*burstgpt.COLUMNS),
        load=burstgpt.load,
        options=TimeUnit,
    ),
    Format(
        name="splitwise-sim",
        recognised_by="arrival_timestamp, prompt_size, token_size",
        times="seconds",
        blocks=NONE,
        refused="a batch_size other than 1",
        matches=_has(*splitwise.COLUMNS),
        load=splitwise.load,
        options=TimeUnit,
    ),
    Format(
        name="LLMServingSim",
        recognised_by="arrival_time_ns, input_toks, output_toks",
        times="nanoseconds",
        blocks="none, or of block_tokens, named by input_tok_ids",
        refused="lists of tokens that are not as long as stated",
        matches=_has(*llmservingsim.COLUMNS),
        load=llmservingsim.load,
        options=llmservingsim.Options,
    ),
    Format(
        name="Azure",
        recognised_by="TIMESTAMP, ContextTokens, GeneratedTokens",
        times="ISO 8601, in UTC or with a zone",
        blocks=NONE,
        refused="times in other forms",
        matches=_has(*azure.COLUMNS),
        load=azure.load,
    ),
    Format(
        name="plain table",
        recognised_by="arrived_at, num_prefill_tokens, num_decode_tokens",
        times="seconds; without arrived_at rate_rps must be stated",
        blocks="its column block_tokens, or the one usual size that fits all rows",
        refused="several sizes that fit",
        matches=_has(*tabular.PLAIN.required[1:]),
        load=tabular.load,
        options=tabular.Options,
        draws=True,
    ),
)


def load_table(table: Table, options: str, *, name: str, seed: int, skip_bad_rows: bool) -> Trace:
    """The trace of a table in the first format that its columns fit; raises TraceError where none does."""
    columns = set(table.columns)
    for known in FORMATS:
        if known.matches(table, columns):
            if known.options is NoOptions:
                parse_pairs(options, {}, f"{name} option")
                return known.load(table, name=name, skip_bad_rows=skip_bad_rows)
            drawn = {"seed": seed} if known.draws else {}
            chosen: Any = read_options(known.options, options)
            return known.load(table, chosen, name=name, skip_bad_rows=skip_bad_rows, **drawn)
    if columns >= set(bench.SUMMARY):
        raise bench.undetailed(table.source, table.lines[0])
    required = (tabular.PLAIN.required, mooncake.COLUMNS.required, azure.COLUMNS)
    nearest = max(required, key=lambda own: len(columns & set(own)))
    missing = ", ".join(column for column in nearest if column not in columns)
    held = ", ".join(sorted(columns)) or "none"
    raise TraceError(
        f"{table.source}: missing column {missing}; it has {held if len(held) <= 200 else held[:200] + '...'}; "
        f"a trace has {' or '.join('/'.join(own) for own in required)}, or is in another format of "
        "`kvsim trace list --formats`"
    )


def read_options(kind: type[OptionsT], text: str) -> OptionsT:
    """A reader's options from their text; each field is read by its own type."""
    readers: Mapping[str, Callable[[str], Any]] = {option.name: type(option.default) for option in fields(kind)}  # type: ignore[arg-type]
    return kind(**parse_pairs(text, readers, "trace option"))
