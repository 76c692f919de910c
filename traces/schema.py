"""One request trace as numpy columns: what every loader and generator produces and every consumer reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Codes = NDArray[np.int32]


MAX_TOKENS = 10_000_000
"""The longest prompt or output that is taken for real: the longest context that a model is offered with (Llama 4)."""


MAX_REQUESTS = 10_000_000
"""The most requests that are drawn: a million take 2 GB to simulate."""


MAX_BLOCKS = 1 << 28
"""The most block ids that prompts are given or expanded to: the longest published trace has a third of them."""


class TraceError(ValueError):
    """A trace, or a text that names one, breaks a rule; the message says where, which value, which rule and the fix."""

    @classmethod
    def at(cls, source: str, line: int | None, field: str, value: object, rule: str) -> TraceError:
        """The error `source:line: field=value: rule`; the line (or row) is left out when it is None."""
        where = source if line is None else f"{source}:{line}"
        shown = value if isinstance(value, str) else repr(value)
        return cls(f"{where}: {field}={shown[:80]}: {rule}")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Trace:
    """Requests in arrival order, one entry of each column per request.

    `tenant` indexes `tenants`; `session` is -1 for a request of no session; `think_s` is the client's delay between the
    end of the session's previous request and this one, NaN when unknown. Request i's prompt blocks are
    `block_ids[block_offsets[i]:block_offsets[i + 1]]`, in prompt order: an id names `block_tokens` tokens *with
    everything before them*, so an equal id is an equal prefix anywhere in the trace. The tail of a prompt that fills no
    block may have an id (Mooncake) or none (vLLM-like traces). `block_tokens` is 0 when the trace has no block ids.

    Raises TraceError when a column breaks a rule.
    """

    name: str
    arrival_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    tenant: Codes
    tenants: tuple[str, ...]
    session: Codes
    think_s: Floats
    block_tokens: int
    block_ids: Codes
    block_offsets: Ints
    skipped_rows: int = 0
    notes: tuple[str, ...] = ()

    @classmethod
    def from_columns(
        cls,
        *,
        name: str,
        arrival_s: ArrayLike,
        prompt_tokens: ArrayLike,
        output_tokens: ArrayLike,
        tenant: ArrayLike | None = None,
        tenants: Sequence[str] = ("default",),
        session: ArrayLike | None = None,
        think_s: ArrayLike | None = None,
        block_tokens: int = 0,
        block_ids: ArrayLike = (),
        block_counts: ArrayLike | None = None,
        skipped_rows: int = 0,
        notes: Sequence[str] = (),
    ) -> Trace:
        """A trace from columns in any order; unsorted arrivals are sorted stably, and a note says so."""
        arrival = np.asarray(arrival_s, np.float64)
        n = len(arrival)
        ids = np.asarray(block_ids)
        if ids.size and ids.max() > np.iinfo(np.int32).max:
            raise TraceError(f"{name}: block_ids={ids.max()}: must fit 32 bits; renumber them from 0")
        ids = ids.astype(np.int32)
        counts = np.zeros(n, np.int64) if block_counts is None else np.asarray(block_counts, np.int64)
        columns: dict[str, NDArray[Any]] = {
            "arrival_s": arrival,
            "prompt_tokens": np.asarray(prompt_tokens, np.int64),
            "output_tokens": np.asarray(output_tokens, np.int64),
            "tenant": np.zeros(n, np.int32) if tenant is None else np.asarray(tenant, np.int32),
            "session": np.full(n, -1, np.int32) if session is None else np.asarray(session, np.int32),
            "think_s": np.full(n, np.nan) if think_s is None else np.asarray(think_s, np.float64),
        }
        late = np.count_nonzero(np.diff(arrival) < 0)
        if late:
            order = np.argsort(arrival, kind="stable")
            ids = ids[expand_runs((np.cumsum(counts) - counts)[order], counts[order])]
            columns = {key: column[order] for key, column in columns.items()}
            counts = counts[order]
            notes = (*notes, f"{late} requests arrived before the row above them: sorted by arrival")
        return cls(
            name=name,
            tenants=tuple(tenants),
            block_tokens=block_tokens,
            block_ids=ids,
            block_offsets=np.concatenate(([0], np.cumsum(counts))),
            skipped_rows=skipped_rows,
            notes=tuple(notes),
            **columns,
        )

    def __post_init__(self) -> None:
        self.validate()

    def __len__(self) -> int:
        return len(self.arrival_s)

    def blocks(self, i: int) -> Codes:
        """The block ids of request i's prompt, in prompt order; empty when the trace has none."""
        return self.block_ids[self.block_offsets[i] : self.block_offsets[i + 1]]

    def head(self, n: int) -> Trace:
        """The first n requests (all of them when there are fewer)."""
        if n < 1:
            raise TraceError(f"n={n} requests: a trace has at least one; use n >= 1")
        return replace(
            self,
            arrival_s=self.arrival_s[:n],
            prompt_tokens=self.prompt_tokens[:n],
            output_tokens=self.output_tokens[:n],
            tenant=self.tenant[:n],
            session=self.session[:n],
            think_s=self.think_s[:n],
            block_ids=self.block_ids[: self.block_offsets[min(n, len(self))]],
            block_offsets=self.block_offsets[: n + 1],
        )

    def scaled_rate(self, factor: float) -> Trace:
        """The same requests arriving `factor` times as fast; think times are the client's own and stay."""
        if not (math.isfinite(factor) and factor > 0):
            raise TraceError(f"rate factor={factor}: must be a finite number above 0; use 1 for the recorded rate")
        return replace(self, arrival_s=self.arrival_s / factor)

    def same_requests(self, other: Trace) -> bool:
        """Whether the other trace has the same requests at the same times, whatever its name and notes."""
        columns = ("arrival_s", "prompt_tokens", "output_tokens", "tenant", "session", "block_offsets", "block_ids")
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in columns)

    def validate(self) -> None:
        """Raise TraceError for the first request that breaks a rule of the class docstring."""
        n = len(self.arrival_s)
        if n == 0:
            raise TraceError(f"{self.name}: empty trace: needs at least one request")
        for field in ("prompt_tokens", "output_tokens", "tenant", "session", "think_s"):
            if len(getattr(self, field)) != n:
                raise TraceError(f"{self.name}: {field} has {len(getattr(self, field))} entries; arrival_s has {n}")
        arrival, think = self.arrival_s, self.think_s
        self._require("arrival_s", np.isfinite(arrival) & (arrival >= 0), "must be finite and not negative")
        self._require("arrival_s", np.diff(arrival, prepend=0.0) >= 0, "must not decrease; sort the requests")
        for field, tokens in (("prompt_tokens", self.prompt_tokens), ("output_tokens", self.output_tokens)):
            good = (tokens >= 1) & (tokens <= MAX_TOKENS)
            self._require(field, good, f"must be a whole number from 1 to {MAX_TOKENS:,}")
        self._require("think_s", np.isnan(think) | (np.isfinite(think) & (think >= 0)), "must be >= 0, or NaN: unknown")
        self._require("session", self.session >= -1, "must be a session number, or -1: none")
        known = (self.tenant >= 0) & (self.tenant < len(self.tenants))
        self._require("tenant", known, f"must index the {len(self.tenants)} tenants")
        if len(set(self.tenants)) != len(self.tenants):
            raise TraceError(f"{self.name}: tenants={self.tenants}: names must differ")
        self._validate_blocks(n)

    def _validate_blocks(self, n: int) -> None:
        offsets, block = self.block_offsets, self.block_tokens
        if len(offsets) != n + 1 or offsets[0] != 0 or offsets[-1] != len(self.block_ids):
            raise TraceError(f"{self.name}: block_offsets must be {n + 1} entries from 0 to {len(self.block_ids)}")
        if block < 0 or (block == 0 and len(self.block_ids)):
            raise TraceError(f"{self.name}: block_tokens={block}: must say how many tokens a block id stands for")
        if block:
            counts, full = np.diff(offsets), self.prompt_tokens // block
            partial = (self.prompt_tokens % block > 0).astype(np.int64)
            fits = (counts >= full) & (counts <= full + partial)
            self._require("prompt_tokens", fits, f"must have one id for each {block}-token block")
            if len(self.block_ids) and self.block_ids.min() < 0:
                raise TraceError(f"{self.name}: block_ids={self.block_ids.min()}: must not be negative")

    def _require(self, field: str, good: NDArray[np.bool_], rule: str) -> None:
        if not good.all():
            i = int(np.argmin(good))
            raise TraceError.at(self.name, i, field, getattr(self, field)[i].item(), f"{rule} (request {i}, from 0)")


def expand_runs(starts: ArrayLike, lengths: ArrayLike) -> NDArray[Any]:
    """The concatenation of the ranges [start, start + length); one integer array, of the type of `starts`."""
    starts, lengths = np.asarray(starts), np.asarray(lengths)
    before = np.cumsum(lengths) - lengths
    flat = np.repeat((starts - before).astype(starts.dtype), lengths)
    flat += np.arange(len(flat), dtype=starts.dtype)
    return flat
