"""A plan as something to run: `kvsim simulate` with its figures, and the flags of engines in their own names.

vLLM and SGLang serve the dense cache (`full`), with prefixes cached in host memory; of the sparse policies here neither
has one under these terms, which is said instead of a command.
"""

import shlex
from collections.abc import Mapping
from typing import Any

from kvsim.planning.candidates import Family
from kvsim.scenario.scenario_file import OPTIONS
from policies.full import Full

_GIB, _GB = 1 << 30, 10**9
_CHOSEN = ("gpu", "policy", "gpus", "tp", "pp", "prefill_gpus", "slo", "slo_classes", "seeds")


def simulate_command(
    given: Mapping[str, Any],
    family: Family,
    replicas: int,
    bounds: Mapping[str, float],
    classes: Mapping[str, Any],
    scenario: str | None = None,
) -> str:
    """The `kvsim simulate` that plays a plan again: the user's own options, then what the planner chose."""
    words = ["kvsim", "simulate", *(["--scenario", scenario] if scenario else [])]
    for one in OPTIONS:
        if one.key in given and one.key not in _CHOSEN:
            words += _flag(one.flag, given[one.key])
    setup = family.fleet(replicas)
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


def engines(family: Family, replicas: int, model: str, longest_tokens: int) -> dict[str, Any]:
    """For each engine the command of one replica and what goes with it, or why it cannot run the plan."""
    if not isinstance(family.setup.policy, Full):
        reason = (
            f"has no policy {family.policy}; the policy is run by this package (kvsim generate, runtime.offload), one "
            "request at a time"
        )
        return {
            "vllm": {"command": None, "why_not": f"vLLM {reason}"},
            "sglang": {"command": None, "why_not": f"SGLang {reason}"},
        }
    setup = family.fleet(replicas)
    notes = [f"{setup.replicas} such servers, behind a router"]
    if setup.router in ("kv-aware", "prefix-affinity"):
        notes.append("the router sends a prompt to where its prefix is cached, as Dynamo's KV router and SGLang's do")
    if setup.prefill_gpus:
        notes.append(f"{setup.prefill_replicas} of them process prompts alone and hand their KV over to the others")
    return {
        "vllm": {
            "command": shlex.join(_vllm(family, replicas, model, longest_tokens)),
            "notes": notes + _vllm_notes(family),
        },
        "sglang": {
            "command": shlex.join(_sglang(family, replicas, model, longest_tokens)),
            "notes": notes + _sglang_notes(family),
        },
    }


def _ddr_bytes_each(family: Family, replicas: int) -> int:
    """What a replica has of the host memory for cached prefixes."""
    return family.setup.prefix_cache_ddr_bytes // family.fleet(replicas).replicas_per_host


def _vllm(family: Family, replicas: int, model: str, longest_tokens: int) -> list[str]:
    setup = family.setup
    words = ["vllm", "serve", model, "--tensor-parallel-size", str(setup.tp)]
    words += ["--pipeline-parallel-size", str(setup.pp)] if setup.pp > 1 else []
    words += ["--max-num-seqs", str(setup.max_num_seqs), "--max-num-batched-tokens", str(setup.max_num_batched_tokens)]
    words += ["--gpu-memory-utilization", f"{setup.gpu_memory_utilization:g}", "--max-model-len", str(longest_tokens)]
    cached = any(setup.prefix_cache_bytes.values())
    words.append("--enable-prefix-caching" if cached else "--no-enable-prefix-caching")
    if setup.prefix_cache_ddr_bytes:
        words += ["--kv-offloading-size", str(_ddr_bytes_each(family, replicas) // _GIB)]
        words += ["--kv-offloading-backend", "native"]
    if setup.prefill_gpus or family.prefill_share is not None:
        transfer = '{"kv_connector":"NixlConnector","kv_role":"kv_both"}'
        words += ["--kv-transfer-config", transfer]
    return words


def _vllm_notes(family: Family) -> list[str]:
    notes = []
    if family.setup.prefix_cache_ddr_bytes:
        notes.append("--kv-offloading-size is in GiB, of all its ranks together")
    if family.prefill_share is not None and family.setup.prefix_cache_ddr_bytes:
        notes.append("offloading and handing over are two KV connectors: vLLM joins them by its MultiConnector")
    return notes


def _sglang(family: Family, replicas: int, model: str, longest_tokens: int) -> list[str]:
    setup = family.setup
    words = ["python", "-m", "sglang.launch_server", "--model-path", model, "--tp-size", str(setup.tp)]
    words += ["--pp-size", str(setup.pp)] if setup.pp > 1 else []
    words += ["--max-running-requests", str(setup.max_num_seqs)]
    words += ["--chunked-prefill-size", str(setup.max_num_batched_tokens)]
    words += ["--mem-fraction-static", f"{setup.gpu_memory_utilization:g}", "--context-length", str(longest_tokens)]
    if setup.prefix_cache_ddr_bytes:
        each = _ddr_bytes_each(family, replicas) // setup.tp // _GB
        words += ["--enable-hierarchical-cache", "--hicache-size", str(each)]
    elif not any(setup.prefix_cache_bytes.values()):
        words.append("--disable-radix-cache")
    if family.prefill_share is not None:
        words += ["--disaggregation-mode", "prefill|decode"]
    return words


def _sglang_notes(family: Family) -> list[str]:
    notes = []
    if family.setup.prefix_cache_ddr_bytes:
        notes.append("--hicache-size is in GB for each rank")
    if family.prefill_share is not None:
        notes.append("--disaggregation-mode is prefill on servers for prompts, decode on the others")
    return notes


def run_by_engines(family: Family) -> bool:
    """Whether an engine runs the plan today."""
    return isinstance(family.setup.policy, Full)
