"""Prefix caches on a recorded hour of chat: tiers, eviction orders and ways of using them, one row each.

Mooncake's conversation trace on eight H100s with Llama-3.1-8B. Prints the tables of `docs/prefix_caches.md`.

    python benchmarks/prefix_caches.py [--limit N]
"""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import replace

from kvsim import load_scenario, simulate, summarize
from traces import Trace

BASE = {"trace": "mooncake-conversation", "model": "llama-3.1-8b", "gpu": "h100-sxm", "gpus": 8}
DDR, NVME, REMOTE = {"prefix_cache_ddr": "400GB"}, {"prefix_cache_nvme": "8TB"}, {"prefix_cache_remote": "8TB"}
DRIVE_BPS = 6.9e9  # a single one, where the host has eight of these
EVICTIONS = ("fifo", "lru", "lfu", "scheduler-aware", "belady")
TIERS: tuple[tuple[str, dict[str, object]], ...] = (
    ("none", {}),
    ("HBM 80 GB", {"prefix_cache_hbm": "80GB"}),
    ("DDR 100 GB", {"prefix_cache_ddr": "100GB"}),
    ("DDR 400 GB", DDR),
    ("DDR 1.6 TB", {"prefix_cache_ddr": "1600GB"}),
    ("NVMe 8 TB", NVME),
    ("remote 8 TB", REMOTE),
    ("DDR 400 GB + NVMe 8 TB", DDR | NVME),
    ("the same, written back", DDR | NVME | {"prefix_cache_write": "back"}),
    ("the same, prefetched", DDR | NVME | {"prefix_cache_prefetch": True}),
    ("DDR 400 GB + remote 8 TB", DDR | REMOTE),
)
WAYS: tuple[tuple[str, dict[str, object]], ...] = (
    ("load always", {}),
    ("load ahead", {"prefix_cache_prefetch": True}),
    ("load or compute", {"prefix_cache_reuse": "cheaper"}),
    ("both", {"prefix_cache_prefetch": True, "prefix_cache_reuse": "cheaper"}),
)
LINKS = ("hbm->ddr", "ddr->hbm", "ddr->nvme", "nvme->ddr", "ddr->remote", "remote->ddr")


def row(trace: Trace, name: str, options: dict[str, object], **host: float) -> list[str]:
    """One simulation's figures, as text: hit ratio, TTFT, and what prefixes moved over each link, in TB."""
    setup = load_scenario({**BASE, **options}).setups()[0]
    result = simulate(trace, replace(setup, host=replace(setup.host, **host)))
    ttft_s = summarize(result)["ttft_s"]
    hits = sum(tier["hit_blocks"] for tier in result.cache.values())
    moved = [result.traffic.get(link, {}).get("prefix", 0) for link in LINKS]
    return [
        name,
        f"{hits / len(trace.block_ids):.1%}",
        *(f"{ttft_s[p]:.3f}" for p in ("mean", "p50", "p99")),
        *(f"{nbytes / 1e12:.2f}" if nbytes else "" for nbytes in moved),
    ]


def table(first: str, rows: Iterable[list[str]]) -> None:
    """Print a Markdown table, line by line as its rows are simulated."""
    head = [first, "hit ratio", "TTFT mean, s", "p50", "p99", *LINKS]
    for line in (head, ["---", *["---:"] * (len(head) - 1)]):
        sys.stdout.write(f"| {' | '.join(line)} |\n")
    for line in rows:
        sys.stdout.write(f"| {' | '.join(line)} |\n")
        sys.stdout.flush()
    sys.stdout.write("\n")


def main() -> None:
    """Simulate and print all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, help="replay the first N requests only")
    trace = load_scenario({**BASE, "limit": parser.parse_args().limit}).load_trace()
    table("tiers, LRU", (row(trace, name, options) for name, options in TIERS))
    table("DDR 400 GB", (row(trace, name, DDR | {"prefix_cache_eviction": name}) for name in EVICTIONS))
    options = DDR | NVME | {"prefix_cache_write": "back"}
    table(
        "DDR 400 GB + one drive, written back",
        (row(trace, name, options | way, nvme_read_Bps=DRIVE_BPS, nvme_write_Bps=4.1e9) for name, way in WAYS),
    )


if __name__ == "__main__":
    main()
