"""A builder of results as a simulation would give them: random, but the same for the same seed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvsim.results.causes import CAUSES
from kvsim.results.summary import Array, Result

GIB = 2**30
TRAFFIC_CAUSES = ("plans", "weights", "swaps", "prefix", "collectives")
LINKS = ("gpu0.hbm->gpu0.sm", "gpu1.hbm->gpu1.sm", "host.ddr->gpu0.hbm", "gpu0.hbm->host.ddr", "gpu0.hbm->gpu1.hbm")


def spent(rng: np.random.Generator, ttft_s: Array, e2e_s: Array) -> dict[str, Array]:
    """Columns of seconds by cause that add up to times since admission, at random."""
    names = [name for name in CAUSES if name != "queue"]
    shares = rng.dirichlet(np.ones(len(names)), len(e2e_s)).T
    ttft = {name: share * ttft_s for name, share in zip(names, shares, strict=True)}
    later = rng.dirichlet(np.ones(len(names) - 1), len(e2e_s)).T  # nobody waits for a prefix once it has a token
    found = {"prefix_s": ttft.pop("prefix")}
    for (name, first_s), share in zip(ttft.items(), later, strict=True):
        found |= {f"{name}_s": first_s + share * (e2e_s - ttft_s), f"ttft_{name}_s": first_s}
    return found


def build_result(
    *, policy: str = "full", count: int = 200, tenants: tuple[str, ...] = ("default",), seed: int = 0, **changes: Any
) -> Result:
    """A result of two GPUs and one host; every 17th request was rejected. `changes` replace fields of `Result`."""
    rng = np.random.default_rng(seed)
    arrival_s = np.sort(rng.uniform(0, 600, count))
    output_tokens = rng.integers(1, 400, count)
    admitted_s = arrival_s + rng.exponential(0.5, count)
    first_token_s = admitted_s + rng.lognormal(0, 0.8, count)
    finish_s = first_token_s + (output_tokens - 1) * rng.lognormal(-4, 0.3, count)
    status = np.where(np.arange(count) % 17 == 16, "rejected", "finished")
    for column in (admitted_s, first_token_s, finish_s):
        column[status == "rejected"] = np.nan
    prompt_tokens = rng.integers(100, 100_000, count)
    traffic = {link: {cause: int(rng.integers(0, 10**13)) for cause in TRAFFIC_CAUSES} for link in LINKS}
    memory = {"gpu0.hbm": 80 * GIB, "gpu1.hbm": 80 * GIB, "host.ddr": 1024 * GIB}
    rows = 1500
    fields: dict[str, Any] = {
        "inputs": {
            "trace": "synthetic",
            "trace_notes": ["its arrivals are uniform"],
            "requests": count,
            "model": "llama-3.1-8b",
            "gpu": "h100-sxm",
            "gpus": 2,
            "tp": 1,
            "host": "ddr5-dual-xeon",
            "policy": policy,
            "options": {"seed": seed, "limit": None},
            "versions": {"kvsim": "0.1.0"},
        },
        "requests": {
            "request": np.arange(count),
            "tenant": np.array(tenants)[np.arange(count) % len(tenants)],
            "session": np.arange(count) // 2,
            "replica": np.arange(count) % 2,
            "arrival_s": arrival_s,
            "admitted_s": admitted_s,
            "first_token_s": first_token_s,
            "finish_s": finish_s,
            "prompt_tokens": prompt_tokens,
            "cached_tokens": prompt_tokens // 3,
            "output_tokens": output_tokens,
            "preemptions": rng.integers(0, 2, count),
            "status": status,
            **spent(rng, first_token_s - admitted_s, finish_s - admitted_s),
        },
        "token_gaps": (rng.lognormal(-4, 0.3, 500), rng.integers(1, 50, 500)),
        "series": {
            "time_s": np.repeat(np.linspace(0, 650, rows), 2),
            "replica": np.tile([0, 1], rows),
            "hbm_bytes": (GIB * (45 + 30 * np.sin(np.arange(2 * rows) / 300 + seed) + rng.normal(0, 2, 2 * rows))),
            "ddr_bytes": GIB * np.abs(np.cumsum(rng.normal(0, 1, 2 * rows))),
            "running": rng.integers(0, 64, 2 * rows),
            "waiting": rng.integers(0, 9, 2 * rows),
        },
        "preempted": {
            name: np.empty(0, kind) for name, kind in (("request", np.int64), ("from_s", float), ("to_s", float))
        },
        "memory": {
            node: {"capacity_bytes": size, "peak_bytes": 0.9 * size - seed * GIB, "mean_bytes": 0.5 * size}
            for node, size in memory.items()
        },
        "links": {
            link: {"bytes": sum(causes.values()), "busy_s": 20.0, "utilization": 0.03 + 0.1 * rng.random()}
            for link, causes in traffic.items()
        },
        "traffic": traffic,
        "cache": {
            "hbm": {"lookup_blocks": 5000, "hit_blocks": 1200},
            "ddr": {"lookup_blocks": 3800, "hit_blocks": 950},
        },
        "swaps": {"count": 12, "bytes": 7 * GIB},
        "recomputed": {"count": 0, "tokens": 0},
        "busy": {
            "compute": 0.41,
            "hbm": 0.3 + 0.6 * rng.random(),
            "pcie_up": 0.22,
            "pcie_down": 0.05,
            "cpu": 0.0,
            "nvlink": 0.01,
        },
        "makespan_s": 650.0,
        "wall_s": 1.5,
        "cpu_s": 1.25,
        "setup_cpu_s": 0.75,
    }
    return Result(**(fields | changes))


@pytest.fixture
def make_result() -> Callable[..., Result]:
    """`build_result`, for test files that build several."""
    return build_result
