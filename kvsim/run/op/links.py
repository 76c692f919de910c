"""The links of a replica's GPUs in the `op` fidelity: which resources of which host a byte takes, and their rates."""

from collections import Counter
from collections.abc import Mapping, Sequence

import simpy

from kvsim.hardware.fairshare import FairShare
from kvsim.scenario.setup import Setup

Uses = Mapping[str, float]


class Links:
    """What a byte of each rank of a replica's stage takes of which link; its ranks do the same at the same time.

    `h2d` and `d2h` go between HBM and DDR, `out` and `into` to and from a rank beside it, over NVLink or, where the GPU
    has none, over PCIe: then a `ring` of ranks leaves each of its switches once. `cpu` is for a second of its work.
    """

    def __init__(self, setup: Setup, number: int, stage: int = 0) -> None:
        hosts = setup.stages.hosts  # of one replica, where it fills several
        self.hosts, position = divmod(number, setup.replicas_per_host)
        self.host = self.hosts * (hosts[-1] + 1) + hosts[stage]
        self.own = own = f"replica{number}.stage{stage}"
        position = position * setup.pp + stage - hosts.index(hosts[stage])
        host, tp, per_switch = f"host{self.host}", setup.tp, setup.host.gpus_per_switch
        self._nvlink = setup.gpu.rates.nvlink_Bps > 0
        switches = Counter(gpu // per_switch for gpu in range(position * tp, (position + 1) * tp))
        self.up = {f"{host}.switch{s}.up": float(n) for s, n in switches.items()}
        self.down = {f"{host}.switch{s}.down": float(n) for s, n in switches.items()}
        shared = {f"{host}.ddr": float(tp)}
        self.h2d, self.d2h = {f"{own}.h2d": 1.0, **shared, **self.down}, {f"{own}.d2h": 1.0, **shared, **self.up}
        self.cpu = {f"{host}.cpu": float(tp)}
        self.out, self.into = ({f"{own}.{way}": 1.0} for way in (("out", "in") if self._nvlink else ("d2h", "h2d")))
        self.to_nic = {f"{own}.d2h": 1.0, f"{host}.nic.out": float(tp)}
        self.from_nic = {f"{own}.h2d": 1.0, f"{host}.nic.in": float(tp)}
        crossed = (*self.up, *self.down) if not self._nvlink and len(switches) > 1 else ()
        self.ring = {**self.out, **self.into, **dict.fromkeys(crossed, 1.0)}

    def to(self, receiver: "Links") -> Uses:
        """What a byte of each rank takes on its way to the ranks of another stage or replica."""
        if receiver.host != self.host:
            return {**self.to_nic, **receiver.from_nic}
        far = not self._nvlink and self.up.keys() != receiver.up.keys()
        return {**self.out, **receiver.into, **(self.up | receiver.down if far else {})}


def networks(env: simpy.Environment, setup: Setup, links: Sequence[Sequence[Links]]) -> list[FairShare]:
    """For each replica the network that its stages are in: that of its hosts, or one of all where these send to others.

    `links` are those of each replica's stages.
    """
    host, rates = setup.host, setup.gpu.rates
    made: dict[int, FairShare] = {}
    found = []
    for stages in links:
        network = made.setdefault(0 if setup.prefill_gpus else stages[0].hosts, FairShare(env, {}))
        found.append(network)
        for one in stages:
            name, own = f"host{one.host}", one.own
            network.capacities |= {f"{name}.ddr": host.ddr_Bps, f"{name}.cpu": 1.0}
            network.capacities |= dict.fromkeys((*one.up, *one.down), host.switch_Bps)
            network.capacities |= {f"{name}.nic.out": host.nic_Bps, f"{name}.nic.in": host.nic_Bps}
            network.capacities |= {f"{own}.h2d": rates.pcie_h2d_Bps, f"{own}.d2h": rates.pcie_d2h_Bps}
            network.capacities |= {f"{own}.out": rates.nvlink_Bps, f"{own}.in": rates.nvlink_Bps}
    return found
