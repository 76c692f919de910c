"""Reads `key=value,key=value` texts, and names what was probably meant when a key or name is unknown."""

from collections.abc import Callable, Iterable, Mapping
from difflib import SequenceMatcher
from typing import Any

from traces.schema import TraceError

_WRITTEN = {"int": "write a whole number such as 3", "float": "write a number such as 0.5"}


def unknown(kind: str, name: str, known: Iterable[str]) -> TraceError:
    """The error for an unknown name, listing the known ones, nearest first."""
    ranked = sorted(known, key=lambda other: (-SequenceMatcher(None, name.lower(), other.lower()).ratio(), other))
    return TraceError(f"unknown {kind} {name!r}; known, nearest first: {', '.join(ranked)}")


def parse_pairs(text: str, readers: Mapping[str, Callable[[str], Any]], kind: str) -> dict[str, Any]:
    """The values of a `key=value,key=value` text, each read by its key's reader; {} for an empty text."""
    values: dict[str, Any] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise TraceError(f"{kind} {pair!r} is not key=value; known keys: {', '.join(readers)}")
        if key not in readers:
            raise (
                unknown(f"{kind} key", key, readers)
                if readers
                else TraceError(f"{kind}: takes no options, got {key!r}")
            )
        if key in values:
            raise TraceError(f"{kind} {key}={value[:80]}: given twice; say it once")
        try:
            values[key] = readers[key](value)
        except TraceError:
            raise
        except ValueError as error:
            name = readers[key].__name__
            rule = _WRITTEN.get(name, str(error)[:120])
            raise TraceError(f"{kind} {key}={value[:80]}: not a valid {name}: {rule}") from error
    return values
