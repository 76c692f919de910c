"""Quotas of the prefix cache: the share of every tier that is one tenant's own."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

from kvsim.text.names import unknown_name
from policies.shown import shown

Quota: TypeAlias = float | dict[str, float] | None
"""One share for each tenant, shares by tenant, or no quota."""


class Parts(NamedTuple):
    """How tiers are divided: their shares, and for each tenant which part is its."""

    shares: list[float]
    of_tenant: list[int]


def divided(quota: Quota, tenants: Sequence[str]) -> Parts:
    """The parts of tiers; tenants that a mapping does not name have what is left in common.

    Raises ValueError for shares that exceed the whole, names that no tenant has, and tenants for whom nothing is left.
    """
    if quota is None:
        return Parts([1.0], [0] * len(tenants))
    shares = quota if isinstance(quota, Mapping) else dict.fromkeys(tenants, quota)
    for name in shares:
        if name not in tenants:
            raise unknown_name("tenant of prefix_cache_quota", name, tenants)
    total = sum(shares.values())
    if total > 1 + 1e-9:
        raise ValueError(
            f"prefix_cache_quota: the shares of {len(shares)} tenants add up to {total:g}, above the capacity of 1; "
            "lower them"
        )
    others = [name for name in tenants if name not in shares]
    if others and total > 1 - 1e-9:
        raise ValueError(
            f"prefix_cache_quota gives the whole of every tier to {', '.join(shares)} and leaves nothing for "
            f"{', '.join(others)}; lower a share or name them too"
        )
    numbers = {name: number for number, name in enumerate(shares)}
    rest = [1 - total] if others else []
    return Parts([*shares.values(), *rest], [numbers.get(name, len(shares)) for name in tenants])


def read_quota(value: object) -> Quota:
    """A quota as text (`0.25`, or `chat=0.5,batch=0.25`), as a number or as a mapping.

    Raises ValueError for anything else, and for shares that are not above 0 and at most 1.
    """
    if value is None or not isinstance(value, str | Mapping):
        return None if value is None else _share(value)
    if isinstance(value, Mapping):
        return {str(name): _share(share, f"{name}=") for name, share in value.items()}
    if "=" not in value:
        return _share(value)
    quota: dict[str, float] = {}
    for item in value.split(","):
        name, equals, share = item.partition("=")
        if not equals or name in quota:
            raise ValueError(f"{shown(value)} must be one share, or name=share for each tenant once, such as chat=0.5")
        quota[name] = _share(share, f"{name}=")
    return quota


def _share(value: object, of: str = "") -> float:
    try:
        share = float(value) if isinstance(value, str | int | float) else 0.0
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ValueError(f"prefix_cache_quota: {of}{value} must be a share of every tier, above 0 and at most 1")
    return share
