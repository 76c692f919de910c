"""Policies as text: `shadowkv:budget_tokens=1024,rank=160`, `full@layers=0-1+shadowkv`."""

import importlib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from difflib import get_close_matches
from types import UnionType
from typing import Any, get_args

from policies.compose import ByContext, ByHeads, ByLayer
from policies.policy import Policy

SUFFIXES = {"k": 1000, "M": 1_000_000, "Ki": 1024, "Mi": 1024**2}


def parse(text: str, known: Mapping[str, type[Policy]]) -> Policy:
    """The policy that `text` describes, with the names of `known`.

    `name:key=value,key=value` sets parameters; `module:Class:key=value` takes a class from outside. Parts joined by `+`
    compose: `part@layers=0-1` and `part@below=8k` for some layers or short prompts, the last part for the rest;
    `part@heads=2+part@heads=6` splits KV heads. Raises ValueError that names what is wrong and what is known.
    """
    parts = [part.partition("@")[::2] for part in text.split("+")]
    policies = [_one(name, known) for name, _ in parts]
    selectors = [selector.partition("=")[::2] for _, selector in parts]
    if len(parts) == 1 and not parts[0][1]:
        return policies[0]
    kinds = {kind for kind, _ in selectors if kind}
    if kinds == {"heads"} and all(kind for kind, _ in selectors):
        sized = tuple((_int(f"heads of {p.name}", n), p) for p, (_, n) in zip(policies, selectors, strict=True))
        return ByHeads(parts=sized)
    if "heads" in kinds or not kinds <= {"layers", "below"} or selectors[-1][0] or "" in [k for k, _ in selectors[:-1]]:
        raise ValueError(
            f"policy {text!r}: join parts as 'full@layers=0-1+shadowkv', 'full@below=8k+shadowkv' or "
            "'full@heads=2+sink-window@heads=6'; the last part, for the rest, has no selector"
        )
    rest = policies[-1]
    for policy, (kind, value) in reversed(list(zip(policies, selectors, strict=True))[:-1]):
        if kind == "below":
            rest = ByContext(below_tokens=_int("below", value), short=policy, long=rest)
        else:
            first, _, last = value.partition("-")
            span = (_int("layers", first), _int("layers", last or first), policy)
            if isinstance(rest, ByLayer):
                rest = ByLayer(parts=(span, *rest.parts), otherwise=rest.otherwise)
            else:
                rest = ByLayer(parts=(span,), otherwise=rest)
    return rest


def describe(policy: Policy) -> str:
    """The shortest text that parses to `policy`, for the classes of the project."""
    if isinstance(policy, ByLayer):
        named = [f"{describe(p)}@layers={first}-{last}" for first, last, p in policy.parts]
        return "+".join([*named, describe(policy.otherwise)])
    if isinstance(policy, ByContext):
        return f"{describe(policy.short)}@below={policy.below_tokens}+{describe(policy.long)}"
    if isinstance(policy, ByHeads):
        return "+".join(f"{describe(p)}@heads={heads}" for heads, p in policy.parts)
    changed = [f"{f.name}={getattr(policy, f.name)}" for f in fields(policy) if getattr(policy, f.name) != f.default]
    return policy.name + (":" + ",".join(changed) if changed else "")


def _one(text: str, known: Mapping[str, type[Policy]]) -> Policy:
    name, _, rest = text.strip().partition(":")
    cls = known.get(name)
    if cls is None:
        outside, _, arguments = rest.partition(":")
        if not outside.isidentifier() or "=" in outside:
            raise ValueError(_unknown("policy", name, known))
        cls, rest = _outside(name, outside), arguments
    allowed = {f.name: f for f in fields(cls)}
    given: dict[str, Any] = {}
    for item in filter(None, (piece.strip() for piece in rest.split(","))):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"policy {text!r}: {item!r} must be key=value")
        if key not in allowed:
            raise ValueError(_unknown(f"parameter of {cls.name}", key, allowed))
        if key in given:
            raise ValueError(f"policy {text!r}: {key} is given twice")
        given[key] = _value(f"{cls.name}: {key}", value, allowed[key].type)
    if missing := [f.name for f in allowed.values() if f.default is MISSING and f.name not in given]:
        raise ValueError(f"policy {text!r} needs {', '.join(missing)}")
    return cls(**given)


def _outside(module: str, name: str) -> type[Policy]:
    try:
        cls = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ValueError(f"policy {module}:{name}: cannot import {module!r} ({error}); is it on PYTHONPATH?") from error
    if not (isinstance(cls, type) and issubclass(cls, Policy)):
        raise ValueError(f"policy {module}:{name}: {name!r} in {module!r} is not a subclass of policies.Policy")
    return cls


def _value(what: str, text: str, kind: Any) -> Any:
    options = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if type(None) in options and text.lower() == "none":
        return None
    if bool in options:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{what}={text!r} must be true or false")
        return text.lower() == "true"
    if int in options:
        return _int(what, text)
    if float in options:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"{what}={text!r} is not a number") from None
        if not abs(value) < float("inf"):
            raise ValueError(f"{what}={text!r} is not finite")
        return value
    return text


def _int(what: str, text: str) -> int:
    digits = text.rstrip("kMi")
    suffix = text[len(digits) :]
    try:
        if suffix and suffix not in SUFFIXES:
            raise ValueError
        return int(digits) * SUFFIXES.get(suffix, 1)
    except ValueError:
        raise ValueError(f"{what}={text!r} is not a whole number such as 2048, 2k or 2Ki") from None


def _unknown(what: str, name: str, known: Mapping[str, Any]) -> str:
    near = get_close_matches(name, known, n=len(known), cutoff=0.0)
    guess = get_close_matches(name, known, n=1)
    hint = f"; did you mean {guess[0]!r}?" if guess else ";"
    return f"unknown {what} {name!r}{hint} known: {', '.join(near) or 'none'}"
