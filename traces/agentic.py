"""Coding-agent sessions with block ids (kv-cache-tester): the original archive, and a small packed form of it.

In the source a session's block ids are numbered as they are first seen, so nearly every prompt is a few runs of
consecutive ids. The packed form (.npz) stores those runs: 94 million ids in 165 thousand runs, and a part of the trace
is expanded without the rest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
from numpy.typing import NDArray

from traces.archive import members
from traces.npz import read_npz
from traces.schema import MAX_BLOCKS, MAX_TOKENS, Trace, TraceError, expand_runs

_INT32_MAX = 2**31 - 1
SLOWEST_PER_S = 1e-9  # a session in thirty years
STARTS = ("poisson", "together")
_OF_REQUESTS = ("session", "model", "time_s", "think_s", "prompt_tokens", "output_tokens", "runs")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """When sessions start, which the source does not record: `poisson` at `session_rate_per_s`, or all `together`.

    At the default rate the 710 sessions start within about four hours; their median length is one hour.
    """

    start: str = "poisson"
    session_rate_per_s: float = 0.05

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise TraceError(f"start={self.start}: must be one of {', '.join(STARTS)}")
        if not (math.isfinite(self.session_rate_per_s) and self.session_rate_per_s >= SLOWEST_PER_S):
            raise TraceError(
                f"session_rate_per_s={self.session_rate_per_s}: must be finite and above 0, at least {SLOWEST_PER_S:g}"
            )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sessions:
    """All requests in file order, those of sub-agents at their marker's place, with block ids as runs.

    `time_s` counts from the session's start; `think_s` is NaN when unknown; request i has `runs[i]` runs of consecutive
    ids, `run_length` ids from `run_start` on. Ids are local to the session.
    """

    session_names: NDArray[np.str_]
    models: NDArray[np.str_]
    block_tokens: NDArray[np.int64]
    session: NDArray[np.int32]
    model: NDArray[np.int32]
    time_s: NDArray[np.float64]
    think_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    runs: NDArray[np.int32]
    run_start: NDArray[np.int32]
    run_length: NDArray[np.int32]

    def save(self, path: Path) -> None:
        """Write the packed form."""
        np.savez_compressed(path, **asdict(self))

    @classmethod
    def read(cls, path: Path) -> Sessions:
        """Read the packed form; TraceError for a file that is none, or whose columns do not fit each other."""
        try:
            stored = read_npz(path)
            sessions = cls(**{column.name: stored[column.name] for column in fields(cls)})
        except KeyError as error:
            raise TraceError(f"{path}: truncated archive, or not packed agentic sessions ({error})") from None
        except ValueError as error:
            if isinstance(error, TraceError):
                raise
            raise TraceError(f"{path}: truncated archive, or not packed agentic sessions ({error})") from None
        if (fault := sessions.fault()) is not None:
            raise TraceError(f"{path}: not packed agentic sessions: {fault}; pack them again")
        return sessions

    def fault(self) -> str | None:
        """What is wrong with the columns, if anything: their types, lengths, ranges, and the sums that runs make."""
        for column in fields(self):
            array, wanted = (
                getattr(self, column.name),
                get_args(get_args(get_type_hints(type(self))[column.name])[1])[0],
            )
            if not np.issubdtype(array.dtype, wanted):
                return f"{column.name} holds {array.dtype}, not {wanted.__name__}"
            if array.ndim != (0 if column.name == "block_tokens" else 1):
                return f"{column.name} has the shape {array.shape}"
        lengths = {name: len(getattr(self, name)) for name in _OF_REQUESTS}
        if len(set(lengths.values())) > 1 or not lengths["session"]:
            return f"each request needs one of {', '.join(_OF_REQUESTS)}"
        if len(self.run_start) != len(self.run_length) or int(self.runs.astype(np.int64).sum()) != len(self.run_start):
            return "runs does not add up to the runs there are"
        for name in ("session", "model", "output_tokens", "runs", "run_start"):
            if (getattr(self, name) < 0).any():
                return f"{name} has a number below 0"
        for name in ("prompt_tokens", "run_length", "block_tokens"):
            if (getattr(self, name) < 1).any():
                return f"{name} has a number below 1"
        if self.prompt_tokens.max() > MAX_TOKENS or int(self.run_length.astype(np.int64).sum()) > MAX_BLOCKS:
            return f"prompts may have {MAX_TOKENS:,} tokens each, and {MAX_BLOCKS:,} block ids together"
        if self.session.max() >= len(self.session_names) or self.model.max() >= len(self.models):
            return "a request is of a session or model that has no name"
        if not (np.isfinite(self.time_s) & (self.time_s >= 0)).all():
            return "time_s must be finite and not negative"
        if not ((self.think_s >= 0) | np.isnan(self.think_s)).all():
            return "think_s must not be negative"
        request = np.repeat(np.arange(len(self.runs)), self.runs)
        blocks = np.bincount(request, weights=self.run_length, minlength=len(self.runs))
        if (blocks != self.prompt_tokens // int(self.block_tokens)).any():
            return "a prompt has other than one id for each of its full blocks"
        return None


def to_trace(sessions: Sessions, options: Options, *, name: str, seed: int = 0, limit: int | None = None) -> Trace:
    """The sessions' first `limit` requests as one trace: arrivals are open-loop, session start + recorded time.

    Requests without output (failed or cut) are left out and counted. KV cannot be shared across models, so ids are
    those of a (session, model).
    """
    started_s = np.zeros(len(sessions.session_names))
    if options.start == "poisson":
        gaps_s = np.random.default_rng(seed).exponential(1 / options.session_rate_per_s, len(started_s))
        started_s = np.cumsum(gaps_s) - gaps_s[0]
    arrival_s = started_s[sessions.session] + sessions.time_s
    order = np.argsort(arrival_s, kind="stable")
    served = order[sessions.output_tokens[order] > 0]
    kept = served[:limit]
    empty = len(order) - len(served)

    first_id = _first_id(sessions)
    first_run = np.cumsum(sessions.runs) - sessions.runs
    run = expand_runs(first_run[kept], sessions.runs[kept])
    starts = sessions.run_start[run] + np.repeat(first_id[kept], sessions.runs[kept])
    lengths = sessions.run_length[run]
    request = np.repeat(np.arange(len(kept)), sessions.runs[kept])
    starts_note = (
        f"Poisson at {options.session_rate_per_s:g}/s (seed {seed})" if options.start == "poisson" else "together"
    )
    return Trace.from_columns(
        name=name,
        arrival_s=arrival_s[kept],
        prompt_tokens=sessions.prompt_tokens[kept],
        output_tokens=sessions.output_tokens[kept],
        session=sessions.session[kept],
        think_s=sessions.think_s[kept],
        block_tokens=int(sessions.block_tokens),
        block_ids=expand_runs(starts.astype(np.int32), lengths),
        block_counts=np.bincount(request, weights=lengths, minlength=len(kept)).astype(np.int64),
        skipped_rows=empty,
        notes=(
            f"session starts are not recorded: {starts_note}; arrivals are open-loop, session start + recorded time",
            f"{empty} requests of the archive produced no output and were skipped",
        ),
    )


def _first_id(sessions: Sessions) -> NDArray[np.int64]:
    """What to add to a request's local ids so that every (session, model) has a range of its own."""
    space = sessions.session.astype(np.int64) * len(sessions.models) + sessions.model
    used = np.zeros(len(sessions.session_names) * len(sessions.models), np.int64)
    np.maximum.at(used, np.repeat(space, sessions.runs), sessions.run_start + sessions.run_length)
    return np.asarray((np.cumsum(used) - used)[space])


