"""Which GPU is measured, and what runs it."""

import subprocess
from typing import NamedTuple

import torch


class Device(NamedTuple):
    """The GPU that is measured, and the software that runs it."""

    name: str
    gpus: int
    driver: str
    torch: str


def device() -> Device:
    """The current GPU; ValueError where torch sees none."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        raise ValueError(
            "torch sees no NVIDIA GPU here, and calibration measures one; run it on the machine that is to be measured"
        )
    name = torch.cuda.get_device_properties().name
    return Device(name, torch.cuda.device_count(), driver(), torch.__version__)


def driver() -> str:
    """The version of the GPU's driver, or "unknown"."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)  # noqa: S603
        return found.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"
