"""The `op` fidelity's traffic beside the operations of iterations: swaps, cached prefixes, sessions and handoffs.

All of it flows over the same links as the operations' copies, and competes with them. A replica loads from DDR one
thing after the other, and so it stores; the states that it sends or receives follow one another as well.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeAlias

import simpy

from kvsim.engine.desk import Engine
from kvsim.engine.inbound import BY_LOADER, BY_NIC
from kvsim.engine.state.cluster import IDLE, Record
from kvsim.hardware.fairshare import FairShare
from kvsim.hardware.machine import DOWN, UP
from kvsim.iteration.busy import BY_SWAP
from kvsim.iteration.timeline import HANDOFF, LOAD, STORE
from kvsim.run.op.links import Links
from kvsim.scenario.setup import Setup
from policies.plan import Tier

Process = Generator[simpy.Event, Any, None]
LayerDone: TypeAlias = Callable[[Sequence[simpy.Event]], object]  # called with what a layer's end waits for


class Transfers:
    """What moves to and from one replica beside its iterations; `all_of_them` are those of every replica."""

    wake: Callable[[], None]  # what to do when an idle replica has got what it waits for

    def __init__(
        self,
        engine: Engine,
        setup: Setup,
        number: int,
        links: Sequence[Links],
        network: FairShare,
        all_of_them: Sequence["Transfers"],
    ) -> None:
        self.env, self.network, self._stages, self.links = network.env, network, links, links[0]
        self._swapped, self._cached = setup.held_shares(Tier.HBM), engine.cached_shares
        self._engine, self._machine, self.number, self._all = engine, engine.clock.machine, number, all_of_them
        self._hand_over = setup.prefill_replicas > 0
        self._loaded = self._stored = self.handed = self.env.event().succeed()  # the last of each kind
        self.streamed: dict[int, tuple[float, simpy.Event]] = {}  # of prompts under way: bytes, and the last ones
        self._down_bytes, self._stalls, self._stall_bytes = 0, 0, [0, 0]

    @property
    def _replica(self) -> Record:
        return self._engine.cluster.replicas[self.number]

    def set_out(self) -> None:
        """Let move whatever a step of the replica's engine has left to be moved, to others too."""
        ends = self._all if self._hand_over else [self]
        waiting = sorted((*place, end.number) for end in ends for place in self._engine.inbound(end.number))
        for _, index, number in waiting:
            self.env.process(self._all[number].bring(index))
        replica = self._replica
        down_bytes = int(replica["prefix_down_bytes"] + replica["swap_down_bytes"] - replica["stall_bytes"][DOWN])
        if down_bytes > self._down_bytes:
            self._stored = self.env.process(self._store(self._stored, down_bytes - self._down_bytes))
            self._down_bytes = down_bytes

    def swap(self) -> Process:
        """Move what the next iteration waits for, and book what of the wait is due to others."""
        rates, replica = self._machine.gpu.rates, self._replica
        copies, nbytes = int(replica["stalls"]), replica["stall_bytes"].tolist()
        yield self.env.timeout((copies - self._stalls) * rates.pcie_latency_s)
        yield self._copy(nbytes[DOWN] - self._stall_bytes[DOWN], DOWN, self._swapped)
        yield self._copy(nbytes[UP] - self._stall_bytes[UP], UP, self._swapped)
        self._stalls, self._stall_bytes = copies, nbytes
        replica["busy_s"][BY_SWAP] += self.env.now - replica["wake_s"]
        replica["wake_s"] = self.env.now

    def _store(self, before: simpy.Event, nbytes: int) -> Process:
        rates = self._machine.gpu.rates
        yield before
        began_s = self.env.now
        yield self.env.timeout(rates.pcie_latency_s)
        yield self._copy(nbytes, DOWN, self._cached)
        self._note(STORE, "store", began_s)

    def _copy(self, nbytes: float, direction: int, shares: Sequence[float]) -> simpy.Event:
        """Let each stage move its share of so many bytes between HBM and DDR; tells when all have."""
        rates = self._machine.gpu.rates
        moves = [
            self.network.flow(share * nbytes, rates.pcie_h2d_Bps, stage.h2d)
            if direction == UP
            else self.network.flow(share * nbytes, rates.pcie_d2h_Bps, stage.d2h)
            for stage, share in zip(self._stages, shares, strict=True)
        ]
        return moves[0] if len(moves) == 1 else self.env.all_of(moves)

    def bring(self, index: int) -> Process:
        """Bring a request's state, and let the request know unless it has left or waits anew."""
        cluster = self._engine.cluster
        inbound = cluster.inbound[index].copy()
        cluster.inbound[index]["nbytes"] = 0
        if inbound["way"] == BY_LOADER:
            yield from self._load(inbound)
        else:
            yield from self._receive(self._all[cluster.requests[index]["sender"]], index, inbound)
        yield self.env.timeout(max(inbound["late_s"], inbound["least_s"] - self.env.now))
        request, replica = cluster.requests[index], self._replica
        if cluster.inbound[index]["serial"] == inbound["serial"]:
            request["ready_s"] = self.env.now
            if replica["phase"] == IDLE:
                replica["wake_s"] = self.env.now
                self.wake()

    def _load(self, inbound: Record) -> Process:
        rates, before, done = self._machine.gpu.rates, self._loaded, self.env.event()
        self._loaded = done
        yield before
        began_s = max(self.env.now, float(inbound["from_s"]))
        yield self.env.timeout(began_s - self.env.now + rates.pcie_latency_s)
        yield self._copy(float(inbound["nbytes"]), UP, self._cached)
        self._note(LOAD, "load", began_s)
        done.succeed()

    def _receive(self, sender: "Transfers", index: int, inbound: Record) -> Process:
        """Wait for a prompt's state, of which layers may be on their way already; the rest sets out now."""
        streamed_bytes, last = self.streamed.pop(index, (0.0, self.env.event()))
        left_bytes = inbound["nbytes"] - streamed_bytes
        if left_bytes > 0.5:  # of a byte: rounding
            last = sender.hand(self, left_bytes)
        came_s = yield last
        latency_s = self._machine.host.nic_latency_s if inbound["way"] == BY_NIC else self._machine.peer[0]
        yield self.env.timeout(max(0.0, came_s + latency_s - self.env.now))

    def streams(self) -> "LayerDone | None":
        """What to do when a layer of the iteration that begins is done: send what it adds to state that others need."""
        moving = self._engine.streams(self.number) if self._hand_over else []
        if not moving:
            return None
        ends = [(index, self._all[receiver], nbytes) for index, receiver, nbytes in moving]
        return lambda layer: self.env.process(self._stream(layer, ends))

    def _stream(
        self, layer: Sequence[simpy.Event], ends: Sequence[tuple[int, "Transfers", tuple[float, float]]]
    ) -> Process:
        yield self.env.all_of(layer)
        for index, receiver, (hbm_bytes, ddr_bytes) in ends:
            nbytes = hbm_bytes + (ddr_bytes if receiver.links.host != self.links.host else 0.0)
            if nbytes:
                before_bytes, _ = receiver.streamed.get(index, (0.0, None))
                receiver.streamed[index] = before_bytes + nbytes, self.hand(receiver, nbytes)

    def hand(self, receiver: "Transfers", nbytes: float) -> simpy.Event:
        """Send bytes of each rank to another replica, after all that either is handing over; tells when they came."""
        waits, done = [self.handed, receiver.handed], self.env.event()
        self.handed = receiver.handed = done
        self.env.process(self._hand(receiver, nbytes, waits, done))
        return done

    def _hand(self, receiver: "Transfers", nbytes: float, waits: list[simpy.Event], done: simpy.Event) -> Process:
        machine = self._machine
        _, cap_Bps = machine.peer
        if receiver.links.host != self.links.host:
            cap_Bps = min(machine.host.nic_Bps / machine.tp, machine.gpu.rates.pcie_d2h_Bps)
        yield self.env.all_of(waits)
        began_s = self.env.now
        yield self.network.flow(nbytes, cap_Bps, self.links.to(receiver.links))
        self._note(HANDOFF, "state", began_s)
        done.succeed(self.env.now)

    def _note(self, lane: int, name: str, began_s: float) -> None:
        """Show a transfer in the timeline, where one is asked for."""
        if self._engine.timeline is not None:
            for stage in range(len(self._stages)):
                self._engine.timeline.add(self.number, lane, name, 0, began_s, self.env.now, stage)