@dataclass(slots=True)
class _Columns:
    """The growing columns while an archive is read."""

    session_names: list[str] = field(default_factory=list)
    models: dict[str, int] = field(default_factory=dict)
    rows: list[tuple[int, int, float, float, int, int, int]] = field(default_factory=list)
    run_start: list[int] = field(default_factory=list)
    run_length: list[int] = field(default_factory=list)


def read_archive(path: Path) -> Sessions:
    """The sessions of the source's tar archive (one JSON object a file), in the archive's order.

    Raises TraceError for a truncated archive and for the first request that breaks a rule.
    """
    columns, block_tokens = _Columns(), set()
    for member, text in members(path):
        source = f"{path}/{member}"
        try:
            session = json.loads(text)
            session_name, size = session["id"], int(session["block_size"])
            requests = list(_requests(session["requests"]))
        except (TypeError, OverflowError, RecursionError):
            raise TraceError(
                f"{source}: not an agentic session; must be an object with id, block_size and requests"
            ) from None
        except (ValueError, KeyError) as error:
            raise TraceError(
                f"{source}: not an agentic session ({type(error).__name__}: {error}); pack it as published"
            ) from error
        if not 0 < size <= MAX_TOKENS or not isinstance(session_name, str):
            raise TraceError(f"{source}: block_size={size} must be from 1 to {MAX_TOKENS:,} tokens, and id text")
        for number, (start_s, request) in enumerate(requests, 1):
            if not isinstance(request, dict):
                raise TraceError.at(source, number, "request", request, "must be an object with in, out, t and model")
            _append(columns, request, start_s, source, number, size)
        block_tokens.add(size)
        columns.session_names.append(session_name)
    if not columns.rows:
        raise TraceError(f"{path}: empty trace: no requests in the archive's {len(columns.session_names)} sessions")
    if len(block_tokens) != 1:
        raise TraceError(f"{path}: block_size={sorted(block_tokens)}: must be one size in all sessions")
    session_of, model, time_s, think_s, prompt, output, runs = zip(*columns.rows, strict=True)
    return Sessions(
        session_names=np.array(columns.session_names),
        models=np.array(list(columns.models)),
        block_tokens=np.array(block_tokens.pop()),
        session=np.array(session_of, np.int32),
        model=np.array(model, np.int32),
        time_s=np.array(time_s),
        think_s=np.array(think_s),
        prompt_tokens=np.array(prompt, np.int32),
        output_tokens=np.array(output, np.int32),
        runs=np.array(runs, np.int32),
        run_start=np.array(columns.run_start, np.int32),
        run_length=np.array(columns.run_length, np.int32),
    )


