"""Inter-token latencies as the engine recorded them: of all tokens, and of each tenant's."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvsim.engine.state.cluster import EVERYBODY, Ints, Records

Gaps: TypeAlias = tuple[NDArray[Any], NDArray[Any]]
"""Seconds, and how many tokens waited as long."""


def expanded(rows: Records, tokens: Ints | None = None) -> Gaps:
    """The gaps of rows that stand for several steps each, before `tokens` tokens or those that the rows say."""
    steps = rows["steps"]
    ends = np.cumsum(steps)
    step = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - steps, steps)
    seconds = np.repeat(rows["first_s"], steps) + np.repeat(rows["slope_s"], steps) * step
    return seconds, np.repeat(rows["tokens"] if tokens is None else tokens, steps)


class TenantGaps:
    """Whose tokens the gaps of batches were before.

    A replica's rows are in order, and between those of its batches stands who joined and who left them. So a tenant's
    part of a batch is the sum of its changes until then; nothing is counted while iterations run.
    """

    def __init__(self, rows: Records, names: Sequence[str]) -> None:
        self._numbers = {name: number for number, name in enumerate(names)}
        self._rows = rows = rows[np.argsort(rows["replica"], kind="stable")]
        self._ends = np.cumsum(np.bincount(rows["replica"]))
        together = rows["whose"] == EVERYBODY
        self._batches = np.flatnonzero(together)
        self._changes = _by_tenant(rows["whose"], np.flatnonzero(rows["steps"] == 0))
        self._singles = _by_tenant(rows["whose"], np.flatnonzero(~together & (rows["steps"] > 0)))

    def of(self, name: str) -> Gaps:
        """The gaps before a tenant's tokens."""
        tenant, rows = self._numbers[name], self._rows
        changes, singles = (_part(places, tenant, rows) for places in (self._changes, self._singles))
        replica = rows["replica"][changes]
        members = np.cumsum(rows["tokens"][changes])
        fresh = np.flatnonzero(np.diff(replica, prepend=-1))  # where another replica's changes begin
        before = np.concatenate([[0], members])[fresh]
        members -= np.repeat(before, np.diff(fresh, append=len(changes)))
        until = np.minimum(np.append(changes[1:], len(rows)), self._ends[replica])
        first, last = np.searchsorted(self._batches, changes), np.searchsorted(self._batches, until)
        lengths = np.where(members > 0, last - first, 0)
        own = np.repeat(first - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
        places = np.concatenate([self._batches[own], singles])
        return expanded(rows[places], np.concatenate([np.repeat(members, lengths), rows["tokens"][singles]]))


def _by_tenant(whose: Ints, places: Ints) -> Ints:
    """Places in the order of their tenants."""
    return np.asarray(places[np.argsort(whose[places], kind="stable")])


def _part(places: Ints, tenant: int, rows: Records) -> Ints:
    """Those of one tenant."""
    whose = rows["whose"][places]
    return places[np.searchsorted(whose, tenant) : np.searchsorted(whose, tenant, side="right")]
