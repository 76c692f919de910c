"""Policies as text: `shadowkv:budget_tokens=1024,rank=160`, `full@layers=0-1+shadowkv`."""

import importlib
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from difflib import get_close_matches
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from policies.compose import ByContext, ByHeads, ByLayer
from policies.policy import Policy
from policies.shown import shown

SUFFIXES = {"": 1, "k": 1000, "M": 1_000_000, "Ki": 1024, "Mi": 1024**2}
_WHOLE = re.compile(r"(-?\d{1,18})(|k|M|Ki|Mi)", re.ASCII)


def parse(text: str, known: Mapping[str, type[Policy]]) -> Policy:
    """The policy that `text` describes, with the names of `known`.

    `name:key=value,key=value` sets parameters; `module:Class:key=value` takes a class from outside. Parts joined by `+`
    compose: `part@layers=0-1` and `part@below=8k` for some layers or short prompts, the last part for the rest;
    `part@heads=2+part@heads=6` splits KV heads. Raises ValueError that names what is wrong and what is known.
    """
    parts = [part.partition("@") for part in text.split("+")]
    policies = [_one(name, known) for name, _, _ in parts]
    kinds = [selector.partition("=")[0] if at else None for _, at, selector in parts]
    values = [selector.partition("=")[2] for _, _, selector in parts]
    if kinds == [None]:
        return policies[0]
    if set(kinds) == {"heads"}:
        sized = zip(values, policies, strict=True)
        return ByHeads(parts=tuple((_int(f"{policy.name}@heads", n), policy) for n, policy in sized))
    if kinds[-1] is not None or not set(kinds[:-1]) <= {"layers", "below"}:
        raise ValueError(
            f"policy {shown(text)}: join parts as 'full@layers=0-1+shadowkv', 'full@below=8k+shadowkv' or "
            "'full@heads=2+sink-window@heads=6'; the last part, for the rest, has no selector"
        )
    rest = policies[-1]
    for policy, kind, value in reversed(list(zip(policies, kinds, values, strict=True))[:-1]):
        if kind == "below":
            rest = ByContext(below_tokens=_int(f"{policy.name}@below", value), short=policy, long=rest)
        else:
            first, to, last = value.partition("-")
            what = f"{policy.name}@layers"
            span = (_int(what, first), _int(what, last if to else first), policy)
            if isinstance(rest, ByLayer):
                rest = ByLayer(parts=(span, *rest.parts), otherwise=rest.otherwise)
            else:
                rest = ByLayer(parts=(span,), otherwise=rest)
    return rest


def outside(text: str, known: Mapping[str, type[Policy]]) -> list[str]:
    """What `parse` would import, and so run, to read this text: its names that are not `known`, as module:Class."""
    names = [part.partition("@")[0].strip().split(":") for part in text.split("+")]
    return [":".join(pieces[:2]) for pieces in names if pieces[0] not in known and len(pieces) > 1]


def describe(policy: Policy) -> str:
    """The shortest text that parses to `policy`.

    Raises ValueError for a composition within a part of another, which text cannot say.
    """
    if isinstance(policy, ByHeads):
        return "+".join(f"{_describe_part(p)}@heads={heads}" for heads, p in policy.parts)
    texts, rest = [], policy
    while isinstance(rest, ByLayer | ByContext):
        if isinstance(rest, ByContext):
            texts.append(f"{_describe_part(rest.short)}@below={rest.below_tokens}")
            rest = rest.long
        else:
            texts += [f"{_describe_part(p)}@layers={first}-{last}" for first, last, p in rest.parts]
            rest = rest.otherwise
            if isinstance(rest, ByLayer):
                break
    return "+".join([*texts, _describe_part(rest)])


def _describe_part(policy: Policy) -> str:
    if isinstance(policy, ByLayer | ByContext | ByHeads):
        raise ValueError(f"no text describes {policy.name} within a part of another composition")
    cls = type(policy)
    name = policy.name if cls.__module__.startswith("policies.") else f"{cls.__module__}:{cls.__qualname__}"
    changed = [f"{f.name}={getattr(policy, f.name)}" for f in fields(policy) if getattr(policy, f.name) != f.default]
    return name + (":" + ",".join(changed) if changed else "")


def _one(text: str, known: Mapping[str, type[Policy]]) -> Policy:
    name, _, rest = text.strip().partition(":")
    cls = known.get(name)
    if cls is None:
        outside, _, arguments = rest.partition(":")
        if not (outside.isidentifier() and all(piece.isidentifier() for piece in name.split("."))):
            raise ValueError(_unknown("policy", name, known))
        cls, rest = _outside(name, outside), arguments
    allowed, kinds = {f.name: f for f in fields(cls)}, get_type_hints(cls)
    given: dict[str, Any] = {}
    for item in filter(None, (piece.strip() for piece in rest.split(","))):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"policy {shown(text)}: {shown(item)} must be key=value")
        if key not in allowed:
            raise ValueError(_unknown(f"parameter of {name}", key, allowed))
        if key in given:
            raise ValueError(f"policy {shown(text)}: {key} is given twice; say it once")
        given[key] = _value(f"{name}: {key}", value, kinds[key])
    required = [f.name for f in allowed.values() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [field for field in required if field not in given]:
        raise ValueError(f"policy {shown(text)} needs {', '.join(missing)}")
    return cls(**given)


def _outside(module: str, name: str) -> type[Policy]:
    try:
        cls = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ValueError(
            f"policy {module}:{name}: cannot import {shown(module)} ({error}); is it on PYTHONPATH?"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Policy)):
        raise ValueError(
            f"policy {module}:{name}: {shown(name)} in {shown(module)} is not a subclass of policies.Policy"
        )
    return cls


def _value(what: str, text: str, kind: Any) -> Any:
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if type(None) in options and text.lower() == "none":
        return None
    if bool in options:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{what}={shown(text)} must be true or false")
        return text.lower() == "true"
    if int in options:
        return _int(what, text)
    if float in options:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"{what}={shown(text)} is not a number such as 0.5") from None
        if not abs(value) < float("inf"):
            raise ValueError(f"{what}={shown(text)} is not finite; give a number such as 0.5")
        return value
    return text


def _int(what: str, text: str) -> int:
    number = _WHOLE.fullmatch(text)
    if number is None:
        raise ValueError(f"{what}={shown(text)} is not a whole number such as 2048, 2k or 2Ki")
    return int(number[1]) * SUFFIXES[number[2]]


def _unknown(what: str, name: str, known: Mapping[str, Any]) -> str:
    if not known:
        return f"unknown {what} {shown(name)}; none is known"
    near = get_close_matches(name, known, n=len(known), cutoff=0.0)
    guess = get_close_matches(name, known, n=1)
    hint = f" did you mean {shown(guess[0])}?" if guess else ""
    return f"unknown {what} {shown(name)};{hint} known: {', '.join(near)}"