def _requests(elements: Iterable[Any]) -> Iterator[tuple[float, Any]]:
    """(seconds to add to the request's own time, request), sub-agents' requests in the place of their marker."""
    for element in elements:
        if element["type"] == "subagent":
            if not isinstance(element["t"], int | float) or not 0 <= element["t"] < math.inf:
                raise TypeError("a sub-agent's t")
            yield from ((element["t"], request) for request in element["requests"])
        else:
            yield 0.0, element


def _append(columns: _Columns, request: Any, start_s: float, source: str, number: int, block_tokens: int) -> None:
    def require(name: str, good: bool, rule: str) -> None:
        if not good:
            raise TraceError.at(source, number, name, request.get(name), rule)

    for name, minimum in (("in", 1), ("out", 0)):
        value = request.get(name)
        whole = type(value) is int and minimum <= value <= _INT32_MAX
        require(name, whole, f"must be a whole number of tokens from {minimum} to {_INT32_MAX}")
    think_s = request.get("think_time")
    for name, value in (("t", request.get("t")), ("think_time", math.nan if think_s is None else think_s)):
        known = isinstance(value, (int, float)) and (0 <= value < math.inf or (name != "t" and math.isnan(value)))
        require(name, known, "must be a finite number of seconds that is not negative")
    require("model", isinstance(request.get("model"), str), "must be the model's name")
    ids, full = request.get("hash_ids"), request["in"] // block_tokens
    whole = isinstance(ids, list) and set(map(type, ids)) <= {int} and all(0 <= i < _INT32_MAX for i in ids)
    require("hash_ids", whole, f"must be a list of whole numbers from 0 to {_INT32_MAX - 1}")
    require("hash_ids", len(ids) == full, f"must have one id for each of the prompt's {full} full blocks")

    array = np.array(ids, np.int64)
    breaks = np.flatnonzero(np.diff(array, prepend=-2) != 1)
    columns.run_start.extend(array[breaks].tolist())
    columns.run_length.extend(np.diff(breaks, append=len(array)).tolist())
    if number == 1 or think_s is None:  # the first request of a session follows none: its delay is no think time
        think_s = math.nan
    model = columns.models.setdefault(request["model"], len(columns.models))
    time_s = round(start_s + request["t"], 6)  # recorded in tenths: the sum's rounding error goes
    row = (len(columns.session_names), model, time_s, think_s, request["in"], request["out"], len(breaks))
    columns.rows.append(row)
