"""All measurements of a machine, in an order that leaves the GPU's memory free between them."""

import time
from collections.abc import Callable, Iterator

import torch

from runtime.calibration import attention, batches, host, products, transfers
from runtime.calibration.timing import Clock, Measurement

POOL_BYTES = 8 << 30
QUICK_POOL_BYTES = 2 << 30
WARM_S = 3.0
"""A cold GPU clocks higher than one at work: before the first time is taken it multiplies for so long."""

Section = tuple[str, Callable[[], Iterator[Measurement]]]


def sections(*, quick: bool) -> list[Section]:
    """What is measured, by name; `quick` takes every third shape and 2 GiB of pinned memory, not 8."""
    clock, every = Clock(), 3 if quick else 1
    dtypes = ["bf16", "fp8"] if products.has_fp8() else ["bf16"]
    return [
        ("GEMMs", lambda: products.gemms(clock, dtypes, every)),
        ("elementwise kernels", lambda: products.elementwise(clock)),
        ("device copies and top-k", lambda: iter((products.device_copy(clock), host.top_k(clock)))),
        ("prefill attention", lambda: attention.prefills(clock, every)),
        ("decode attention", lambda: attention.decodes(clock, every)),
        ("launches", lambda: host.overheads(clock)),
        ("the host", host.processors),
        ("copies and gathers", lambda: _moved(clock, QUICK_POOL_BYTES if quick else POOL_BYTES)),
    ]


def measured(section: Section) -> list[Measurement]:
    """The times of one section; ValueError where CUDA fails (another process holds the memory) or Triton is missing."""
    name, measure = section
    try:
        found = list(measure())
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except (RuntimeError, ImportError) as error:  # torch's words for all that CUDA says, and Triton's absence
        words = str(error).partition("\n")[0]
        raise ValueError(f"{name} cannot be measured: {words}. Nothing was written") from error
    return found


def warm() -> None:
    """Multiply until the GPU runs as warm as one at work."""
    square = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    product = torch.empty_like(square)
    end_s = time.perf_counter() + WARM_S
    while time.perf_counter() < end_s:
        torch.mm(square, square, out=product)
        torch.cuda.synchronize()


def _moved(clock: Clock, pool_bytes: int) -> Iterator[Measurement]:
    pool = transfers.pinned_pool(pool_bytes)
    yield from transfers.copies(clock, pool)
    yield from transfers.gathers(clock, pool)
    if (batch := batches.batched_copy()) is not None:
        yield from transfers.batched_copies(clock, pool, batch)
