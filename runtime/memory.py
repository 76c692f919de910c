"""Whether a cache fits, asked before anything is allocated."""

import os
from collections.abc import Mapping

import torch

from policies.plan import Tier


def check_fits(needed: Mapping[Tier, int], device: torch.device) -> None:
    """Raise MemoryError, naming what is needed and what is free, when a tier cannot hold `needed` bytes."""
    for tier, nbytes in needed.items():
        free = free_hbm_bytes(device) if tier is Tier.HBM else free_host_bytes()
        if nbytes > free:
            where = "GPU memory" if tier is Tier.HBM and device.type == "cuda" else "host memory"
            raise MemoryError(
                f"the cache needs {nbytes:,} bytes of {where} and {free:,} are free; use a shorter prompt, fewer "
                "max_new_tokens, a smaller batch, or a policy that keeps less there (kvsim explain)"
            )


def free_hbm_bytes(device: torch.device) -> int:
    """What a device can still allocate: its free memory and what the allocator holds unused."""
    if device.type != "cuda":
        return free_host_bytes()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def free_host_bytes() -> int:
    """What the host can give without swapping; on systems that do not say, its free pages."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:  # noqa: PTH123 - not a file of ours
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except FileNotFoundError:
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
