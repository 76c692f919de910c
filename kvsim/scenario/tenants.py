"""Tenants: what a scenario says of them (weight, priority, SLO class, quota, replicas), and whom it says that of."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase

from kvsim.text.names import nearest_first, unknown_name
from kvsim.text.units import parse_duration_s
from policies.shown import shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """The terms of a tenant.

    `weight` is its part where `fair` shares service out, a larger `priority` is more urgent, `slo_class` names the
    bounds that its goodput counts, `quota` is the share of a replica's HBM for KV state that its running sequences may
    hold (quotas may add up to more than 1: they are limits, not reservations), `replicas` are the first and the last
    that its requests go to, None being all, and `timeout_s` is for how long they wait for their first token, None being
    as long as everybody's. Raises ValueError for a figure out of its range.
    """

    weight: float = 1.0
    priority: int = 0
    slo_class: str | None = None
    quota: float = 1.0
    replicas: tuple[int, int] | None = None
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight={self.weight:g} must be a finite number above 0")
        if not abs(self.priority) <= MOST_URGENT:
            raise ValueError(f"priority={self.priority} must be a whole number from -{MOST_URGENT} to {MOST_URGENT}")
        if not 0 < self.quota <= 1:
            raise ValueError(
                f"quota={self.quota:g} must be above 0 and at most 1, which is all HBM of a replica for KV state"
            )
        if self.replicas is not None and not 0 <= self.replicas[0] <= self.replicas[1]:
            raise ValueError(f"replicas={_range(self.replicas)} must be a replica, or the first and the last: 0-3")
        check_timeout(self.timeout_s)


MOST_URGENT = 1_000_000
MOST_DIGITS = 18
TERMS = tuple(field.name.removesuffix("_s") for field in fields(Tenant))


def parse_tenant(terms: Mapping[str, object]) -> Tenant:
    """A tenant from its terms as a scenario file has them, numbers or text; ValueError says which is wrong."""
    for name in terms:
        if name not in TERMS:
            raise ValueError(f"unknown key {shown(name)}; did you mean {shown(nearest_first(str(name), TERMS)[0])}?")
    parsed = {
        "weight": lambda value: _number("weight", value),
        "priority": lambda value: _whole("priority", value),
        "slo_class": _class,
        "quota": lambda value: _number("quota", value),
        "replicas": _replicas,
        "timeout": _seconds,
    }
    given = {name: parsed[name](value) for name, value in terms.items()}
    if "timeout" in given:
        given["timeout_s"] = given.pop("timeout")
    return Tenant(**given)  # type: ignore[arg-type]


def parse_named(flag: str, texts: Iterable[str]) -> dict[str, dict[str, str]]:
    """What repeated flags say, each NAME:key=value,...; ValueError for another form and for a name given twice."""
    named: dict[str, dict[str, str]] = {}
    for text in texts:
        name, colon, rest = text.rpartition(":")
        if not colon:
            raise ValueError(f"{flag} {shown(text)} must be written NAME:key=value,key=value")
        if name in named:
            raise ValueError(f"{flag} gives {shown(name)} twice; say it once")
        named[name] = {}
        for item in rest.split(","):
            key, equals, value = item.partition("=")
            if not equals:
                raise ValueError(f"{flag} {shown(text)}: {shown(item)} must be written key=value")
            if key in named[name]:
                raise ValueError(f"{flag} {shown(text)} gives {shown(key)} twice; say it once")
            named[name][key] = value
    return named


def terms_of(tenants: Mapping[str, Tenant], names: Sequence[str]) -> list[Tenant]:
    """The terms of each tenant of a trace, in order: those of its own name, else of the first pattern that matches.

    Patterns are those of shells: * stands for any text, ? for one character, [ab] for one of these. Who matches none
    has the default terms. Raises ValueError for a name or pattern that no tenant of the trace has, and for an SLO class
    that none of them ends up with.
    """
    for key in tenants:
        if key not in names and not any(fnmatchcase(name, key) for name in names):
            raise unknown_name("tenant", key, names)
    terms = [tenants[name] if name in tenants else _by_pattern(tenants, name) for name in names]
    have = {one.slo_class for one in terms}
    for key, one in tenants.items():
        if one.slo_class not in have:
            raise ValueError(
                f"no tenant has the SLO class {shown(one.slo_class)}: those that {shown(key)} matches have terms from "
                "a name or pattern before it; set the class there, or leave it out"
            )
    return terms


def check_classes(tenants: Mapping[str, Tenant], classes: Mapping[str, Mapping[str, float]]) -> None:
    """Raise ValueError for an SLO class that is named but not defined, and for one that no tenant has."""
    named = list(dict.fromkeys(one.slo_class for one in tenants.values() if one.slo_class is not None))
    for name in named:
        if name not in classes:
            raise unknown_name("SLO class", name, classes)
    for name in classes:
        if name not in named:
            raise ValueError(f"no tenant has the SLO class {shown(name)}; give it to one, or leave it out")


def check_timeout(timeout_s: float | None) -> None:
    """Raise ValueError for a timeout that is no finite time above 0."""
    if timeout_s is not None and not 0 < timeout_s < math.inf:
        raise ValueError(f"timeout={timeout_s:g} must be a finite time above 0, such as 30s; leave it out for none")


def check_pins(tenants: Mapping[str, Tenant], replicas: int) -> None:
    """Raise ValueError for a tenant that is to go to replicas that the cluster lacks."""
    for name, one in tenants.items():
        if one.replicas is not None and one.replicas[1] >= replicas:
            raise ValueError(
                f"tenant {shown(name)}: replicas={_range(one.replicas)} exceeds the {replicas} replicas of the "
                f"cluster, 0 to {replicas - 1}"
            )


def _by_pattern(tenants: Mapping[str, Tenant], name: str) -> Tenant:
    return next((terms for pattern, terms in tenants.items() if fnmatchcase(name, pattern)), Tenant())


def _number(name: str, value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    raise ValueError(f"{name}={shown(value)} is not a number such as 0.5")


def _whole(name: str, value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and value.removeprefix("-").isdecimal() and len(value) <= MOST_DIGITS:
        return int(value)
    raise ValueError(f"{name}={shown(value)} is not a whole number such as 1")


def _class(value: object) -> str:
    if isinstance(value, str) and value:
        return value
    raise ValueError(f"slo_class={shown(value)} is not the name of an SLO class")


def _replicas(value: object) -> tuple[int, int]:
    if isinstance(value, str):
        first, _, last = value.partition("-")
        if first.isdecimal() and (last.isdecimal() or value == first) and len(value) <= 2 * MOST_DIGITS:
            return int(first), int(last or first)
    elif isinstance(value, int) and not isinstance(value, bool):
        return value, value
    raise ValueError(f"replicas={shown(value)} must be a replica, or the first and the last: 0-3")


def _seconds(value: object) -> float:
    return parse_duration_s(value) if isinstance(value, str) else _number("timeout", value)


def _range(replicas: tuple[int, int]) -> str:
    return f"{replicas[0]}-{replicas[1]}"
