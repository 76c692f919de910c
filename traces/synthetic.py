"""A seeded generator of multi-tenant traces whose shared prefixes and multi-turn histories hit a prefix cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from traces.arrivals import renewal_s, shape_for_cv
from traces.lengths import Lengths, LogNormal, parse_lengths
from traces.options import parse_pairs
from traces.schema import MAX_BLOCKS, MAX_REQUESTS, MAX_TOKENS, Floats, Ints, Trace, TraceError, expand_runs

ARRIVALS = ("poisson", "gamma", "weibull")
_PROMPT = LogNormal(median_tokens=1000, p90_tokens=4000)
_OUTPUT = LogNormal(median_tokens=200, p90_tokens=600)
_Number = TypeVar("_Number", np.float64, np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tenant:
    """One tenant's load.

    Sessions start as a renewal process with gaps of the CV `cv`, at `rate_rps / turns`, so that `rate_rps` is requests
    per second in the long run. A session has a geometric number of turns of mean `turns`. `prompt` is a turn's new user
    text, `output` its answer; a turn's prompt is the shared prefix, the session's history and the new text. The client
    waits an exponential time of mean `think_mean_s` before each further turn.
    """

    name: str
    rate_rps: float
    arrivals: str = "gamma"
    cv: float = 1.0
    prompt: Lengths = _PROMPT
    output: Lengths = _OUTPUT
    shared_prefix_tokens: int = 0
    turns: float = 1.0
    think_mean_s: float = 30.0

    def __post_init__(self) -> None:
        if not self.name:
            raise TraceError("tenant name='': must not be empty; give name=TEXT")
        for field, value in (("rate_rps", self.rate_rps), ("cv", self.cv)):
            if not (math.isfinite(value) and value > 0):
                raise TraceError(f"tenant {self.name}: {field}={value}: must be finite and above 0")
        if self.arrivals not in ARRIVALS:
            raise TraceError(f"tenant {self.name}: arrivals={self.arrivals}: must be one of {', '.join(ARRIVALS)}")
        if self.arrivals == "poisson" and self.cv != 1:
            raise TraceError(f"tenant {self.name}: cv={self.cv}: Poisson gaps have CV 1; use gamma or weibull")
        if not 0 <= self.shared_prefix_tokens <= MAX_TOKENS:
            rule = f"must not be negative, and at most {MAX_TOKENS:,}"
            raise TraceError(f"tenant {self.name}: shared_prefix_tokens={self.shared_prefix_tokens}: {rule}")
        if not (math.isfinite(self.turns) and self.turns >= 1):
            raise TraceError(f"tenant {self.name}: turns={self.turns}: must be a finite mean of at least 1")
        if not (math.isfinite(self.think_mean_s) and self.think_mean_s >= 0):
            raise TraceError(f"tenant {self.name}: think_mean_s={self.think_mean_s}: must be finite and not negative")

    @classmethod
    def parse(cls, text: str) -> Tenant:
        """From `name=chat,rate=2,cv=1.5,prompt=lognormal:1000:4000,output=fixed:200,prefix=1024,turns=3,think=30`.

        `name` and `rate` are required, `arrivals` may be given too; the others have this class's defaults.
        """
        fields: dict[str, tuple[str, Callable[[str], Any]]] = {
            "name": ("name", str),
            "rate": ("rate_rps", float),
            "arrivals": ("arrivals", str),
            "cv": ("cv", float),
            "prompt": ("prompt", lambda value: parse_lengths(value, "prompt_tokens")),
            "output": ("output", lambda value: parse_lengths(value, "output_tokens")),
            "prefix": ("shared_prefix_tokens", int),
            "turns": ("turns", float),
            "think": ("think_mean_s", float),
        }
        given = parse_pairs(text, {key: reader for key, (_, reader) in fields.items()}, "tenant")
        absent = [key for key in ("name", "rate") if key not in given]
        if absent:
            raise TraceError(f"tenant {text!r}: {' and '.join(absent)} missing; write name=TEXT,rate=REQUESTS_PER_S")
        return cls(**{fields[key][0]: value for key, value in given.items()})


SPAN_S = 1800.0
_OF_ALL = ("span_s", "block_tokens")


def described(text: str, *, seed: int, limit: int | None) -> Trace:
    """The trace of a workload in words: `rate=2,prompt=lognormal:1000:4000,prefix=1024,turns=3`, tenants joined by +.

    Keys are those of `Tenant.parse`, the name of a single tenant may be left out; `span_s` (half an hour by default)
    and `block_tokens` hold for all. Raises TraceError for what these refuse.
    """
    parts = [[pair for pair in part.split(",") if pair.strip()] for part in text.split("+")]
    whole = ",".join(pair for part in parts for pair in part if pair.partition("=")[0].strip() in _OF_ALL)
    stated = parse_pairs(whole, {"span_s": float, "block_tokens": int}, "synthetic")
    own = [[pair for pair in part if pair.partition("=")[0].strip() not in _OF_ALL] for part in parts]
    if len(own) == 1 and not any(pair.partition("=")[0].strip() == "name" for pair in own[0]):
        own[0].append("name=default")
    trace = synthesize(
        [Tenant.parse(",".join(part)) for part in own],
        duration_s=stated.get("span_s", SPAN_S),
        seed=seed,
        block_tokens=stated.get("block_tokens", 512),
    )
    return trace if limit is None else trace.head(limit)


def synthesize(
    tenants: Sequence[Tenant],
    *,
    duration_s: float | None = None,
    n_requests: int | None = None,
    seed: int = 0,
    block_tokens: int = 512,
    name: str = "synthetic",
) -> Trace:
    """A trace of the tenants' requests over `duration_s`, or its first `n_requests`; give one of the two.

    Arrivals are open-loop: a further turn comes its think time after the turn before, as if that were served at once.
    Turns after the end are cut off, so a multi-turn load takes about (turns - 1) * think_mean_s to reach its rate.
    Block ids name full blocks of `block_tokens` (the partial tail has none) with their whole prefix: those that lie in
    the shared prefix are the tenant's, later ones the session's. Raises TraceError for inputs that break a rule.
    """
    if not tenants:
        raise TraceError("tenants=[]: needs at least one tenant")
    if not 1 <= block_tokens <= MAX_TOKENS:
        raise TraceError(f"block_tokens={block_tokens}: must be at least 1 and at most {MAX_TOKENS:,}")
    if duration_s is not None and n_requests is None:
        if not (math.isfinite(duration_s) and duration_s > 0):
            raise TraceError(f"duration_s={duration_s}: must be finite and above 0")
        return _merge(tenants, _draw_all(tenants, duration_s, seed), block_tokens, name)
    if n_requests is not None and duration_s is None:
        if not 1 <= n_requests <= MAX_REQUESTS:
            raise TraceError(f"n_requests={n_requests}: must be at least 1 and at most {MAX_REQUESTS:,}")
        span_s, parts = 1.1 * (n_requests + 16) / sum(tenant.rate_rps for tenant in tenants), list[_Requests]()
        while sum(len(part.arrival_s) for part in parts) < n_requests:
            parts = _draw_all(tenants, span_s, seed)
            span_s *= 2
        return _merge(tenants, parts, block_tokens, name).head(n_requests)
    raise TraceError(f"duration_s={duration_s} and n_requests={n_requests}: give exactly one of the two")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Requests:
    """One tenant's requests, sessions after one another; `session` counts from 0."""

    arrival_s: Floats
    session: Ints
    think_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints


