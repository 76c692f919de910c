"""Sizes, token counts and durations as people write them: `128Ki`, `80GiB`, `100ms`."""

import math
import re
from collections.abc import Mapping
from fractions import Fraction

from policies.shown import shown

_TOKENS: Mapping[str, int] = (
    {"": 1} | {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9} | {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
)
_BYTES: Mapping[str, int] = (
    {"": 1, "B": 1}
    | {"kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15}
    | {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "PiB": 2**50}
)
_PARAMS: Mapping[str, int] = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_SECONDS: Mapping[str, int | Fraction] = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400} | {
    "ms": Fraction(1, 10**3),
    "us": Fraction(1, 10**6),
    "ns": Fraction(1, 10**9),
}

# Printed units by scale, largest first; the one of scale 1 also prints zero.
_Printed = Mapping[float, str]
_PRINTED_BYTES: _Printed = {2**50: " PiB", 2**40: " TiB", 2**30: " GiB", 2**20: " MiB", 2**10: " KiB", 1: " B"}
_PRINTED_S: _Printed = {3600: " h", 60: " min", 1: " s", 1e-3: " ms", 1e-6: " us", 1e-9: " ns"}
_PRINTED_RATE: _Printed = {10**12: " T", 10**9: " G", 10**6: " M", 10**3: " k", 1: " "}
_PRINTED_COUNT: _Printed = {10**12: "T", 10**9: "B", 10**6: "M", 10**3: "k", 1: ""}

# Bounded, because 10**999999999 would never finish and a float ends at 1e308; every quantity here is far below.
_QUANTITY = re.compile(r"(?P<number>\d{1,18}(?:\.\d{1,18})?(?:[eE][+-]?\d{1,2})?)\s*(?P<unit>[A-Za-z]*)", re.ASCII)


def parse_tokens(text: str) -> int:
    """A count of tokens, requests or blocks: `50k` is 50,000, `128Ki` is 131,072, `1B` is 10**9.

    Raises ValueError for what is negative, not finite, not whole, or has an unknown unit.
    """
    return _whole("token count", text, _TOKENS, "'50k' (50,000), '128Ki' (131,072) or '1M'")


def parse_params(text: str) -> int:
    """A number of weights: `8B` and `8e9` are 8 * 10**9, `8.03B` is 8,030,000,000.

    Raises ValueError for what is not finite, not whole, or not at least 1, or has an unknown unit.
    """
    params = _whole("number of weights", text.replace(",", ""), _PARAMS, "'8B', '8.03e9' or '8030261248'")
    if params < 1:
        raise ValueError(f"number of weights {shown(text)} must be at least 1; write it as '8B' or '8.03e9'")
    return params


def parse_bytes(text: str) -> int:
    """A size in bytes: `80GiB` is 80 * 2**30, `2TB` is 2 * 10**12, a bare number is bytes.

    Raises ValueError for what is negative, not finite, not a whole number of bytes, or has an unknown unit.
    """
    return _whole("size", text, _BYTES, "'80GiB' (80 * 2**30), '2TB' (2 * 10**12) or '1000' (bytes)")


def parse_duration_s(text: str) -> float:
    """A duration in seconds: `5us`, `100ms`, `10s`, `1m` (a minute), `2h`; a bare number is seconds.

    Raises ValueError for what is negative, not finite, or has an unknown unit.
    """
    return float(_quantity("duration", text, _SECONDS, "'100ms', '10s' or '2h'"))


def format_bytes(size_bytes: float) -> str:
    """Bytes with a binary unit, as memories are sold: `80 GiB`, `1.5 TiB`."""
    return _scaled(size_bytes, _PRINTED_BYTES)


def format_s(duration_s: float) -> str:
    """Seconds with the unit that fits: `12.5 us`, `3.4 ms`, `1.25 min`, `2 h`."""
    return _scaled(duration_s, _PRINTED_S)


def format_rate(rate: float, unit: str) -> str:
    """A rate with a decimal prefix, as links and processors are sold: `2.039 TB/s`, `989 TFLOP/s`."""
    return _scaled(rate, _PRINTED_RATE) + unit


def format_count(count: float) -> str:
    """A count: exact with separators below 100,000 (`12,031`), then `144.8M`, `8.03B`, `1.5T`."""
    if abs(count) < 100_000:
        return f"{count:,}"
    return _scaled(count, _PRINTED_COUNT)


MOST_TOKENS = 10**9
"""A hundred times the longest context that a model is offered with; sums over layers then fit 64 bits."""


def bounded_tokens(name: str, text: str, most: int = MOST_TOKENS) -> int:
    """`parse_tokens`, of what a flag `name` gives; ValueError beyond `most` too."""
    tokens = parse_tokens(text)
    if tokens > most:
        raise ValueError(f"{name}={shown(text)} must be at most {most:,}")
    return tokens


def _whole(what: str, text: str, units: Mapping[str, int | Fraction], examples: str) -> int:
    value = _quantity(what, text, units, examples)
    if value.denominator != 1:
        raise ValueError(
            f"{what} {shown(text)} is {float(value):g}, which is not a whole number; write it as {examples}"
        )
    return int(value)


def _quantity(what: str, text: str, units: Mapping[str, int | Fraction], examples: str) -> Fraction:
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"{what} {shown(text)} is not a finite number >= 0 with an optional unit; write it as {examples}"
        )
    unit = match["unit"]
    if unit not in units:
        known = ", ".join(name for name in units if name)
        raise ValueError(
            f"{what} {shown(text)} has the unknown unit {shown(unit)}; known: {known}; write it as {examples}"
        )
    return Fraction(match["number"]) * units[unit]


def _scaled(value: float, units: _Printed) -> str:
    if value == 0 or not math.isfinite(value):
        return f"{value:g}{units[1]}"
    scale = next((scale for scale in units if abs(value) >= scale), min(units))
    scaled = value / scale
    # `g` would print 1023.5 KiB as 1.024e+03.
    return f"{scaled:,.0f}{units[scale]}" if abs(scaled) >= 1000 else f"{scaled:.4g}{units[scale]}"
