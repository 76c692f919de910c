"""Prefix caches on a recorded hour of chat: tiers, eviction orders and ways of using them, one row each.

Mooncake's conversation trace on eight H100s with Llama-3.1-8B.
"""

from dataclasses import replace
from typing import Any

from benchmarks.docs_tables.markdown import holding, paragraph, share, table
from benchmarks.docs_tables.runs import written_by
from kvsim import load_scenario, simulate, summarize
from traces import Trace
from traces.stats import infinite_cache_hit_ratio

BASE = {"trace": "mooncake-conversation", "model": "llama-3.1-8b", "gpu": "h100-sxm", "gpus": 8}
DDR, NVME, REMOTE = {"prefix_cache_ddr": "400GB"}, {"prefix_cache_nvme": "8TB"}, {"prefix_cache_remote": "8TB"}
BACK, AHEAD = {"prefix_cache_write": "back"}, {"prefix_cache_prefetch": True}
ONE_DRIVE = {"nvme_read_Bps": 6.9e9, "nvme_write_Bps": 4.1e9}  # a single one, where the host has eight of these
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
    ("the same, written back", DDR | NVME | BACK),
    ("the same, prefetched", DDR | NVME | AHEAD),
    ("DDR 400 GB + remote 8 TB", DDR | REMOTE),
)
WAYS: tuple[tuple[str, dict[str, object]], ...] = (
    ("load always", {}),
    ("load ahead", AHEAD),
    ("load or compute", {"prefix_cache_reuse": "cheaper"}),
    ("both", AHEAD | {"prefix_cache_reuse": "cheaper"}),
)
LINKS = ("hbm->ddr", "ddr->hbm", "ddr->nvme", "nvme->ddr", "ddr->remote", "remote->ddr")


def measure(limit: int | None) -> dict[str, Any]:
    """The rows of the three tables."""
    trace = load_scenario({**BASE, "limit": limit}).load_trace()
    return {
        "requests": len(trace),
        "most_hit": infinite_cache_hit_ratio(trace),
        "tiers": [_row(trace, name, options) for name, options in TIERS],
        "evictions": [_row(trace, name, DDR | {"prefix_cache_eviction": name}) for name in EVICTIONS],
        "ways": [_row(trace, name, DDR | NVME | BACK | way, **ONE_DRIVE) for name, way in WAYS],
    }


def _row(trace: Trace, name: str, options: dict[str, object], **host: float) -> dict[str, Any]:
    """One simulation's figures: hit ratio of all prompt blocks, TTFT, and what prefixes moved over each link."""
    setup = load_scenario({**BASE, **options}).setups()[0]
    result = simulate(trace, replace(setup, host=replace(setup.host, **host)))
    ttft_s = summarize(result)["ttft_s"]
    return {
        "name": name,
        "hit": sum(tier["hit_blocks"] for tier in result.cache.values()) / len(trace.block_ids),
        **{f"ttft_{p}_s": ttft_s[p] for p in ("mean", "p50", "p99")},
        "moved_bytes": {link: result.traffic.get(link, {}).get("prefix", 0) for link in LINKS},
    }


def page(result: dict[str, Any]) -> str:
    """Three tables, and what can be read off them."""
    of = {row["name"]: row for rows in ("tiers", "evictions", "ways") for row in result[rows]}
    mean = {name: row["ttft_mean_s"] for name, row in of.items()}
    over, ahead = "DDR 400 GB + NVMe 8 TB", "the same, prefetched"
    used = [of[name]["hit"] for name in EVICTIONS if name != "belady"]
    foreseen = of["belady"]["hit"]
    return (
        "# Prefix caches on an hour of chat\n\n"
        + paragraph(
            written_by("prefix_caches", result),
            f"Mooncake's conversation trace ({result['requests']:,} requests) on eight H100s with Llama-3.1-8B under "
            "`full` and a DDR5 host. The hit ratio is that of all prompt blocks; a cache without bounds would hit "
            f"{result['most_hit']:.1%} of them. Links have what prefixes moved, in TB. What the options mean: "
            "`docs/prefix_caches.md`.",
        )
        + "\n"
        + _table("tiers, LRU", result["tiers"])
        + "\n"
        + paragraph(
            *holding(
                (
                    mean["none"] > mean["DDR 100 GB"] > mean["DDR 400 GB"] > mean["DDR 1.6 TB"],
                    "Each larger tier in DDR moves the mean TTFT as well as hits.",
                ),
                (
                    abs(of["NVMe 8 TB"]["hit"] - of[over]["hit"]) < 0.005 and mean["NVMe 8 TB"] > 1.02 * mean[over],
                    "NVMe alone hits what DDR over NVMe does, and is slower where many load at once.",
                ),
                (
                    abs(mean[ahead] / mean[over] - 1) < 0.01,
                    "Prefetching hides little here: at this rate few requests wait.",
                ),
            ),
        )
        + "\n"
        + _table("DDR 400 GB", result["evictions"])
        + "\n"
        + paragraph(
            *holding(
                (
                    max(used) - min(used) < 0.03,
                    "A trace of mostly new conversations leaves the orders of use little to tell apart.",
                ),
                (
                    foreseen > max(used),
                    (
                        f"Knowing the future, the same 400 GB would hit {foreseen:.1%} of the "
                        f"{result['most_hit']:.1%} that can be hit."
                    ),
                ),
                (
                    abs(of["scheduler-aware"]["hit"] - of["lru"]["hit"]) < 0.002,
                    "The queue is too short to look ahead into.",
                ),
            ),
        )
        + "\n"
        + _table("DDR 400 GB + one drive, written back", result["ways"])
        + "\n"
        + paragraph(
            "One drive reads 6.9 GB/s, for eight GPUs.",
            *holding(
                (
                    mean["load or compute"] < mean["load always"]
                    and of["load or compute"]["hit"] < of["load always"]["hit"],
                    (
                        "Computing what would come up too late is better than more hits: the mean TTFT is "
                        f"{share(1 - mean['load or compute'] / mean['load always'])} shorter."
                    ),
                ),
            ),
        )
    )


def _table(first: str, rows: list[dict[str, Any]]) -> str:
    return table(
        (first, "hit ratio", "TTFT mean, s", "p50", "p99", *LINKS),
        (
            [
                row["name"],
                f"{row['hit']:.1%}",
                *(f"{row[f'ttft_{p}_s']:.3f}" for p in ("mean", "p50", "p99")),
                *(f"{nbytes / 1e12:.2f}" if nbytes else "" for nbytes in row["moved_bytes"].values()),
            ]
            for row in rows
        ),
    )
