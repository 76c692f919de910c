"""The host's memory and processors, and what it takes to launch a kernel and to wait for one."""

import time
from collections.abc import Iterator
from functools import partial

import torch

from runtime.calibration.timing import Clock, Measurement, cpu_timing, timed

COPIED_BYTES = 1 << 30
ROW_BYTES = (256, 1024, 4096, 16384)
PRODUCT = 2048
SEARCHED_KEYS, HEAD_DIM = 1 << 20, 128
LAUNCHES = 400


def processors() -> Iterator[Measurement]:
    """A memcpy, scattered rows, fp32 products and a flat search by inner product, each by all cores of torch's."""
    source = torch.ones(COPIED_BYTES // 4)
    target = torch.empty_like(source)
    yield Measurement("host_copy", "", {"nbytes": COPIED_BYTES}, *cpu_timing(lambda: target.copy_(source)))
    for row_bytes in ROW_BYTES:
        pool = source.view(-1, row_bytes // 4)
        ids = torch.randint(len(pool), (max(4096, (1 << 26) // row_bytes),))
        rows = torch.empty(len(ids), row_bytes // 4)
        timing = cpu_timing(partial(torch.index_select, pool, 0, ids, out=rows))
        yield Measurement("host_gather", "", {"rows": len(ids), "row_bytes": row_bytes}, *timing)
    square, product = torch.randn(PRODUCT, PRODUCT), torch.empty(PRODUCT, PRODUCT)
    timing = cpu_timing(lambda: torch.mm(square, square, out=product))
    yield Measurement("host_product", "fp32", {"flops": 2 * PRODUCT**3}, *timing)
    keys, query = torch.randn(SEARCHED_KEYS, HEAD_DIM), torch.randn(HEAD_DIM)
    timing = cpu_timing(lambda: torch.mv(keys, query).topk(100))
    yield Measurement("host_search", "fp32", {"nbytes": 4 * SEARCHED_KEYS * HEAD_DIM}, *timing)


def overheads(clock: Clock) -> Iterator[Measurement]:
    """Seconds a kernel, launched one by one and in a graph, and of a launch with the wait for it."""
    one = torch.zeros(1, device="cuda")
    yield Measurement("launch_graph", "", {}, *clock.graph_timing([lambda: one.add_(1)]))

    def eager() -> float:
        torch.cuda.synchronize()
        start_s = time.perf_counter()
        for _ in range(LAUNCHES):
            one.add_(1)
        torch.cuda.synchronize()
        return (time.perf_counter() - start_s) / LAUNCHES

    def waiting() -> float:
        start_s = time.perf_counter()
        for _ in range(LAUNCHES):
            one.add_(1)
            torch.cuda.synchronize()
        return (time.perf_counter() - start_s) / LAUNCHES

    eager()
    yield Measurement("launch_eager", "", {}, *timed(eager))
    yield Measurement("launch_and_wait", "", {}, *timed(waiting))


def top_k(clock: Clock) -> Measurement:
    """The 2,048 largest of 128K scores of eight heads."""
    scores = torch.randn(8, 1 << 17, device="cuda", dtype=torch.bfloat16)
    timing = clock.graph_timing([lambda: torch.topk(scores, 2048, sorted=False)])
    return Measurement("top_k", "bf16", {"elements": scores.numel()}, *timing)
