"""A GPU and its host with slower links: what a plan is asked about when a link does not deliver."""

from dataclasses import replace

from kvsim.hardware.catalogue import Gpu, Host
from kvsim.hardware.kernels.fitted import FittedPrices


def slower_link(gpu: Gpu, share: float) -> Gpu:
    """The GPU with `share` of its rates to host memory, each way and in gathers; latencies and NVLink stay."""
    rates = replace(
        gpu.rates,
        pcie_h2d_Bps=gpu.rates.pcie_h2d_Bps * share,
        pcie_d2h_Bps=gpu.rates.pcie_d2h_Bps * share,
        gather_curve=tuple((size, Bps * share) for size, Bps in gpu.rates.gather_curve),
    )
    chip = replace(
        gpu.kernels.chip,
        pcie_h2d_Bps=gpu.kernels.chip.pcie_h2d_Bps * share,
        pcie_d2h_Bps=gpu.kernels.chip.pcie_d2h_Bps * share,
    )
    prices = gpu.kernels.prices
    if isinstance(prices, FittedPrices):
        fitted = replace(prices, chip=chip, rated=replace(prices.rated, chip=chip, rates=rates))
        return replace(gpu, rates=rates, kernels=replace(gpu.kernels, chip=chip, prices=fitted))
    return replace(
        gpu, rates=rates, kernels=replace(gpu.kernels, chip=chip, prices=replace(prices, chip=chip, rates=rates))
    )


def slower_host(host: Host, share: float) -> Host:
    """The host with `share` of the rates of its PCIe switches and network adapters."""
    return replace(host, switch_Bps=host.switch_Bps * share, nic_Bps=host.nic_Bps * share)
