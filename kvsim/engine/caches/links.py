"""The links that cached prefixes take below PCIe: a queue for each direction of a host's NVMe drives and NIC."""

from kvsim.engine.state.cluster import Record


def send(link: Record, nbytes: int, now_s: float) -> float:
    """Queue a transfer; when its last byte is there."""
    seconds = nbytes / link["Bps"]
    link["free_s"] = max(link["free_s"], now_s) + seconds
    link["busy_s"] += seconds
    link["moved_bytes"] += nbytes
    return float(link["free_s"] + link["latency_s"])


def would_take_s(link: Record, nbytes: int, now_s: float) -> float:
    """How long a transfer would take that joined the queue now."""
    return float(max(link["free_s"] - now_s, 0.0) + nbytes / link["Bps"] + link["latency_s"])
