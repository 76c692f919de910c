"""The links that cached prefixes take below PCIe: a queue for each direction of a host's NVMe drives and NIC."""

from dataclasses import dataclass

from kvsim.hardware import Host


@dataclass(slots=True)
class Link:
    """One direction of a device, which serves transfers in the order in which they come."""

    Bps: float
    latency_s: float
    free_s: float = 0.0
    busy_s: float = 0.0
    moved_bytes: int = 0

    def send(self, nbytes: int, now_s: float) -> float:
        """Queue a transfer; when its last byte is there."""
        seconds = nbytes / self.Bps
        self.free_s = max(self.free_s, now_s) + seconds
        self.busy_s += seconds
        self.moved_bytes += nbytes
        return self.free_s + self.latency_s

    def would_take_s(self, nbytes: int, now_s: float) -> float:
        """How long a transfer would take that joined the queue now."""
        return max(self.free_s - now_s, 0.0) + nbytes / self.Bps + self.latency_s


@dataclass(frozen=True, slots=True)
class Way:
    """Up from a tier to DDR, and down to it."""

    up: Link
    down: Link


def ways(host: Host) -> dict[str, Way]:
    """From and to the slow tiers of one host, no faster than its DDR."""
    rates = {
        "nvme": (host.nvme_read_Bps, host.nvme_write_Bps, host.nvme_latency_s),
        "remote": (host.nic_Bps, host.nic_Bps, host.nic_latency_s),
    }
    return {
        name: Way(Link(min(up_Bps, host.ddr_Bps), latency_s), Link(min(down_Bps, host.ddr_Bps), latency_s))
        for name, (up_Bps, down_Bps, latency_s) in rates.items()
    }
