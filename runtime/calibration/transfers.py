"""Copies over the link to the host, by size, descriptor and direction, and gathers by row and span."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from runtime.calibration.timing import Clock, Measurement
from runtime.kernels.gather import gather_rows

COPY_BYTES = (1 << 12, 1 << 16, 1 << 20, 1 << 24, 1 << 28, 1 << 30)
PIECE_BYTES = (4 << 10, 16 << 10, 64 << 10, 256 << 10)
DESCRIPTORS = (256, 1024)
DUPLEX_BYTES = 1 << 30
SPANS_BYTES = (1 << 30, 2 << 30, 4 << 30, 8 << 30)
ROW_BYTES = (256, 512, 1024, 2048, 4096, 16384)
ROWS = (4096, 16384, 65536)
READ_ROWS = (
    1 << 18
)  # in one graph: few rows, read again and again, would lie in the CPU's cache and their pages in TLBs
MOST_BYTES = 1 << 28


def pinned_pool(span_bytes: int) -> Tensor:
    """Pinned host memory; ValueError where there is not so much."""
    try:
        return torch.empty(span_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        raise ValueError(f"this machine cannot pin {span_bytes >> 30} GiB of host memory; free some") from None


def copies(clock: Clock, host: Tensor) -> Iterator[Measurement]:
    """Single copies of each size each way, and each direction of 1 GiB while the other is busy."""
    device = torch.empty(2, DUPLEX_BYTES, dtype=torch.uint8, device="cuda")
    for nbytes in COPY_BYTES:
        near, far = device[0, :nbytes], host[:nbytes]
        for kernel, target, source in (("copy_to_hbm", near, far), ("copy_to_host", far, near)):
            copy = partial(target.copy_, source, non_blocking=True)
            timing = clock.graph_timing([copy]) if nbytes <= 1 << 20 else clock.stream_timing(copy)
            yield Measurement(kernel, "", {"nbytes": nbytes, "descriptors": 1}, *timing)
    other = torch.cuda.Stream()

    def both() -> None:
        other.wait_stream(clock.stream)
        device[0].copy_(host[:DUPLEX_BYTES], non_blocking=True)
        with torch.cuda.stream(other):
            host[DUPLEX_BYTES : 2 * DUPLEX_BYTES].copy_(device[1], non_blocking=True)
        clock.stream.wait_stream(other)

    yield Measurement("copy_duplex", "", {"nbytes": DUPLEX_BYTES, "descriptors": 1}, *clock.stream_timing(both))


def batched_copies(clock: Clock, host: Tensor, batch: Callable[[list[Tensor], list[Tensor]], Callable[[], None]],
) -> Iterator[Measurement]:  # fmt: skip
    """Batched copies of scattered pieces to the GPU; `batch` makes a launch of targets and sources."""
    device = torch.empty(MOST_BYTES, dtype=torch.uint8, device="cuda")
    for piece_bytes in PIECE_BYTES:
        for pieces in DESCRIPTORS:
            step = 2 * piece_bytes  # so that no two pieces lie side by side
            targets = [device[i * piece_bytes : (i + 1) * piece_bytes] for i in range(pieces)]
            sources = [host[i * step : i * step + piece_bytes] for i in range(pieces)]
            shape = {"nbytes": pieces * piece_bytes, "descriptors": pieces}
            yield Measurement("copy_batched", "", shape, *clock.stream_timing(batch(targets, sources)))


def gathers(clock: Clock, host: Tensor) -> Iterator[Measurement]:
    """Random rows that a kernel reads straight from pinned host memory, in as large a span as `host` has."""
    for span_bytes in SPANS_BYTES:
        if span_bytes > len(host):
            continue
        for row_bytes in ROW_BYTES:
            src = host[:span_bytes].view(torch.bfloat16).view(1, 1, span_bytes // row_bytes, row_bytes // 2)
            for rows in ROWS:
                if rows * row_bytes > MOST_BYTES:
                    continue
                count = max(1, min(READ_ROWS // rows, 4 * MOST_BYTES // (rows * row_bytes)))
                ids = torch.empty(count, 1, 1, rows, dtype=torch.int32, device="cuda")
                draw = partial(ids.random_, 0, src.shape[2])
                slots = torch.arange(rows, dtype=torch.int32, device="cuda").view(1, 1, rows)
                dst = torch.empty(1, 1, rows, row_bytes // 2, dtype=torch.bfloat16, device="cuda")
                counter = torch.zeros(1, dtype=torch.int64, device="cuda")
                launches = [partial(gather_rows, src, one, dst, slots, counter) for one in ids]
                shape = {"rows": rows, "row_bytes": row_bytes, "span_bytes": span_bytes}
                yield Measurement("gather", "", shape, *clock.fresh_timing(launches, draw))
