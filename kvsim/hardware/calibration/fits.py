"""Constants of each kernel's price from its samples."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from kvsim.hardware.calibration.samples import Columns, Sample, chosen
from kvsim.hardware.calibration.solver import Bounds, solve
from kvsim.hardware.kernels.attention import DecodeFit, PrefillFit
from kvsim.hardware.kernels.chip import Chip
from kvsim.hardware.kernels.gemm import GemmFit, Tile, gemm_bytes
from kvsim.hardware.kernels.kernel_file import ElementwiseFit
from kvsim.hardware.kernels.transfers import TransferFit

Fit = TypeVar("Fit")
US, NS = 1e-6, 1e-9
_SHARE = (0.7, 0.15, 1.0)
_SHARPNESS = (2.0, 0.7, 12.0)
_TILES = ((64, 64), (64, 128), (128, 128), (128, 256))
"""cuBLAS picks the tile; which ones it has is not published, and these suffice."""


def p_norm(sharpness: float, times: Sequence[np.ndarray]) -> np.ndarray:
    """`smooth_max` of columns."""
    largest = np.maximum.reduce(np.broadcast_arrays(*times))
    return np.asarray(largest * sum((time / largest) ** sharpness for time in times) ** (1 / sharpness))


def _fitted(
    columns: Columns, bounds: Bounds, build: Callable[[Mapping[str, float]], Fit], price: Callable[[Fit], np.ndarray]
) -> tuple[Fit, float]:
    """The fit, and its mean absolute relative error on what it saw."""
    seconds = columns.seconds
    fit = build(solve(lambda values: np.log(price(build(values)) / seconds), bounds))
    return fit, float(np.abs(price(fit) / seconds - 1).mean())


def gemm_seconds(fit: GemmFit, chip: Chip, dtype: str, columns: Columns) -> np.ndarray:
    """`GemmFit.seconds` of columns, for tiles of any number of rows and kernels launched by a graph."""
    m, n, k = columns["m"], columns["n"], columns["k"]
    product, peak_flops = chip.product(dtype)
    ways = [(tile, splits) for tile in fit.tiles for splits in fit.splits]
    waves = np.minimum.reduce([_waves_s(fit, chip, peak_flops, *way, m, n, k) for way in ways])
    work = np.maximum(waves, fit.plateau_s(chip, peak_flops, m, n, k))  # type: ignore[arg-type]
    memory = np.asarray(gemm_bytes(dtype, product, m, n, k)) / (fit.hbm * chip.hbm_Bps)  # type: ignore[arg-type]
    extra = np.asarray(fit.start_s + fit.quantising_s(chip, m, k))  # type: ignore[arg-type]
    return np.asarray(extra + p_norm(fit.sharpness, [memory, work]))


def _waves_s(
    fit: GemmFit, chip: Chip, peak_flops: float, tile: Tile, splits: int, m: np.ndarray, n: np.ndarray, k: np.ndarray
) -> np.ndarray:
    return np.asarray(fit.waves_s(chip, peak_flops, tile, splits, m, n, k))  # type: ignore[arg-type]


def fit_gemm(samples: Sequence[Sample], chip: Chip, dtype: str) -> GemmFit:
    """GEMMs of one type in a CUDA graph; `fp8` with the kernel that quantises the activations."""
    columns = chosen(samples, "gemm", dtype, seen=True)
    bounds = {"start_s": (2 * US, 0.1 * US, 60 * US), "hbm": (0.85, 0.3, 1.0), "sharpness": (3.0, 0.8, 12.0)}
    bounds |= {"peak": _SHARE, "output": (3.0, 0.3, 1000.0), "split_s": (2 * US, 0.03 * US, 20 * US)}
    for number in range(len(_TILES)):
        bounds |= {f"peak{number}": (0.7, 0.02, 1.0), f"start{number}": (1 * US, 0.01 * US, 60 * US)}
    if dtype != "bf16":
        bounds |= {"row_s": (0.1 * NS, 0.001 * NS, 100 * NS), "quantising": (0.8, 0.1, 30.0)}

    def build(v: Mapping[str, float]) -> GemmFit:
        tiles = tuple(
            Tile(rows=rows, columns=width, peak=v[f"peak{i}"], start_s=v[f"start{i}"])
            for i, (rows, width) in enumerate(_TILES)
        )
        return GemmFit(
            start_s=v["start_s"], hbm=v["hbm"], sharpness=v["sharpness"], peak=v["peak"], output=v["output"],
            tiles=tiles, most_splits=8, split_s=v["split_s"], row_s=v.get("row_s", 0.0),
            quantising=v.get("quantising"),
        )  # fmt: skip

    return _fitted(columns, bounds, build, lambda fit: gemm_seconds(fit, chip, dtype, columns))[0]


def attention_seconds(fit: PrefillFit | DecodeFit, chip: Chip, columns: Columns) -> np.ndarray:
    """`seconds` of columns, over keys and values of 16 bits."""
    heads, kv_heads, dim = columns["heads"], columns["kv_heads"], columns["head_dim"]
    batch = columns["batch"]
    if isinstance(fit, PrefillFit):
        tokens = columns["tokens"]
        limits = fit.limits_s(chip, "bf16", batch, tokens, 0, heads, kv_heads, dim)  # type: ignore[arg-type]
    else:
        tokens = columns["context_tokens"]
        limits = fit.limits_s(chip, "bf16", batch, tokens, heads, kv_heads, dim)  # type: ignore[arg-type,assignment]
    extra = np.asarray(fit.extra_s(batch, tokens, heads, kv_heads))  # type: ignore[arg-type]
    if isinstance(fit, DecodeFit):
        extra = extra + fit.joining_s(chip, batch, tokens, kv_heads)  # type: ignore[arg-type]
    return np.asarray(extra + p_norm(fit.sharpness, [np.asarray(limit) for limit in limits]))


def fit_prefill(samples: Sequence[Sample], chip: Chip) -> PrefillFit:
    """Causal attention of whole prompts, by the layout of query blocks that fits best."""
    columns = chosen(samples, "prefill_attention", "bf16", seen=True)
    bounds = {"start_s": (5 * US, 0.5 * US, 30 * US), "peak": _SHARE, "sharpness": _SHARPNESS, "hbm": _SHARE}
    bounds |= {"block_s": (2 * US, 0.01 * US, 30 * US), "token_s": (5 * NS, 0.01 * NS, 200 * NS)}
    found = []
    for block, packed in ((128, False), (256, False), (128, True), (256, True)):

        def build(v: Mapping[str, float], block: int = block, packed: bool = packed) -> PrefillFit:
            return PrefillFit(block=block, packed=packed, **v)

        found.append(_fitted(columns, bounds, build, lambda fit: attention_seconds(fit, chip, columns)))
    return min(found, key=lambda pair: pair[1])[0]


def fit_decode(samples: Sequence[Sample], chip: Chip) -> DecodeFit:
    """Attention of one new token a sequence."""
    columns = chosen(samples, "decode_attention", "bf16", seen=True)
    bounds = {"start_s": (5 * US, 0.5 * US, 30 * US), "hbm": (0.85, 0.4, 1.0), "sharpness": _SHARPNESS}
    bounds |= {"head_s": (2 * US, 0.01 * US, 30 * US), "query_s": (0.1 * US, 0.001 * US, 5 * US)}
    bounds |= {"copy_s": (1 * US, 0.01 * US, 20 * US), "split_s": (1 * US, 0.01 * US, 20 * US)}
    bounds |= {"token_s": (1 * NS, 0.001 * NS, 100 * NS), "lone_token_s": (0.1 * NS, 0.001 * NS, 100 * NS)}
    bounds |= {"whole_hbm": (0.7, 0.15, 1.0), "part_s": (0.1 * US, 0.0001 * US, 5 * US)}

    def price(fit: DecodeFit) -> np.ndarray:
        return attention_seconds(fit, chip, columns)

    return _fitted(columns, bounds, lambda v: DecodeFit(**v), price)[0]


def fit_elementwise(samples: Sequence[Sample], chip: Chip) -> ElementwiseFit:
    """Kernels that read and write."""
    columns = chosen(samples, "elementwise")
    bounds = {"start_s": (2 * US, 0.1 * US, 30 * US), "hbm": (0.85, 0.2, 1.0)}
    nbytes = columns["nbytes"]

    def price(fit: ElementwiseFit) -> np.ndarray:
        return np.asarray(fit.start_s + nbytes / (fit.hbm * chip.hbm_Bps))

    return _fitted(columns, bounds, lambda v: ElementwiseFit(**v), price)[0]


def fit_transfers(samples: Sequence[Sample], chip: Chip, descriptor_s: float) -> TransferFit:
    """Copies, batched and both ways, and gathers; `descriptor_s` stands in where no batched copy was measured."""
    up, down = chosen(samples, "copy_to_hbm"), chosen(samples, "copy_to_host")
    nbytes, seconds = np.append(up["nbytes"], down["nbytes"]), np.append(up.seconds, down.seconds)
    peak = np.append(np.full(len(up.samples), chip.pcie_h2d_Bps), np.full(len(down.samples), chip.pcie_d2h_Bps))
    copies = solve(
        lambda v: np.log((v["copy_s"] + nbytes / (v["one_way"] * peak)) / seconds),
        {"copy_s": (5 * US, 0.1 * US, 100 * US), "one_way": _SHARE},
    )
    (duplex,) = chosen(samples, "copy_duplex").samples
    link_Bps = min(chip.pcie_h2d_Bps, chip.pcie_d2h_Bps)
    batched = chosen(samples, "copy_batched")
    if batched.samples:
        carried = copies["copy_s"] + batched["nbytes"] / (copies["one_way"] * chip.pcie_h2d_Bps)
        descriptors = batched["descriptors"] - 1
        descriptor_s = solve(
            lambda v: np.log(np.maximum(carried, copies["copy_s"] + descriptors * v["descriptor_s"]) / batched.seconds),
            {"descriptor_s": (1 * US, 0.01 * US, 100 * US)},
        )["descriptor_s"]
    gathers = chosen(samples, "gather", seen=True)
    bounds = {"gather_s": (3 * US, 0.1 * US, 100 * US), "gather": _SHARE}
    bounds |= {"near_rows_per_s": (1e8, 1e6, 1e10), "far_rows_per_s": (4e7, 1e6, 1e10)}

    def build(v: Mapping[str, float]) -> TransferFit:
        return TransferFit(
            **copies, descriptor_s=descriptor_s,
            both_ways=min(dict(duplex.arguments)["nbytes"] / (duplex.seconds * link_Bps), copies["one_way"]), **v,
        )  # fmt: skip

    return _fitted(gathers, bounds, build, lambda fit: gather_seconds(fit, chip, gathers))[0]


def gather_seconds(fit: TransferFit, chip: Chip, columns: Columns) -> np.ndarray:
    """`TransferFit.gather_time_s` of columns."""
    asked = zip(columns["rows"].tolist(), columns["row_bytes"].tolist(), columns["span_bytes"].tolist(), strict=True)
    return np.array([fit.gather_time_s(chip, *one) for one in asked])
