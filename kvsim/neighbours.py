"""Which replicas of a host are busy at the moment: what the step fidelity divides the host by."""

from typing import Protocol

from kvsim.machine import Machine, Sharing


class Neighbour(Protocol):
    """A replica that wants to know when the use of its host changes."""

    def reprice(self) -> None:
        """The number of busy neighbours has changed."""


class Neighbours:
    """The replicas of one host, in the order of their GPUs."""

    def __init__(self, machine: Machine) -> None:
        self._tp, self._per_switch = machine.tp, machine.host.gpus_per_switch
        self._members: list[Neighbour] = []
        self._busy: set[int] = set()
        self._shares: dict[int, Sharing] = {}  # valid until a replica starts or stops

    def join(self, member: Neighbour) -> int:
        """Add a replica, busy at first; its position on the host."""
        self._members.append(member)
        self._busy.add(len(self._members) - 1)
        self._shares.clear()
        return len(self._members) - 1

    def work(self, position: int) -> None:
        """A replica has something to do."""
        self._busy.add(position)
        self._tell(position)

    def rest(self, position: int) -> None:
        """A replica has run out of work."""
        self._busy.discard(position)
        self._tell(position)

    def sharing(self, position: int) -> Sharing:
        """How many GPUs of the host, and of this replica's most crowded switch, are busy; its own count always."""
        if position in self._shares:
            return self._shares[position]
        gpus = [r * self._tp + rank for r in self._busy | {position} for rank in range(self._tp)]
        switches = [gpu // self._per_switch for gpu in gpus]
        own = {(position * self._tp + rank) // self._per_switch for rank in range(self._tp)}
        share = self._shares[position] = Sharing(len(gpus), max(switches.count(s) for s in own))
        return share

    def _tell(self, position: int) -> None:
        self._shares.clear()
        for other in sorted(self._busy - {position}):
            self._members[other].reprice()
