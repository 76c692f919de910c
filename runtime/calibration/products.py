"""GEMMs by size and type, and kernels that only read and write."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from runtime.calibration.timing import Clock, Launch, Measurement

SHAPES = [
    (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096),  # Llama-3.1-8B
    (10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672),  # 70B
    (2560, 8192), (8192, 2048), (14336, 8192), (8192, 7168),  # over four GPUs
    (1280, 8192), (8192, 1024), (7168, 8192), (8192, 3584),  # over eight
    (4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944),  # Qwen2.5-7B
    (7168, 5120), (5120, 5120), (55296, 5120), (5120, 27648),  # Qwen2.5-32B
    (3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192),  # Llama-3.2-1B
    (1536, 7168), (2112, 7168), (24576, 1536), (1024, 4096), (12288, 6144), (6144, 16384),
]  # fmt: skip
"""(n, k) of the weights that models and their shards have."""

ROWS = (1, 4, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192)
MOST_FLOPS = 3_000_000_000_000
POOL_ELEMENTS = 1 << 30
ELEMENTWISE_BYTES = tuple(1 << power for power in range(14, 31))


def gemms(clock: Clock, dtypes: list[str], every: int) -> Iterator[Measurement]:
    """bf16 and tensor-wise fp8 GEMMs, the latter with a kernel that quantises activations; each `every`th shape."""
    from runtime.calibration.quantise_triton import quantised

    pool = torch.empty(POOL_ELEMENTS, dtype=torch.bfloat16, device="cuda").normal_()
    for dtype in dtypes:
        # Random bytes would hold NaNs: values as weights have them.
        weights = pool if dtype == "bf16" else quantised(pool)
        for n, k in SHAPES[::every]:
            for m in ROWS:
                if 2 * m * n * k > MOST_FLOPS:
                    continue
                yield _gemm(clock, dtype, pool, weights, m, n, k)


def _gemm(clock: Clock, dtype: str, pool: Tensor, weights: Tensor, m: int, n: int, k: int) -> Measurement:
    # As many matrices as exceed any L2, one after the other, as the layers of a model do.
    l2_bytes = 2 * torch.cuda.get_device_properties().L2_cache_size
    wanted = min(64, l2_bytes // (n * k * weights.element_size()) + 1)
    matrices = [weights[i * n * k : (i + 1) * n * k].view(n, k) for i in range(wanted) if (i + 1) * n * k <= len(pool)]
    rows = pool[-m * k :].view(m, k)
    product = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
    launches: list[Launch]
    if dtype == "bf16":
        launches = [partial(torch.mm, rows, matrix.t(), out=product) for matrix in matrices]
    else:
        from runtime.calibration.quantise_triton import quantise

        narrow, scale = torch.empty(m, k, dtype=torch.float8_e4m3fn, device="cuda"), torch.ones((), device="cuda")

        def launch(matrix: Tensor) -> None:
            quantise(rows, narrow, scale)
            torch._scaled_mm(  # noqa: SLF001  # the only fp8 GEMM of this torch
                narrow, matrix.t(), scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16, use_fast_accum=True,
                out=product,
            )  # fmt: skip

        launches = [partial(launch, matrix) for matrix in matrices]
    return Measurement("gemm", dtype, {"m": m, "n": n, "k": k}, *clock.graph_timing(launches))


def has_fp8() -> bool:
    """Whether this GPU multiplies in fp8 and this torch has the GEMM for it."""
    return hasattr(torch, "_scaled_mm") and torch.cuda.get_device_capability() >= (8, 9)


def elementwise(clock: Clock) -> Iterator[Measurement]:
    """A kernel that reads two operands and writes one result, by bytes in all."""
    for nbytes in ELEMENTWISE_BYTES:
        elements = nbytes // 48 * 8  # a multiple of what a thread reads at once
        sets = min(64, (1 << 29) // nbytes + 1)
        data = torch.zeros(sets, 3, elements, dtype=torch.bfloat16, device="cuda")
        launches = [partial(torch.add, one[0], one[1], out=one[2]) for one in data]
        yield Measurement("elementwise", "", {"nbytes": 6 * elements}, *clock.graph_timing(launches))


def device_copy(clock: Clock) -> Measurement:
    """A copy of 2 GiB within the GPU's memory, bytes read and written."""
    source = torch.zeros(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return Measurement("device_copy", "", {"nbytes": 1 << 32}, *clock.stream_timing(lambda: target.copy_(source)))
