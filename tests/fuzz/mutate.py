"""Mutations of valid inputs: of documents by type, of text by token, of any file by byte."""

import math
import random
import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 10**18, 10**30, -(10**30), 10**400),
    *(0.5, -0.5, 1.5, -0.0, 5e-324, 1e-300, 1e300, 1.7e308, math.nan, math.inf, -math.inf),
)
TEXTS = (
    *("", " ", "\n", "\t", "\x00", "0", "-", "1e999", "nan", "inf", "0x10", "1_0", "١٢", "12:30:45", "2024-01-01"),
    *("no", "on", "null", "true", "~", "*", "[", "{", "%s%n", "{0}", "..", "default", "full", "Ω" * 50),
    *("\x1b[31mred\x1b[0m", "\x1b]0;owned\x07", "\u202egnp.exe", "[red]x[/red]", "<script>alert(1)</script>"),
    *("\ud800", "\udcff", "x" * 300, "y" * 10_000, "z " * 5000, "a,b;c", "a=b", "a:b", "'\"`", "\ufeff", "日本語"),
)
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [1, 2], {"a": 1}, {"": None}, [None], ["a", "b"])
LITERALS = (
    *("12:30:45", "1:30.5", "no", "on", "yes", "~", "010", "0o17", "1_000", ".inf", "-.inf", ".nan", "1e400", "- "),
    *("2024-01-01", "!!binary aGk=", "!!python/name:os.system", "&a [*a]", "*a", "<<", "? ", '"\\ud800"', "[" * 600),
    *("NaN", "Infinity", "-Infinity", "null", "9" * 5000, '"\\u0000"', "{" * 600, "1" + "0" * 400, "'", '"', "#"),
)
_TOKEN = re.compile(r"[^\s,:{}\[\]\"']+")


def value(rng: random.Random) -> Any:
    """Any value, most often a number at the edge of some type."""
    return deepcopy(rng.choice(rng.choice((NUMBERS, NUMBERS, TEXTS, OTHERS))))


def number_like(rng: random.Random, number: float) -> Any:
    """A number near to or far from this one, or something else."""
    changes: tuple[Callable[[], Any], ...] = (
        lambda: -number,
        lambda: number + 1,
        lambda: number - 1,
        lambda: number * 10 ** rng.randrange(1, 25),
        lambda: number // 10 ** rng.randrange(1, 25) if isinstance(number, int) else number * 1e-9,
        lambda: str(number),
        lambda: [number],
        lambda: rng.choice(NUMBERS),
        lambda: value(rng),
    )
    return rng.choice(changes)()


def text_like(rng: random.Random, text: str) -> str:
    """The text with some characters left out, put in, doubled or swapped; or another one."""
    kind, at = rng.randrange(6), rng.randrange(len(text) + 1)
    if kind == 0:
        return rng.choice(TEXTS)
    if kind == 1:
        return text[:at]
    if kind == 2:
        return text[:at] + text[at + 1 :]
    if kind == 3:
        return text + text
    if kind == 4:
        return text[:at] + rng.choice(TEXTS)[:20] + text[at:]
    return text[:at] + chr(rng.randrange(1, 0x250)) + text[at + 1 :]


def document(rng: random.Random, original: Any, times: int | None = None) -> Any:
    """A copy of nested dicts and lists with one to three values or keys changed."""
    changed = deepcopy(original)
    for _ in range(times if times is not None else rng.choice((1, 1, 2, 3))):
        holders = list(_holders(changed))
        if not holders:
            return value(rng)
        holder = rng.choice(holders)
        if isinstance(holder, dict):
            _change_mapping(rng, holder)
        else:
            _change_list(rng, holder)
    return changed


def _holders(found: Any) -> list[Any]:
    if isinstance(found, dict):
        return [found, *(inner for item in found.values() for inner in _holders(item))]
    if isinstance(found, list):
        return [found, *(inner for item in found for inner in _holders(item))]
    return []


def _change_mapping(rng: random.Random, holder: dict[Any, Any]) -> None:
    if not holder or rng.random() < 0.1:
        holder[rng.choice((*TEXTS, 1, 1.5, None, True))] = value(rng)
        return
    key = rng.choice(list(holder))
    if rng.random() < 0.15:
        del holder[key]
    elif rng.random() < 0.1:
        holder[text_like(rng, str(key))] = holder.pop(key)
    elif rng.random() < 0.1:
        holder[key] = deepcopy(holder[rng.choice(list(holder))])
    else:
        holder[key] = _changed(rng, holder[key])


def _change_list(rng: random.Random, holder: list[Any]) -> None:
    at = rng.randrange(len(holder)) if holder else 0
    if not holder or rng.random() < 0.2:
        holder.insert(at, value(rng))
    elif rng.random() < 0.2:
        del holder[at]
    elif rng.random() < 0.1:
        holder.extend(deepcopy(holder))
    else:
        holder[at] = _changed(rng, holder[at])


def _changed(rng: random.Random, found: Any) -> Any:
    if isinstance(found, bool) or found is None:
        return value(rng)
    if isinstance(found, int | float):
        return number_like(rng, found)
    if isinstance(found, str):
        return text_like(rng, found) if rng.random() < 0.6 else value(rng)
    return value(rng)


def spliced(rng: random.Random, text: str) -> str:
    """The text with one of its words replaced by a literal that parsers treat in their own ways."""
    words = list(_TOKEN.finditer(text))
    if not words:
        return text + rng.choice(LITERALS)
    word = rng.choice(words)
    return text[: word.start()] + rng.choice(LITERALS) + text[word.end() :]


def damaged(rng: random.Random, content: bytes) -> bytes:
    """The bytes with some flipped, cut, repeated, left out or put in."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at, length = rng.randrange(len(changed) + 1), rng.choice((1, 1, 2, 4, 16, 200))
        kind = rng.randrange(6)
        if kind == 0 and changed:
            changed[at % len(changed)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[at:]
        elif kind == 2:
            del changed[at : at + length]
        elif kind == 3:
            changed[at:at] = changed[at : at + length] * rng.choice((1, 3))
        elif kind == 4:
            changed[at:at] = rng.choice((b"\x00", b"\xff" * length, b"\xed\xa0\x80", b"\n", b"\r", b'"', b"\x1b[2J"))
        else:
            changed[at : at + length] = rng.randbytes(length)
    return bytes(changed)


def some(rng: random.Random, texts: Sequence[str]) -> list[str]:
    """A random selection of the texts, in order."""
    return [text for text in texts if rng.random() < 0.5]
