"""Samples requests from ServeGen's fitted per-client models (Xiang et al., 2025, arXiv 2505.09999).

A client is a tenant. Its archive members are `chunk-C-trace.csv` (per 600 s window: start, requests/s, CV, gap family,
shape, scale) and `chunk-C-dataset.json` (per 6 h window: probability tables of prompt and output lengths).
"""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from traces.archive import members
from traces.arrivals import FAMILIES, renewal_s
from traces.schema import MAX_TOKENS, Floats, Trace, TraceError

WINDOW_S = 600
MAX_START_S = 366 * 86400
LENGTHS = ("input_tokens", "output_tokens")
MEMBER = re.compile(r"chunk-(\d+)-(trace\.csv|dataset\.json)$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Which part to sample: `span_s` seconds from `start_s` on, of `clients` ("0+3+7", or "all")."""

    start_s: float = 0.0
    span_s: float = 3600.0
    clients: str = "all"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.start_s) and self.start_s >= 0):
            raise TraceError(f"start_s={self.start_s}: must be finite and not negative")
        if not (math.isfinite(self.span_s) and self.span_s > 0):
            raise TraceError(f"span_s={self.span_s}: must be finite and above 0")
        if self.clients != "all" and not all(client.isdecimal() for client in self.clients.split("+")):
            raise TraceError(f"clients={self.clients}: must be all, or client numbers joined by +, as 0+3+7")


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """A client's arrivals over WINDOW_S seconds: a renewal process with gaps of this family and shape."""

    start_s: float
    rate_rps: float
    family: str
    shape: float


@dataclass(slots=True)
class Client:
    """One client's busy windows, and its raw length tables by window start in seconds."""

    windows: list[Window] = field(default_factory=list)
    end_s: float = 0.0
    tables: dict[int, dict[str, str]] = field(default_factory=dict)

    @property
    def has_lengths(self) -> bool:
        """Whether any of its length tables holds traffic."""
        return any(_is_filled(tables) for tables in self.tables.values())

    def tables_at(self, start_s: float) -> dict[str, str]:
        """The tables of the period that holds this time; an empty period borrows the nearest one's with traffic."""
        own = max((start for start in self.tables if start <= start_s), default=0)
        filled = (start for start, tables in self.tables.items() if _is_filled(tables))
        return self.tables[min(filled, key=lambda start: abs(start - own))]


def _is_filled(tables: dict[str, str]) -> bool:
    return all(tables.get(column, "{}") != "{}" for column in LENGTHS)


def read_clients(path: Path) -> dict[int, Client]:
    """The archive's clients by number; raises TraceError naming the member and line of a malformed window."""
    clients: dict[int, Client] = {}
    for member, text in members(path):
        found = MEMBER.search(member)
        if found is None:
            raise TraceError(
                f"{path}/{member}: not a ServeGen file, which must be named chunk-C-trace.csv or chunk-C-dataset.json"
            )
        client = clients.setdefault(int(found[1]), Client())
        if found[2] == "trace.csv":
            _read_windows(client, text, f"{path}/{member}")
        else:
            try:
                for start, tables in json.loads(text).items():
                    client.tables[int(start)] = {column: str(tables[column]) for column in LENGTHS if column in tables}
            except (ValueError, AttributeError, TypeError, RecursionError) as error:
                raise TraceError(
                    f"{path}/{member}: not a map from window start to length tables ({type(error).__name__}); "
                    "pack it as published"
                ) from error
    if not clients:
        raise TraceError(f"{path}: empty archive: no chunk-C-trace.csv in it")
    return dict(sorted(clients.items()))


def to_trace(
    clients: dict[int, Client], options: Options, *, name: str, seed: int = 0, limit: int | None = None
) -> Trace:
    """Requests sampled with `seed`; each window's gaps are scaled to its stated rate, lengths drawn independently.

    A client's requests do not depend on which others are chosen. Clients with traffic but no length table are left out,
    and a note names them. Raises TraceError for an unknown client, a span outside the model, or no traffic in it.
    """
    chosen = list(clients) if options.clients == "all" else [int(text) for text in options.clients.split("+")]
    missing = sorted(set(chosen) - set(clients))
    if missing:
        raise TraceError(f"{name}: clients={missing}: not in the archive; known: {', '.join(map(str, clients))}")
    end_s = max(client.end_s for client in clients.values())
    stop_s = options.start_s + options.span_s
    if stop_s > end_s:
        raise TraceError(f"{name}: start_s + span_s={stop_s:g}: the model ends at {end_s:g} s; choose an earlier part")
    part = f"{options.start_s:g} to {stop_s:g} s"
    silent = [number for number in chosen if clients[number].windows and not clients[number].has_lengths]
    notes = [f"sampled from fitted client models (seed {seed}), {part}"]
    if silent:
        notes.append(f"clients without length tables left out: {', '.join(map(str, silent))}")
    samples = [
        _sample_client(clients[number], options, np.random.default_rng((seed, number)), f"{name}: client {number}")
        for number in chosen
        if number not in silent
    ]
    tenant = [np.full(len(arrival_s), code) for code, (arrival_s, *_) in enumerate(samples)]
    if not sum(map(len, tenant)):
        raise TraceError(
            f"{name}: no client with length tables has traffic from {part}; choose another part or other clients"
        )
    arrival_s, prompt, output = (np.concatenate(column) for column in zip(*samples, strict=True))
    order = np.argsort(arrival_s, kind="stable")[:limit]
    return Trace.from_columns(
        name=name,
        arrival_s=arrival_s[order],
        prompt_tokens=prompt[order],
        output_tokens=output[order],
        tenant=np.concatenate(tenant)[order],
        tenants=[f"client-{number}" for number in chosen if number not in silent],
        notes=notes,
    )


