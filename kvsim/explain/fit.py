"""Whether a model's weights fit on GPUs as arXiv:2405.08944 counts them, in words where they do not."""

from kvsim.hardware.catalogue import Gpu
from kvsim.text.units import format_bytes


def misfit(model: str, gpu: Gpu, gpus: int, weight_bytes: int) -> str | None:
    """Why `weight_bytes`, one GPU's part, leave nothing of its stated memory for a cache; None where they do."""
    if weight_bytes < gpu.memory_bytes:
        return None
    return (
        f"{model} does not fit: one of {gpus} x {gpu.name} has {format_bytes(gpu.memory_bytes)}, and its part of the "
        f"weights is {format_bytes(weight_bytes)}; raise --tp, or store them in a smaller --weight-dtype"
    )
