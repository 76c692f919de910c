"""A plan as something to run: `kvsim simulate` with its figures, and the flags of engines in their own names.

vLLM and SGLang serve the dense cache (`full`), with prefixes cached in host memory; of the sparse policies here neither
has one under these terms, which is said instead of a command.
"""

import json
import shlex
from collections.abc import Mapping
from typing import Any

from kvsim.planning.candidates import Family
from kvsim.scenario.scenario_file import OPTIONS
from kvsim.scenario.setup import Setup
from policies import Full

_GIB, _GB = 1 << 30, 10**9
_CHOSEN = ("gpu", "policy", "gpus", "tp", "pp", "prefill_gpus", "slo", "slo_classes", "seeds")


def simulate_command(
    given: Mapping[str, Any],
    family: Family,
    setup: Setup,
    bounds: Mapping[str, float],
    classes: Mapping[str, Any],
    scenario: str | None = None,
) -> str:
    """The `kvsim simulate` that plays a plan again: the user's own options, then what the planner chose."""
    words = ["kvsim", "simulate", *(["--scenario", scenario] if scenario else [])]
    for one in OPTIONS:
        if one.key in given and one.key not in _CHOSEN:
            words += _flag(one.flag, given[one.key])
    words += ["--gpu", family.gpu, "--policy", family.policy, "--gpus", str(setup.gpus), "--tp", str(setup.tp)]
    words += ["--pp", str(setup.pp)] if setup.pp > 1 else []
    words += ["--prefill-gpus", str(setup.prefill_gpus)] if setup.prefill_gpus else []
    words += family.options
    if bounds:
        words += ["--slo", _pairs(bounds)]
    for name, own in classes.items():
        words += ["--slo-class", f"{name}:{_pairs(own)}"]
    return shlex.join(words)


def _pairs(bounds: Mapping[str, float]) -> str:
    return ",".join(f"{name.removesuffix('_s')}={limit_s!r}s" for name, limit_s in bounds.items())


def _flag(flag: str, value: Any) -> list[str]:
    """An option as words of a command line; mappings and lists as their flags take them."""
    if isinstance(value, bool):
        return [flag] if value else []
    if isinstance(value, Mapping):
        if all(isinstance(own, Mapping) for own in value.values()):
            named = ((name, ",".join(f"{key}={part}" for key, part in own.items())) for name, own in value.items())
            return [word for name, terms in named for word in (flag, f"{name}:{terms}")]
        return [flag, ",".join(f"{key}={part}" for key, part in value.items())]
    if isinstance(value, list | tuple):
        return [flag, ",".join(map(str, value))]
    return [flag, str(value)]


def engines(family: Family, setup: Setup, model: str, longest_tokens: int) -> dict[str, Any]:
    """For each engine its `commands`, a server each, with how many of them there are; or `why_not`."""
    if not run_by_engines(family):
        reason = (
            f"has no policy {family.policy} of this kind; here kvsim generate and runtime.offload run it, for a batch "
            "at a time"
        )
        return {name: {"commands": [], "why_not": f"{name} {reason}"} for name in ("vLLM", "SGLang")}
    prompts = setup.prefill_replicas
    servers = {"prompts": prompts, "decoding": setup.replicas - prompts}
    if not prompts:
        servers = {"prompts and decoding": setup.replicas}
    found = {}
    for name, words_of, sizes in (("vLLM", _vllm, _VLLM_SIZES), ("SGLang", _sglang, _SGLANG_SIZES)):
        commands = [
            {"servers": count, "for": work, "command": shlex.join(words_of(setup, work, model, longest_tokens))}
            for work, count in servers.items()
        ]
        notes = [*_notes(setup, model), *([sizes] if setup.prefix_cache_ddr_bytes else [])]
        found[name] = {"commands": commands, "why_not": None, "notes": notes}
    return found


_VLLM_SIZES = "--kv-offloading-size is in GiB, cpu_bytes_to_use in bytes, both of all ranks of a server together"
_SGLANG_SIZES = "--hicache-size is in GB, of one rank"


def _notes(setup: Setup, model: str) -> list[str]:
    notes = [] if "/" in model else [f"{model} stands for its name on Hugging Face, or a folder"]
    if setup.replicas > 1:
        notes.append("a router goes before the servers")
    if setup.router in ("kv-aware", "prefix-affinity"):
        notes.append("it sends a prompt to where its prefix is cached, as Dynamo's router and SGLang's do")
    return notes


def _ddr_bytes_each(setup: Setup) -> int:
    """What a replica has of the host memory for cached prefixes."""
    return setup.prefix_cache_ddr_bytes // setup.replicas_per_host


def _vllm(setup: Setup, work: str, model: str, longest_tokens: int) -> list[str]:
    words = ["vllm", "serve", model, "--tensor-parallel-size", str(setup.tp)]
    words += ["--pipeline-parallel-size", str(setup.pp)] if setup.pp > 1 else []
    words += ["--max-num-seqs", str(setup.max_num_seqs), "--max-num-batched-tokens", str(setup.max_num_batched_tokens)]
    words += ["--gpu-memory-utilization", f"{setup.gpu_memory_utilization:g}", "--max-model-len", str(longest_tokens)]
    caching = any(setup.prefix_cache_bytes.values()) and work != "decoding"
    words.append("--enable-prefix-caching" if caching else "--no-enable-prefix-caching")
    cached_bytes = _ddr_bytes_each(setup) if caching else 0
    if setup.prefill_gpus:
        return [*words, "--kv-transfer-config", json.dumps(_connectors(cached_bytes), separators=(",", ":"))]
    if cached_bytes:
        words += ["--kv-offloading-size", str(cached_bytes // _GIB), "--kv-offloading-backend", "native"]
    return words


def _connectors(cached_bytes: int) -> dict[str, Any]:
    """What hands KV over, and beside it what caches it in host memory."""
    handing: dict[str, Any] = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
    if not cached_bytes:
        return handing
    sizes = {"cpu_bytes_to_use": cached_bytes}
    caching = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": sizes}
    both = {"connectors": [handing, caching]}
    return {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": both}


def _sglang(setup: Setup, work: str, model: str, longest_tokens: int) -> list[str]:
    words = ["python", "-m", "sglang.launch_server", "--model-path", model, "--tp-size", str(setup.tp)]
    words += ["--pp-size", str(setup.pp)] if setup.pp > 1 else []
    words += ["--max-running-requests", str(setup.max_num_seqs)]
    words += ["--chunked-prefill-size", str(setup.max_num_batched_tokens)]
    words += ["--mem-fraction-static", f"{setup.gpu_memory_utilization:g}", "--context-length", str(longest_tokens)]
    if setup.prefix_cache_ddr_bytes and work != "decoding":
        size = str(_ddr_bytes_each(setup) // setup.tp // _GB)
        words += ["--enable-hierarchical-cache", "--hicache-size", size]
    elif not any(setup.prefix_cache_bytes.values()) or work == "decoding":
        words.append("--disable-radix-cache")
    if setup.prefill_gpus:
        words += ["--disaggregation-mode", "prefill" if work == "prompts" else "decode"]
    return words


def run_by_engines(family: Family) -> bool:
    """Whether an engine runs the plan today."""
    return isinstance(family.setup.policy, Full)