def _draw_all(tenants: Sequence[Tenant], duration_s: float, seed: int) -> list[_Requests]:
    seeds = np.random.SeedSequence(seed).spawn(len(tenants))
    return [_draw(tenant, duration_s, np.random.default_rng(own)) for tenant, own in zip(tenants, seeds, strict=True)]


def _draw(tenant: Tenant, duration_s: float, rng: np.random.Generator) -> _Requests:
    family = "gamma" if tenant.arrivals == "poisson" else tenant.arrivals
    start_s = renewal_s(
        rng,
        rate_rps=tenant.rate_rps / tenant.turns,
        family=family,
        shape=shape_for_cv(family, tenant.cv),
        span_s=duration_s,
    )
    turns = rng.geometric(1 / tenant.turns, len(start_s))
    if turns.sum(dtype=np.float64) > MAX_REQUESTS:
        raise TraceError(
            f"tenant {tenant.name}: turns={tenant.turns:g} give over {MAX_REQUESTS:,} requests; lower them"
        )
    session = np.repeat(np.arange(len(start_s)), turns)
    first = np.cumsum(turns) - turns  # each session's first request
    n = len(session)
    text, output = tenant.prompt.sample(rng, n), tenant.output.sample(rng, n)
    wait_s = rng.exponential(tenant.think_mean_s, n)
    wait_s[first] = 0.0
    arrival_s = np.repeat(start_s, turns) + _running_sum(wait_s, first, turns)
    prompt = tenant.shared_prefix_tokens + _running_sum(text + output, first, turns) - output
    think_s = wait_s.copy()
    think_s[first] = np.nan
    kept = arrival_s < duration_s
    return _Requests(
        arrival_s=arrival_s[kept],
        session=session[kept],
        think_s=think_s[kept],
        prompt_tokens=prompt[kept],
        output_tokens=output[kept],
    )


