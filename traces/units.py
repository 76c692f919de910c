"""The unit that arrivals are counted in: stated, or the format's own where the figures do not speak against it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from traces.schema import Floats, TraceError

UNITS_PER_S = {"s": 1, "ms": 1000, "us": 10**6, "ns": 10**9}
EPOCH_S = 1e8
"""Times from here on are of a clock since 1970, not of a trace that began more than three years ago."""

_MOST_RPS = 100.0  # of milliseconds without fractions; whole seconds of a slow service look like more
_LEAST_RPS = 0.01  # of times without fractions; a busy service's look like less in a unit a thousand times too large
_LATEST_START_MS = 10**9  # eleven days: seconds since 1970 are more, and milliseconds more than 10^12


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeUnit:
    """The option of a format of known unit: `time_unit` contradicts it."""

    time_unit: str = ""

    def __post_init__(self) -> None:
        checked_unit(self.time_unit)


def checked_unit(time_unit: str) -> str:
    """The unit, when it is one of UNITS_PER_S, or "": not stated. Raises TraceError."""
    if time_unit and time_unit not in UNITS_PER_S:
        raise TraceError(f"time_unit={time_unit[:80]}: must be one of {', '.join(UNITS_PER_S)}")
    return time_unit


def seconds(times: Floats, unit: str) -> tuple[Floats, tuple[str, ...]]:
    """Times in seconds, those of a clock since 1970 from the first one on, as a note says then."""
    per_s = UNITS_PER_S[unit]
    first = float(np.nanmin(times)) if np.isfinite(times).any() else 0.0
    if first / per_s < EPOCH_S:
        return times / per_s, ()
    return (times - first) / per_s, (f"time 0 is {first / per_s:.6f} s since 1970",)


def milliseconds_or_ask(times: Floats, source: str, field: str) -> str:
    """ "ms", unless the figures could be of another unit: then TraceError asks for it."""
    times = times[np.isfinite(times)]
    if not len(times):
        return "ms"
    if (times != np.floor(times)).any():
        value = times[np.argmax(times != np.floor(times))]
        raise ask(source, field, value, "has a fraction: milliseconds as Mooncake's are whole, seconds are not")
    if _LATEST_START_MS <= times.min() < 1000 * EPOCH_S or times.min() > 1e14:
        raise ask(source, field, times.min(), "is the first time: too late for milliseconds from the trace's start")
    gaps, span = len(times) - 1, float(times.max() - times.min())
    if gaps > 1 and span and not _LEAST_RPS <= 1000 * gaps / span <= _MOST_RPS:
        rule = f"is the last of {len(times):,}: in milliseconds {1000 * gaps / span:,.3g} requests/s"
        raise ask(source, field, times.max(), rule)
    return "ms"


def seconds_or_ask(times: Floats, source: str, field: str) -> str:
    """ "s", unless the figures could be milliseconds: then TraceError asks for the unit."""
    times = times[np.isfinite(times)]
    gaps, span = len(times) - 1, float(times.max() - times.min()) if len(times) else 0.0
    if gaps > 1 and span and gaps / span < _LEAST_RPS and (times == np.floor(times)).all():
        rule = f"is the last of {len(times):,}: in seconds {gaps / span:.2g} requests/s"
        raise ask(source, field, times.max(), rule)
    return "s"


def ask(source: str, field: str, value: float, why: str) -> TraceError:
    """The error for times whose unit is not certain."""
    rule = f"{why}; say the unit with the option time_unit=s or time_unit=ms (also us, ns)"
    return TraceError.at(source, None, field, f"{value:.15g}", rule)
