"""Fits of each kernel's closed form to a table: robust least squares of predicted over measured times."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from kernels.tables import Table
from scipy.optimize import least_squares

from kvsim.hardware.kernels.attention import DecodeFit, PrefillFit
from kvsim.hardware.kernels.chip import Chip
from kvsim.hardware.kernels.collectives import AllReduceFit
from kvsim.hardware.kernels.experts import MoeFit
from kvsim.hardware.kernels.gemm import GemmFit, HostLaunch, Tile, gemm_bytes

US, NS = 1e-6, 1e-9
Bounds = tuple[float, float, float]  # first guess, least, most
Build = Callable[[Mapping[str, float]], Any]

SHARE = (0.7, 0.15, 1.0)
SHARPNESS = (2.0, 0.7, 12.0)
ANY_TILES = [(64, 64, None), (64, 128, None), (128, 128, None), (128, 256, None)]
"""cuBLAS picks the tile; which ones it has is not published, and these suffice."""
TILES_BY_ROWS = {
    # vLLM's CUTLASS kernels choose the tile by the number of rows (csrc/quantization/cutlass_w8a8).
    "h100-sxm": [(64, 64, 64), (64, 128, 128), (128, 128, None)],
    "b200": [(64, 64, 64), (64, 128, 128), (128, 128, None)],
    "l40s": [(16, 64, 16), (32, 64, 32), (64, 64, 64), (64, 128, 128), (128, 128, 256), (128, 128, None)],
}
HOSTS = {"h100-sxm": [31, None], "b200": [None], "l40s": [None]}
"""Rows up to which one block-wise kernel runs (FlashInfer's on Hopper), and the other beyond."""

POWERS = {("l40s", "gemm"): 1.0, "moe": 0.5}
"""Powers of predicted over measured whose errors are minimised, where they are wide; elsewhere logarithms.

Logarithms leave no bias in the middle, the first power makes the mean relative error least.
"""


def p_norm(sharpness: float, *times: np.ndarray) -> np.ndarray:
    """`smooth_max` of columns."""
    largest = np.maximum.reduce(np.broadcast_arrays(*times))
    return largest * sum((time / largest) ** sharpness for time in times) ** (1 / sharpness)


def fitted(table: Table, chip: Chip) -> Any:
    """The constants that fit the rows which may be seen."""
    seen = table.part(table.seen)
    bounds, build = FORMS[table.kernel](table)
    names = list(bounds)
    first, low, high = np.log(np.array([bounds[name] for name in names])).T

    power = POWERS.get((table.gpu, table.kernel), POWERS.get(table.kernel, 0.0))

    def residuals(x: np.ndarray) -> np.ndarray:
        fit = build(dict(zip(names, np.exp(x).tolist(), strict=True)))
        ratio = predicted(fit, seen, chip) / seen.seconds
        return (ratio**power - 1) / power if power else np.log(ratio)

    scale = 0.1 if table.kernel in ("moe", "all_reduce") else 0.05
    best = least_squares(
        residuals, first, bounds=(low - 1e-9, high + 1e-9), loss="soft_l1", f_scale=scale, diff_step=1e-3, max_nfev=120
    )
    values = {name: float(f"{value:.4g}") for name, value in zip(names, np.exp(best.x), strict=True)}
    return build({name: min(max(value, bounds[name][1]), bounds[name][2]) for name, value in values.items()})


def predicted(fit: Any, table: Table, chip: Chip) -> np.ndarray:
    """Seconds of each row by `fit`: what its `seconds` returns, for whole columns."""
    c = table.columns
    match fit:
        case GemmFit():
            return _gemm_s(fit, chip, table.dtype, c["m"], c["n"], c["k"])
        case PrefillFit():
            shape = (c["batch"], c["tokens"], c["heads"], c["kv_heads"])
            limits = fit.limits_s(chip, table.dtype, *shape[:2], 0, *shape[2:], 128)
            return fit.extra_s(*shape) + p_norm(fit.sharpness, *limits)
        case DecodeFit():
            shape = (c["batch"], c["context_tokens"], c["heads"], c["kv_heads"])
            return fit.extra_s(*shape) + p_norm(fit.sharpness, *fit.limits_s(chip, table.dtype, *shape, 128))
        case AllReduceFit():
            one_shot_s, steps_s, library_s = fit.ways_s(chip, c["nbytes"], c["gpus"])
            return np.where(c["nbytes"] >= fit.library_bytes, library_s, np.minimum(one_shot_s, steps_s))
        case _:
            matrices, channels = np.where(c["gated"], 3, 2), c["intermediate"] / c["tp"]
            added_s, *limits = fit.parts_s(
                chip,
                table.dtype,
                c["tokens"],
                c["hidden"],
                channels,
                c["experts"],
                c["top_k"],
                matrices,
                *c["routed"].T,
            )
            return added_s + p_norm(fit.sharpness, *limits)


def _gemm_s(fit: GemmFit, chip: Chip, dtype: str, m: np.ndarray, n: np.ndarray, k: np.ndarray) -> np.ndarray:
    product, peak_flops = chip.product(dtype)
    seconds, limits = np.empty(len(m)), sorted({tile.most_rows or 1 << 40 for tile in fit.tiles})
    for below, limit in zip([0, *limits], limits, strict=False):
        rows = (m > below) & (m <= limit)
        if not rows.any():
            continue
        M, N, K = m[rows], n[rows], k[rows]
        tiles = [(tile, splits) for tile in fit.fitting(int(M[0])) for splits in fit.splits]
        work_s = np.minimum.reduce([fit.waves_s(chip, peak_flops, *one, M, N, K) for one in tiles])
        work_s = np.maximum(work_s, fit.plateau_s(chip, peak_flops, M, N, K))
        memory_s = gemm_bytes(dtype, product, M, N, K) / (fit.hbm * chip.hbm_Bps)
        seconds[rows] = fit.start_s + fit.quantising_s(chip, M, K) + p_norm(fit.sharpness, memory_s, work_s)
    if not fit.host:
        return seconds
    host_s = np.select(
        [np.asarray(m <= (launch.most_rows or 1 << 40)) for launch in fit.host],
        [launch.launch_s + fit.ragged_s * (m % 4 > 0) for launch in fit.host],
    )
    return p_norm(8, seconds, host_s)


def _gemm(table: Table) -> tuple[dict[str, Bounds], Build]:
    blocks, quantised = table.dtype == "fp8_block", table.dtype != "bf16"
    shapes = ANY_TILES[:3] if blocks else TILES_BY_ROWS[table.gpu] if quantised else ANY_TILES
    hosts = HOSTS[table.gpu] if blocks else []
    bounds = {"start_s": (3 * US, 0.1 * US, 60 * US), "hbm": (0.8, 0.3, 1.0), "sharpness": (3.0, 0.8, 12.0)}
    bounds |= {"peak": SHARE, "output": (3.0, 0.3, 1000.0)}
    for number in range(len(shapes)):
        bounds |= {f"peak{number}": (0.6, 0.02, 1.0), f"start{number}": (1 * US, 0.01 * US, 60 * US)}
    if quantised:
        bounds |= {"row_s": (3 * NS, 0.01 * NS, 100 * NS), "quantising": (0.6, 0.1, 30.0)}
    else:
        bounds |= {"split_s": (3 * US, 0.03 * US, 20 * US)}
    for number in range(len(hosts)):
        bounds[f"host{number}"] = (150 * US, 20 * US, 600 * US)
    if hosts and table.gpu == "b200":
        bounds["ragged_s"] = (20 * US, 1 * US, 200 * US)

    def build(v: Mapping[str, float]) -> GemmFit:
        return GemmFit(
            start_s=v["start_s"], hbm=v["hbm"], sharpness=v["sharpness"], peak=v["peak"], output=v["output"],
            tiles=tuple(
                Tile(rows=rows, columns=columns, most_rows=most, peak=v[f"peak{i}"], start_s=v[f"start{i}"])
                for i, (rows, columns, most) in enumerate(shapes)
            ),
            most_splits=1 if quantised else 8, split_s=v.get("split_s", 0.0), row_s=v.get("row_s", 0.0),
            quantising=v.get("quantising"),
            host=tuple(HostLaunch(most_rows=most, launch_s=v[f"host{i}"]) for i, most in enumerate(hosts)),
            ragged_s=v.get("ragged_s", 0.0),
        )  # fmt: skip

    return bounds, build


def _prefill(table: Table) -> tuple[dict[str, Bounds], Build]:
    packed = table.gpu == "h100-sxm"  # FlashAttention 3 packs the heads of a group
    bounds = {"start_s": (8 * US, 1 * US, 30 * US), "peak": SHARE, "sharpness": SHARPNESS, "hbm": SHARE}
    bounds |= {"block_s": (2 * US, 0.01 * US, 30 * US), "token_s": (5 * NS, 0.01 * NS, 200 * NS)}
    bounds["copy_s"] = (1 * US, 0.01 * US, 20 * US)
    return bounds, lambda v: PrefillFit(block=256 if packed else 128, packed=packed, **v)


def _decode(_: Table) -> tuple[dict[str, Bounds], Build]:
    bounds = {"start_s": (8 * US, 1 * US, 30 * US), "hbm": (0.85, 0.4, 1.0), "sharpness": SHARPNESS}
    bounds |= {"head_s": (2 * US, 0.01 * US, 30 * US), "query_s": (0.1 * US, 0.001 * US, 5 * US)}
    bounds |= {"copy_s": (1 * US, 0.01 * US, 20 * US), "split_s": (1 * US, 0.01 * US, 20 * US)}
    bounds |= {"token_s": (1 * NS, 0.001 * NS, 100 * NS), "lone_token_s": (5 * NS, 0.001 * NS, 100 * NS)}
    return bounds, lambda v: DecodeFit(**v)


def _all_reduce(_: Table) -> tuple[dict[str, Bounds], Build]:
    bounds = {
        "start_s": (4 * US, 1 * US, 20 * US),
        "gpu_s": (0.2 * US, 0.01 * US, 5 * US),
        "one_shot": (0.5, 0.05, 1.0),
    }
    bounds |= {"steps_s": (2 * US, 0.1 * US, 60 * US), "steps": SHARE, "library_s": (20 * US, 1 * US, 200 * US)}
    # vLLM hands messages of 8 MiB and more to NCCL (CustomAllreduce's max_size).
    return bounds | {"library": SHARE}, lambda v: AllReduceFit(library_bytes=8 << 20, **v)


def _moe(_: Table) -> tuple[dict[str, Bounds], Build]:
    bounds = {"start_s": (15 * US, 0.1 * US, 200 * US), "hbm": SHARE, "crowded_hbm": SHARE}
    bounds |= {"sharpness": SHARPNESS, "peak": (0.6, 0.05, 1.0)}
    bounds |= {"widening": (0.1, 0.001, 1.0), "depth_s": (1 * NS, 0.01 * NS, 50 * NS)}
    bounds |= {"expert_s": (10 * NS, 0.1 * NS, 5000 * NS), "row_s": (1 * NS, 0.01 * NS, 50 * NS)}
    return bounds | {"rank_rows": (0.8, 0.05, 1000.0), "all_rows": (2.0, 0.05, 1000.0)}, lambda v: MoeFit(**v)


FORMS = {
    "gemm": _gemm,
    "prefill_attention": _prefill,
    "decode_attention": _decode,
    "all_reduce": _all_reduce,
    "moe": _moe,
}