def _running_sum(values: NDArray[_Number], first: Ints, turns: Ints) -> NDArray[_Number]:
    """The sum of each session's values up to and including each request."""
    total = np.cumsum(values)
    before: NDArray[_Number] = np.repeat(total[first] - values[first], turns)
    return total - before


def _merge(tenants: Sequence[Tenant], parts: Sequence[_Requests], block_tokens: int, name: str) -> Trace:
    """All requests by arrival, each with two runs of block ids: its tenant's shared ones, then its session's own."""
    starts, lengths, sessions = [], [], []
    next_id = next_session = 0
    for tenant, part in zip(tenants, parts, strict=True):
        shared = tenant.shared_prefix_tokens // block_tokens
        own = part.prompt_tokens // block_tokens - shared
        longest = np.zeros(part.session.max(initial=-1) + 1, np.int64)
        np.maximum.at(longest, part.session, own)
        own_start = next_id + shared + np.cumsum(longest) - longest
        starts.append(np.stack([np.full(len(own), next_id), own_start[part.session]], axis=1))
        lengths.append(np.stack([np.full(len(own), shared), own], axis=1))
        next_id += shared + int(longest.sum())
        sessions.append(part.session + next_session if tenant.turns > 1 else np.full(len(own), -1))
        next_session += len(longest) if tenant.turns > 1 else 0
    blocks = sum(int(part.sum()) for part in lengths)
    if blocks > MAX_BLOCKS:
        raise TraceError(
            f"block_tokens={block_tokens}: prompts of {blocks:,} blocks; raise it, {MAX_BLOCKS:,} are the most"
        )
    arrival_s = np.concatenate([part.arrival_s for part in parts])
    order = np.argsort(arrival_s, kind="stable")
    run_lengths = np.concatenate(lengths)[order]
    code = np.repeat(np.arange(len(parts)), [len(part.arrival_s) for part in parts])
    return Trace.from_columns(
        name=name,
        arrival_s=arrival_s[order],
        prompt_tokens=np.concatenate([part.prompt_tokens for part in parts])[order],
        output_tokens=np.concatenate([part.output_tokens for part in parts])[order],
        tenant=code[order],
        tenants=[tenant.name for tenant in tenants],
        session=np.concatenate(sessions)[order],
        think_s=np.concatenate([part.think_s for part in parts])[order],
        block_tokens=block_tokens,
        block_ids=expand_runs(np.concatenate(starts)[order].ravel(), run_lengths.ravel()),
        block_counts=run_lengths.sum(axis=1),
    )