def _sample_client(
    client: Client, options: Options, rng: np.random.Generator, source: str
) -> tuple[Floats, Floats, Floats]:
    """(arrival from the part's start in s, prompt tokens, output tokens) of one client's requests."""
    columns: list[tuple[Floats, Floats, Floats]] = [(np.empty(0), np.empty(0), np.empty(0))]
    tables: dict[str, tuple[Floats, Floats]] = {}
    for window in client.windows:
        begin_s = max(window.start_s, options.start_s)
        close_s = min(window.start_s + WINDOW_S, options.start_s + options.span_s)
        if begin_s >= close_s:
            continue
        times_s = renewal_s(
            rng, rate_rps=window.rate_rps, family=window.family, shape=window.shape, span_s=close_s - begin_s
        )
        texts = client.tables_at(window.start_s)
        for column in LENGTHS:
            if texts[column] not in tables:
                tables[texts[column]] = _parse_table(texts[column], f"{source}: {column}")
        prompt, output = (_draw(rng, tables[texts[column]], len(times_s)) for column in LENGTHS)
        columns.append((times_s + (begin_s - options.start_s), prompt, output))
    arrival_s, prompts, outputs = (np.concatenate(column) for column in zip(*columns, strict=True))
    return arrival_s, prompts, outputs


def _read_windows(client: Client, text: str, source: str) -> None:
    for line, row in enumerate(csv.reader(text.splitlines()), 1):
        try:
            start_s, rate_rps, shape = float(row[0]), float(row[1]), float(row[4])
        except (ValueError, IndexError) as error:
            rule = "must be start, rate, CV, family, shape, scale"
            raise TraceError.at(source, line, "window", ",".join(row), rule) from error
        if not 0 <= start_s <= MAX_START_S:
            raise TraceError.at(source, line, "start", start_s, f"must be from 0 to {MAX_START_S:,} seconds")
        client.end_s = max(client.end_s, start_s + WINDOW_S)
        if rate_rps == 0:
            continue
        family = row[3].lower()
        if family not in FAMILIES:
            raise TraceError.at(source, line, "family", row[3], f"must be {' or '.join(FAMILIES)} in a busy window")
        for name, value in (("rate", rate_rps), ("shape", shape)):
            if not (math.isfinite(value) and value > 0):
                raise TraceError.at(source, line, name, value, "must be finite and above 0 in a busy window")
        client.windows.append(Window(start_s=start_s, rate_rps=rate_rps, family=family, shape=shape))


def _parse_table(text: str, source: str) -> tuple[Floats, Floats]:
    """(values, cumulative weights) of a `{value: probability, ...}` text; values below one token are left out."""
    try:
        cells = np.array(text.strip("{} ").replace(":", ",").split(","), np.float64).reshape(-1, 2)
    except ValueError as error:
        raise TraceError(f"{source}={text[:60]}: must be a {{value: probability, ...}} table") from error
    values, weights = cells[cells[:, 0] >= 1].T
    edges = np.cumsum(weights)
    if not (len(edges) and math.isfinite(edges[-1]) and edges[-1] > 0 and weights.min() >= 0):
        raise TraceError(f"{source}={text[:60]}: probabilities must be finite, not negative, and some above 0")
    if values.max() > MAX_TOKENS:
        raise TraceError(f"{source}={text[:60]}: lengths must be at most {MAX_TOKENS:,} tokens")
    return np.rint(values), edges


def _draw(rng: np.random.Generator, table: tuple[Floats, Floats], n: int) -> Floats:
    values, edges = table
    picks = np.searchsorted(edges, rng.random(n) * edges[-1], side="right")
    return np.asarray(values[np.minimum(picks, len(values) - 1)])
