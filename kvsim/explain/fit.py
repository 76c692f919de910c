"""Whether a model's weights fit on the GPUs that share it, in words where they do not."""

from kvsim.hardware.catalogue import Gpu
from kvsim.text.units import format_bytes


def usable_bytes(gpu: Gpu, utilization: float) -> int:
    """What an engine may use of one GPU's memory."""
    return int(gpu.memory_bytes * utilization)


def misfit(model: str, gpu: Gpu, gpus: int, utilization: float, weight_bytes: int) -> str | None:
    """Why `weight_bytes`, one GPU's part of the weights, leave no room for a cache; None where they do."""
    usable = usable_bytes(gpu, utilization)
    if weight_bytes < usable:
        return None
    return (
        f"the weights of {model} do not fit: one of {gpus} x {gpu.name} has {format_bytes(usable)} usable "
        f"(gpu_memory_utilization={utilization}), and its part of them is {format_bytes(weight_bytes)}; raise --tp, "
        "--pp or that share, or store them in a smaller --weight-dtype"
    )
