"""What an engine's memory leaves for KV: the device less weights and a reserve by source, or what was asked for.

The reserve is what engines log, by source: the CUDA context and its libraries, CUDA graphs, buffers of NCCL and of
custom all-reduces, and the peak of activations. A pass of `t` tokens holds, in bytes of one rank,

    a residual of two rows of the hidden size, 4 h t, and, whichever is larger,
    a layer: 4 h t more and the MLP's gate, up and product, 6 w t, or
    the logits of as many sequences as may run, over the whole vocabulary of every rank: c v s

with h the hidden size, w the rank's width of the MLP, v the vocabulary, s the sequences and c bytes for each logit:
copies in 16 and 32 bits, sorted ones and their indices, by version of the engine. Workspaces of experts (two thirds of
an MLP of all experts that a token uses, and what goes back to the hidden size) stay while logits are computed.

SGLang takes its share of what is free once contexts and communicators are there, and subtracts weights alone: graphs
and activations have the rest. How well all of it meets published logs is in docs/measured/engine_memory.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from kvsim.hardware.catalogue import Gpu
from policies import ModelShape

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMemory:
    """An engine's reserve on each GPU; `sources` says where each figure is from."""

    context_bytes: int
    graphs_bytes: int
    nvlink_bytes: int  # of communicators, where GPUs share layers over NVLink
    pcie_bytes: int  # and where they do over PCIe
    logit_bytes: float  # for each logit of the sequences that may run; 0: activations are not counted
    shares_the_rest: bool  # its share is of what contexts and communicators leave
    sources: tuple[tuple[str, str], ...]


_PLANNER = "llm-d-planner (Apache-2.0), accuracy/accuracy_report.md at 875a4fd6: 58 runs of vLLM 0.19.0 on H100s"

ENGINE_MEMORY = {
    "vllm": EngineMemory(
        context_bytes=round(0.25 * GIB),
        graphs_bytes=round(0.64 * GIB),
        nvlink_bytes=round(1.85 * GIB),
        pcie_bytes=round(0.2 * GIB),
        logit_bytes=14.5,
        shares_the_rest=False,
        sources=(
            ("context_bytes", f"{_PLANNER}: 0.24 to 0.26 GiB outside PyTorch on one GPU"),
            ("graphs_bytes", "median estimate in seven published logs, 0.37 to 0.79 GiB; subtracted since vLLM 0.21"),
            ("nvlink_bytes", f"{_PLANNER}: 2.06 to 2.21 GiB outside PyTorch on 2 and 4 GPUs, less the context"),
            ("pcie_bytes", "vLLM logs of 2025, two RTX 4090 and two L40S: 0.25 and 0.30 GiB, less 0.1 of a context"),
            ("logit_bytes", "fitted to the activations of nine models in the same runs; since vLLM 0.17"),
        ),
    ),
    "vllm-0.16": EngineMemory(
        context_bytes=round(0.13 * GIB),
        graphs_bytes=0,
        nvlink_bytes=round(0.45 * GIB),
        pcie_bytes=round(0.2 * GIB),
        logit_bytes=37.5,
        shares_the_rest=False,
        sources=(
            ("context_bytes", "the same report: Qwen3-14B under vLLM 0.15 to 0.17, 0.13 GiB"),
            ("graphs_bytes", "captured after KV is sized, in what gpu_memory_utilization leaves"),
            ("nvlink_bytes", "that project's constant for these versions, 0.60 GiB, less its 0.15 of a context"),
            ("pcie_bytes", "as for vllm"),
            ("logit_bytes", "the same report: Qwen3-14B under vLLM 0.15 and 0.16, 5.64 GiB of activations"),
        ),
    ),
    "sglang": EngineMemory(
        context_bytes=round(0.55 * GIB),
        graphs_bytes=0,
        nvlink_bytes=round(1.85 * GIB),
        pcie_bytes=round(0.13 * GIB),
        logit_bytes=0.0,
        shares_the_rest=True,
        sources=(
            ("context_bytes", "a log of SGLang 0.4 on L4s of 22.03 GiB: 0.27 before weights, 0.28 more than they take"),
            ("graphs_bytes", "they have what mem_fraction_static leaves"),
            ("nvlink_bytes", "as for vllm"),
            ("pcie_bytes", "the same log: 0.13 GB for the process group"),
            ("logit_bytes", "activations have what mem_fraction_static leaves"),
        ),
    ),
}
"""By the name that the option `engine` takes. `vllm` is 0.21 and later."""


def reported_bytes(gpu: Gpu) -> int | None:
    """What the driver reports of a GPU's memory; None where that is not known, or is of another size of the card."""
    known = gpu.device_bytes
    return known if known is not None and 0.8 * gpu.memory_bytes < known <= gpu.memory_bytes else None


def device_bytes(gpu: Gpu) -> int:
    """What the driver reports of a GPU's memory, where that is known, else what its maker states."""
    return reported_bytes(gpu) or gpu.memory_bytes


def reserve(
    engine: str, gpu: Gpu, ranks: Sequence[ModelShape], tp: int, tokens: int, sequences: int, step_tokens: int
) -> list[dict[str, int]]:
    """Bytes of one GPU of each stage by source, for passes of `tokens`; `ranks` are the stages' shapes.

    Logits are of `sequences` x `step_tokens` rows, on the stage that has the head.
    """
    memory = ENGINE_MEMORY[engine]
    between = 0 if tp == 1 else memory.nvlink_bytes if gpu.rates.nvlink_Bps else memory.pcie_bytes
    fixed = {"CUDA context": memory.context_bytes, "CUDA graphs": memory.graphs_bytes, "communicators": between}
    parts = []
    for rank in ranks:
        peak = 0
        if memory.logit_bytes:
            logits = round(memory.logit_bytes * rank.vocab_size * sequences * step_tokens) if rank.head_params else 0
            peak = activation_bytes(rank, tokens, logits)
        parts.append({name: size for name, size in (fixed | {"activations": peak}).items() if size})
    return parts


def activation_bytes(rank: ModelShape, tokens: int, logits_bytes: int) -> int:
    """The peak of a pass of `tokens` through a rank's layers, and of the logits after it."""
    layer_bytes, workspace_bytes = _of_a_token(rank)
    residual = 4 * rank.hidden_dim * tokens
    return residual + max(layer_bytes * tokens, logits_bytes + workspace_bytes * tokens)


@lru_cache(maxsize=64)
def _of_a_token(rank: ModelShape) -> tuple[int, int]:
    """Bytes of the widest layer beside the residual, and those of experts that stay."""
    h = rank.hidden_dim
    widest = most = 0
    for layer in rank.layers:
        routed = layer.experts_per_token * layer.expert_params
        dense = 6 * (layer.mlp_active_params - routed) // (3 * h)
        width = layer.expert_params // (3 * h)
        experts = 2 * layer.experts_per_token * (max(2 * width, h) + width)
        widest, most = max(widest, 4 * h + dense + experts), max(most, experts)
    return widest, most


def usable_bytes(engine: str, gpu: Gpu, utilization: float, parts: dict[str, int]) -> int:
    """What an engine may use of one GPU, its reserve `parts` included."""
    device = device_bytes(gpu)
    if not ENGINE_MEMORY[engine].shares_the_rest:
        return int(device * utilization)
    taken = sum(parts.values())
    return int((device - taken) * utilization) + taken
