"""Options of serving engines that a simulation lacks by that name: what stands for each, or that nothing does.

Keys are as in scenario files; flags have dashes. docs/limits.md has what is not modelled.
"""

_EXPERTS = (
    "expert parallelism is not modelled: each of tp ranks has its slice of every expert, so bytes and products are "
    "those of evenly spread experts, without all-to-alls; leave it out"
)
_ATTENTION = (
    "data-parallel attention is not modelled: each of tp ranks holds the whole latent of every sequence, and --pp "
    "divides it; leave it out"
)
_REPLICAS = "a cluster has gpus / (tp x pp) replicas; state --gpus"

ENGINE_NAMES = {
    **dict.fromkeys(
        (
            "ep",
            "ep_size",
            "expert_parallel_size",
            "enable_expert_parallel",
            "enable_ep_moe",
            "moe_ep_size",
            "moe_expert_parallel_size",
            "enable_eplb",
            "all2all_backend",
            "moe_a2a_backend",
        ),
        _EXPERTS,
    ),
    **dict.fromkeys(("enable_dp_attention", "enable_attention_dp"), _ATTENTION),
    **dict.fromkeys(("dp", "dp_size", "data_parallel_size"), _REPLICAS),
    **dict.fromkeys(("tp_size", "tensor_parallel_size"), "say --tp"),
    **dict.fromkeys(("pp_size", "pipeline_parallel_size"), "say --pp"),
    "mem_fraction_static": "say --engine sglang and --gpu-memory-utilization",
    "max_total_tokens": "say --kv-cache-tokens",
    "num_gpu_blocks_override": "say --kv-cache-blocks",
    **dict.fromkeys(("block_size", "page_size"), "say --kv-cache-block-tokens, beside --kv-cache-blocks"),
    "kv_cache_memory_bytes": "say --kv-cache-memory",
    "max_running_requests": "say --max-num-seqs",
    "chunked_prefill_size": "say --max-num-batched-tokens",
}


def in_words(name: str) -> str | None:
    """What to say of a flag or key of an engine's; None for any other."""
    return ENGINE_NAMES.get(name.removeprefix("--").replace("-", "_"))
