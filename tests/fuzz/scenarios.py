"""Mutated scenario files: every key of `simulate`, as YAML with what parsers of YAML stumble over."""

import random
from pathlib import Path
from typing import Any

import yaml
from fuzz import mutate
from fuzz.base import SCENARIO, write_trace
from fuzz.door import attempt_command

MORE: tuple[dict[str, Any], ...] = (
    {"rate_scale": 2.0, "seed": 1, "warmup": "1s", "timeout": "30s"},
    {"scheduler": "fair", "prompt_token_weight": 1.0, "output_token_weight": 2.0},
    {"scheduler": "priority", "preemption": "recompute", "max_num_seqs": 8},
    {"prefix_cache_hbm": "1GiB", "prefix_cache_ddr": "2GiB", "prefix_cache_eviction": "lru"},
    {"prefix_cache_ddr": "1GiB", "prefix_cache_nvme": "1GiB", "prefix_cache_write": "back"},
    {"prefix_cache_ddr": "1GiB", "prefix_cache_quota": {"chat": 0.5, "code": 0.5}},
    {"gpus": 2, "tp": 2, "router": "least-loaded", "host": "ddr5-dual-xeon"},
    {"gpus": 2, "pp": 2, "max_num_batched_tokens": "4Ki"},
    {"gpus": 2, "prefill_gpus": 1, "fidelity": "step"},
    {"speculate": 3, "acceptance": [0.7], "draft_share": 0.1, "tree": 3},
    {"kv_dtype": "fp8", "weight_dtype": "int8", "gpu_memory_utilization": 0.8, "host_memory_utilization": 0.9},
    {"policy": "shadowkv", "counts": {"miss": 0.3}},
    {"sessions": "closed", "session_kv": "keep", "skip_bad_rows": True},
    {"slo": {"ttft": "10s", "tpot": "50ms"}, "seeds": 2},
    {"perfetto": "0s-1s"},
)


def attempt(rng: random.Random, folder: Path) -> str:
    """Write one mutated scenario and simulate it."""
    write_trace(folder)
    return simulate(rng, folder, {**SCENARIO, **rng.choice(MORE), **rng.choice(MORE)})


def simulate(rng: random.Random, folder: Path, original: dict[str, Any]) -> str:
    """Simulate a mutation of this scenario; one in five writes its results."""
    (folder / "s.yaml").write_bytes(written(rng, original))
    args = ["simulate", "--scenario", "s.yaml", "--limit", "3"]
    return attempt_command([*args, *rng.choice(([], [], ["--json"], ["--out", "out"], []))], folder)


def written(rng: random.Random, original: dict[str, Any]) -> bytes:
    """The document as YAML, with values changed by type, a word replaced, or bytes damaged."""
    kind = rng.random()
    changed = mutate.document(rng, original, rng.choice((1, 1, 2))) if kind < 0.5 else original
    text = yaml.safe_dump(changed, default_flow_style=None)
    if 0.45 < kind < 0.7:
        text = mutate.spliced(rng, text)
    content = text.encode(errors="surrogatepass")
    return content if kind < 0.9 else mutate.damaged(rng, content)
