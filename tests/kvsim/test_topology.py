"""Routes and transfer times on node graphs, against closed forms."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.hardware.catalogue import Gpu, Host, gpu_names, load_gpu, load_host
from kvsim.hardware.topology import node_graph, route, transfer_s

H100, DDR5 = load_gpu("h100-sxm"), load_host("ddr5-dual-xeon")


def nodes(edges: tuple[tuple[str, str], ...]) -> list[str]:
    assert all(first[1] == second[0] for first, second in pairwise(edges))
    return [edges[0][0], *(head for _, head in edges)]


@pytest.fixture
def a100() -> Gpu:
    return load_gpu("a100-80g-sxm@datasheet")


@pytest.fixture
def host() -> Host:
    return replace(load_host("ddr4-dual-xeon"), switch_Bps=40e9)


def test_a_copy_to_the_gpu_takes_latency_and_bytes_over_the_slowest_link(a100: Gpu, host: Host) -> None:
    gpu = replace(a100, rates=replace(a100.rates, pcie_latency_s=1e-5))
    graph = node_graph(gpu, host, 1)
    assert nodes(route(graph, "host.ddr", "gpu0.hbm")) == ["host.ddr", "host.root", "pcie0", "gpu0.hbm"]
    assert transfer_s(graph, "host.ddr", "gpu0.hbm", 31_500_000_000) == pytest.approx(1.00001)
    narrow = node_graph(gpu, replace(host, switch_Bps=10e9), 1)
    assert transfer_s(narrow, "host.ddr", "gpu0.hbm", 10**9) == pytest.approx(0.10001)


def test_directions_have_their_own_rates(a100: Gpu, host: Host) -> None:
    graph = node_graph(replace(a100, rates=replace(a100.rates, pcie_d2h_Bps=10e9)), host, 1)
    assert transfer_s(graph, "gpu0.hbm", "host.ddr", 10**10) == pytest.approx(1)
    assert transfer_s(graph, "host.ddr", "gpu0.hbm", 10**10) == pytest.approx(10 / 31.5)


def test_peers_use_nvlink_when_they_have_it(a100: Gpu, host: Host) -> None:
    linked = node_graph(replace(a100, rates=replace(a100.rates, nvlink_latency_s=1e-5)), host, 8)
    assert nodes(route(linked, "gpu0.hbm", "gpu7.hbm")) == ["gpu0.hbm", "nvlink", "gpu7.hbm"]
    assert transfer_s(linked, "gpu0.hbm", "gpu7.hbm", 3 * 10**9) == pytest.approx(0.01001)
    bare = node_graph(replace(a100, rates=replace(a100.rates, nvlink_Bps=0.0)), host, 8)
    assert nodes(route(bare, "gpu0.hbm", "gpu1.hbm")) == ["gpu0.hbm", "pcie0", "gpu1.hbm"]
    assert nodes(route(bare, "gpu0.hbm", "gpu2.hbm")) == ["gpu0.hbm", "pcie0", "host.root", "pcie1", "gpu2.hbm"]


def test_nothing_passes_through_another_gpu_or_a_nic(a100: Gpu, host: Host) -> None:
    # NVLink and the network are far faster than PCIe here, and still no shortcut for a copy from the host.
    fast = replace(host, nic_Bps=1e13, nic_latency_s=0.0, switch_Bps=1e9)
    graph = node_graph(a100, fast, 4)
    assert nodes(route(graph, "host.ddr", "gpu2.hbm")) == ["host.ddr", "host.root", "pcie1", "gpu2.hbm"]
    assert nodes(route(graph, "gpu2.hbm", "nic")) == ["gpu2.hbm", "pcie1", "nic"]


def test_nvme_and_processors(a100: Gpu, host: Host) -> None:
    graph = node_graph(a100, host, 2)
    read_s = transfer_s(graph, "host.nvme", "host.ddr", 10**9)
    assert read_s == pytest.approx(host.nvme_latency_s + 10**9 / host.nvme_read_Bps)
    assert nodes(route(graph, "host.ddr", "gpu1.sm"))[-2:] == ["gpu1.hbm", "gpu1.sm"]
    assert transfer_s(graph, "gpu0.hbm", "gpu0.sm", 2_039_000_000) == pytest.approx(1e-3)
    assert transfer_s(graph, "gpu0.hbm", "gpu0.hbm", 10**9) == 0.0
    assert transfer_s(graph, "host.ddr", "gpu0.hbm", 0) == 0.0


def test_gpus_share_switches(a100: Gpu, host: Host) -> None:
    graph = node_graph(a100, host, 8)
    assert sorted(name for name in graph if name.startswith("pcie")) == ["pcie0", "pcie1", "pcie2", "pcie3"]
    shared = set(route(graph, "host.ddr", "gpu0.hbm")) & set(route(graph, "host.ddr", "gpu1.hbm"))
    assert ("host.root", "pcie0") in shared
    assert ("host.root", "pcie0") not in route(graph, "host.ddr", "gpu2.hbm")


def test_the_desktops_older_slots_bind_an_rtx_4090() -> None:
    graph = node_graph(load_gpu("rtx-4090"), load_host("desktop-i9-10900x"), 1)
    latency_s = load_gpu("rtx-4090").rates.pcie_latency_s
    assert transfer_s(graph, "host.ddr", "gpu0.hbm", 12 * 10**9) == pytest.approx(1 + latency_s)


def test_gb200_reads_grace_memory_over_c2c() -> None:
    graph = node_graph(load_gpu("gb200@datasheet"), load_host("grace"), 2)
    assert transfer_s(graph, "host.ddr", "gpu1.hbm", 450 * 10**6) == pytest.approx(1e-3)


@pytest.mark.parametrize("name", gpu_names())
def test_every_gpu_builds_a_node(name: str) -> None:
    graph = node_graph(load_gpu(name), load_host("ddr5-dual-xeon"), 8)
    assert all(link["bandwidth_Bps"] > 0 and link["latency_s"] >= 0 for _, _, link in graph.edges(data=True))
    assert len(route(graph, "gpu0.hbm", "gpu7.hbm")) >= 2


@given(small=st.integers(1, 2**40), more=st.integers(0, 2**40), faster=st.floats(1, 10))
def test_more_bytes_never_take_less_time_nor_faster_links_more(small: int, more: int, faster: float) -> None:
    graph = node_graph(H100, DDR5, 2)
    better = node_graph(H100, replace(DDR5, switch_Bps=DDR5.switch_Bps * faster), 2)
    base_s = transfer_s(graph, "host.ddr", "gpu0.hbm", small)
    assert transfer_s(graph, "host.ddr", "gpu0.hbm", small + more) >= base_s
    assert transfer_s(better, "host.ddr", "gpu0.hbm", small) <= base_s


def test_errors(a100: Gpu, host: Host) -> None:
    with pytest.raises(ValueError, match="gpus=9 does not fit host 'ddr4-dual-xeon'; it takes 1 to 8"):
        node_graph(a100, host, 9)
    graph = node_graph(a100, load_host("h200-vm"), 1)
    with pytest.raises(ValueError, match=r"unknown node 'gpu1\.hbm'; did you mean 'gpu0\.hbm'\?"):
        route(graph, "host.ddr", "gpu1.hbm")
    graph.remove_node("pcie0")
    with pytest.raises(ValueError, match=r"no link leads from host\.ddr to gpu0\.hbm"):
        route(graph, "host.ddr", "gpu0.hbm")
