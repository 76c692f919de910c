"""A node as a graph of memories, processors and links, and what a transfer across it takes.

Nodes are `gpu{i}.hbm`, `gpu{i}.sm`, `pcie{j}` (a switch and its GPUs), `nvlink` (the peers' switch), `host.root` (the
root complex), `host.ddr`, `host.cpu`, `host.nvme` and `nic`. Every edge is one direction of a link, with
`bandwidth_Bps` and `latency_s`.
"""

from itertools import pairwise
from typing import TypeAlias

import networkx as nx

from kvsim.hardware.catalogue import Gpu, Host
from kvsim.text.names import unknown_name
from policies.shown import shown

Edge: TypeAlias = tuple[str, str]
_ROUTE_BYTES = 2**20  # routes are compared at the size of a few pages of KV


def node_graph(gpu: Gpu, host: Host, gpus: int) -> "nx.DiGraph[str]":
    """The graph of `host` with `gpus` GPUs; ValueError when it does not hold as many."""
    if not 1 <= gpus <= host.gpus_max:
        raise ValueError(f"gpus={gpus} does not fit host {shown(host.name)}; it takes 1 to {host.gpus_max}")
    graph: nx.DiGraph[str] = nx.DiGraph()
    rates = gpu.rates
    _link(graph, "host.ddr", "host.cpu", host.ddr_Bps, host.ddr_Bps)
    _link(graph, "host.root", "host.ddr", host.ddr_Bps, host.ddr_Bps)
    if host.nvme_bytes:
        _link(graph, "host.nvme", "host.root", host.nvme_read_Bps, host.nvme_write_Bps, host.nvme_latency_s)
    if host.nic_Bps:
        _link(graph, "host.root", "nic", host.nic_Bps, host.nic_Bps, host.nic_latency_s)
    for index in range(gpus):
        hbm, switch = f"gpu{index}.hbm", f"pcie{index // host.gpus_per_switch}"
        _link(graph, hbm, f"gpu{index}.sm", rates.hbm_Bps, rates.hbm_Bps)
        _link(graph, hbm, switch, rates.pcie_d2h_Bps, rates.pcie_h2d_Bps, rates.pcie_latency_s)
        if index % host.gpus_per_switch == 0:
            _link(graph, switch, "host.root", host.switch_Bps, host.switch_Bps)
            if host.nic_Bps:
                _link(graph, switch, "nic", host.nic_Bps, host.nic_Bps, host.nic_latency_s)
        if rates.nvlink_Bps and gpus > 1:
            # Half of the latency on each side, so that a peer-to-peer copy pays it once.
            _link(graph, hbm, "nvlink", rates.nvlink_Bps, rates.nvlink_Bps, rates.nvlink_latency_s / 2)
    return graph


def route(graph: "nx.DiGraph[str]", src: str, dst: str) -> tuple[Edge, ...]:
    """The edges that 1 MiB crosses soonest from `src` to `dst`, none when they are the same node.

    A route passes through switches and the devices at its two ends, never through another GPU, a NIC, or DDR that is
    at neither end. Raises ValueError for an unknown node and where no route exists.
    """
    for name in (src, dst):
        if name not in graph:
            raise unknown_name("node", name, list(graph))
    devices = {name.partition(".")[0] for name in (src, dst) if name != "nic"}
    through = [name for name in graph if name in (src, dst) or _passes(name, devices)]

    def cost_s(_tail: str, _head: str, link: dict[str, float]) -> float:
        return link["latency_s"] + _ROUTE_BYTES / link["bandwidth_Bps"]

    try:
        path = nx.dijkstra_path(graph.subgraph(through), src, dst, weight=cost_s)
    except nx.NetworkXNoPath:
        raise ValueError(f"no link leads from {src} to {dst}") from None
    return tuple(pairwise(path))


def transfer_s(graph: "nx.DiGraph[str]", src: str, dst: str, transfer_bytes: int) -> float:
    """Seconds for one transfer alone on the cheapest route: its latencies, then its bytes at the slowest link."""
    edges = [graph.edges[edge] for edge in route(graph, src, dst)]
    if not edges or transfer_bytes == 0:
        return 0.0
    latency_s: float = sum(edge["latency_s"] for edge in edges)
    slowest_Bps: float = min(edge["bandwidth_Bps"] for edge in edges)
    return latency_s + transfer_bytes / slowest_Bps


def _passes(name: str, devices: set[str]) -> bool:
    """Whether a route between `devices` may go through a node."""
    device, _, part = name.partition(".")
    return device == "nvlink" or device.startswith("pcie") or part == "root" or device in devices


def _link(graph: "nx.DiGraph[str]", a: str, b: str, there_Bps: float, back_Bps: float, latency_s: float = 0.0) -> None:
    graph.add_edge(a, b, bandwidth_Bps=there_Bps, latency_s=latency_s)
    graph.add_edge(b, a, bandwidth_Bps=back_Bps, latency_s=latency_s)
