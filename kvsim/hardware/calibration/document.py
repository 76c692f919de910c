"""A GPU's file whose `measured` set is what was calibrated, each figure with its source."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import yaml

from kvsim.hardware.calibration.fits import (
    attention_seconds,
    fit_decode,
    fit_elementwise,
    fit_gemm,
    fit_prefill,
    fit_transfers,
    gather_seconds,
    gemm_seconds,
)
from kvsim.hardware.calibration.samples import Columns, Sample, chosen
from kvsim.hardware.catalogue import Gpu
from kvsim.hardware.kernels.chip import Chip
from kvsim.hardware.kernels.fitted import FittedPrices
from kvsim.hardware.kernels.kernel_file import KernelFits

_LLAMA_8B = {(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)}
_CURVE_SPAN_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """How far a kernel's prices are from its measured times, over the shapes that the fit saw or did not see."""

    kernel: str
    dtype: str
    seen: bool
    shapes: int
    mape: float
    bias: float


def fitted_kernels(samples: Sequence[Sample], serving: Gpu) -> KernelFits:
    """The constants of what was measured; of what was not, those of the GPU's `serving` set."""
    prices, chip = serving.kernels.prices, serving.kernels.chip
    if not isinstance(prices, FittedPrices):
        raise ValueError(
            f"{serving.name} has no kernels in its serving set, which stand in for what calibration does not measure; "
            "write serving: {kernels: {like: h100-sxm}}, or the name of another GPU, in its file"
        )
    before = prices.fits
    gemms = {
        dtype: fit_gemm(samples, chip, dtype) for dtype in ("bf16", "fp8") if chosen(samples, "gemm", dtype).samples
    }
    return replace(
        before,
        gemm=tuple((dict(before.gemm) | gemms).items()),
        prefill_attention=tuple((dict(before.prefill_attention) | {"bf16": fit_prefill(samples, chip)}).items()),
        decode_attention=tuple((dict(before.decode_attention) | {"bf16": fit_decode(samples, chip)}).items()),
        elementwise=fit_elementwise(samples, chip),
        transfers=fit_transfers(samples, chip, before.transfers.descriptor_s),
    )


def residuals(samples: Sequence[Sample], fits: KernelFits, chip: Chip) -> list[Residual]:
    """Errors of the constants, by kernel and type, on shapes seen and unseen."""
    found = []
    for kernel, dtype in dict.fromkeys((one.kernel, one.dtype) for one in samples):
        for seen in (True, False):
            columns = chosen(samples, kernel, dtype, seen=seen)
            priced = _priced(columns, kernel, dtype, fits, chip)
            if priced is None or not columns.samples:
                continue
            error = priced / columns.seconds - 1
            mape, bias = float(np.abs(error).mean()), float(error.mean())
            found.append(
                Residual(
                    kernel=kernel, dtype=dtype, seen=seen, shapes=len(error), mape=round(mape, 4), bias=round(bias, 4)
                )
            )
    return found


def _priced(columns: Columns, kernel: str, dtype: str, fits: KernelFits, chip: Chip) -> np.ndarray | None:
    match kernel:
        case "gemm":
            return gemm_seconds(dict(fits.gemm)[dtype], chip, dtype, columns)
        case "prefill_attention":
            return attention_seconds(dict(fits.prefill_attention)[dtype], chip, columns)
        case "decode_attention":
            return attention_seconds(dict(fits.decode_attention)[dtype], chip, columns)
        case "elementwise":
            return fits.elementwise.start_s + columns["nbytes"] / (fits.elementwise.hbm * chip.hbm_Bps)
        case "gather":
            return gather_seconds(fits.transfers, chip, columns)
        case "copy_batched":
            pairs = zip(columns["nbytes"].tolist(), columns["descriptors"].tolist(), strict=True)
            return np.array([fits.transfers.copy_time_s(chip.pcie_h2d_Bps, *one, duplex=False) for one in pairs])
    return None


def rates(samples: Sequence[Sample], chip: Chip) -> dict[str, Any]:
    """The figures of the `measured` set that were measured, rounded to four digits."""
    found: dict[str, Any] = {}
    weights = [one for one in samples if one.kernel == "gemm" and one.dtype == "bf16" and _streams(one)]
    if weights:
        nbytes = sum(2 * dict(one.arguments)["n"] * dict(one.arguments)["k"] for one in weights)
        found["hbm_Bps"] = nbytes / sum(one.seconds for one in weights)
    flops = {}
    for dtype in ("bf16", "fp8"):
        products = sorted(
            (2 * math.prod(dict(one.arguments).values()), one.seconds) for one in _of(samples, "gemm", dtype)
        )
        if products:
            large = [work / seconds for work, seconds in products[-math.ceil(len(products) / 10) :]]
            flops[dtype] = float(f"{statistics.median(large):.4g}")
    if "bf16" in flops and "fp16" in dict(chip.flops):
        flops = {"bf16": flops["bf16"], "fp16": flops["bf16"], **flops}
    found["matmul_flops"] = flops
    prompts = [_attention_flops(one) / one.seconds for one in _of(samples, "prefill_attention", "bf16")]
    found["attention_flops"] = max(prompts, default=None)
    for name, kernel in (
        ("elementwise_Bps", "device_copy"),
        ("pcie_h2d_Bps", "copy_to_hbm"),
        ("pcie_d2h_Bps", "copy_to_host"),
    ):
        found[name] = max((dict(one.arguments)["nbytes"] / one.seconds for one in _of(samples, kernel)), default=None)
    for one in _of(samples, "top_k", "bf16"):
        found["topk_elements_per_s"] = dict(one.arguments)["elements"] / one.seconds
    graph = [one.seconds for one in _of(samples, "launch_graph")]
    waited = [one.seconds for one in _of(samples, "launch_and_wait")]
    if graph and waited:
        found |= {"launch_s": graph[0], "sync_s": waited[0] - graph[0]}
    curve: dict[int, float] = {}
    for one in _of(samples, "gather"):
        asked = dict(one.arguments)
        if asked["span_bytes"] == _CURVE_SPAN_BYTES:
            rate = asked["rows"] * asked["row_bytes"] / one.seconds
            curve[asked["row_bytes"]] = float(f"{max(curve.get(asked['row_bytes'], 0.0), rate):.4g}")
    found["gather_curve"] = curve or None
    return {
        name: float(f"{figure:.4g}") if isinstance(figure, float) else figure
        for name, figure in found.items()
        if figure
    }


def _of(samples: Sequence[Sample], kernel: str, dtype: str = "") -> tuple[Sample, ...]:
    return chosen(samples, kernel, dtype).samples


def _streams(one: Sample) -> bool:
    asked = dict(one.arguments)
    return asked["m"] == 1 and (asked["n"], asked["k"]) in _LLAMA_8B


def _attention_flops(one: Sample) -> float:
    asked = dict(one.arguments)
    return 2 * asked["batch"] * asked["heads"] * asked["head_dim"] * asked["tokens"] ** 2


def measured_set(samples: Sequence[Sample], fits: KernelFits, chip: Chip) -> dict[str, Any]:
    """The `measured` mapping of a GPU's file; ValueError for a rate above the datasheet's."""
    figures = rates(samples, chip)
    peaks: dict[str, float] = {
        "hbm_Bps": chip.hbm_Bps, "elementwise_Bps": chip.hbm_Bps, "attention_flops": chip.half_flops,
        "pcie_h2d_Bps": chip.pcie_h2d_Bps, "pcie_d2h_Bps": chip.pcie_d2h_Bps,
    }  # fmt: skip
    stated = {name: (figures[name], peak) for name, peak in peaks.items() if name in figures}
    for dtype, rate in figures["matmul_flops"].items():
        stated[f"matmul_flops.{dtype}"] = (rate, dict(chip.flops).get(dtype, math.inf))
    for name, (figure, peak) in stated.items():
        if figure > peak:
            raise ValueError(
                f"{name} was measured at {figure:.4g}, above the datasheet's {peak:.4g}; name the GPU that this is "
                "with --gpu. Nothing was written"
            )
    return {**figures, "kernels": plain(fits)}


def sources(measured: Mapping[str, Any], origin: str, residual: Sequence[Residual]) -> dict[str, str]:
    """Where each measured figure comes from; `origin` names the device, driver, torch and date."""
    how = {
        "hbm_Bps": "weights of Llama-3.1-8B's linear layers, read by GEMMs of one row in a CUDA graph.",
        "matmul_flops": "the median of the largest tenth of GEMMs, in CUDA graphs; fp16 runs at bf16's rate.",
        "attention_flops": "the quickest causal attention over whole prompts, by torch's flash or cuDNN kernel.",
        "elementwise_Bps": "a device copy of 2 GiB, reads and writes.",
        "topk_elements_per_s": "torch.topk, 2,048 of 131,072 scores in each of 8 rows, in a CUDA graph.",
        "launch_s": "a kernel on one number, over and over in a CUDA graph.",
        "sync_s": "a launch with the wait for it, less a kernel in a graph.",
        "pcie_h2d_Bps": "1 GiB from pinned memory.",
        "pcie_d2h_Bps": "1 GiB to pinned memory.",
        "gather_curve": "a Triton kernel reads random rows of 1 GiB of pinned memory; the best of several numbers.",
    }
    found = {f"measured.{name}": f"{origin}: {text}" for name, text in how.items() if name in measured}
    unseen = [one for one in residual if not one.seen]
    errors = ", ".join(f"{one.kernel} {one.dtype}".strip() + f" {one.mape:.1%}".replace("%", " %") for one in unseen)
    found["measured.kernels"] = (
        f"{origin}: GEMMs and bf16 attention (torch's flash and cuDNN kernels), elementwise kernels, copies and "
        f"gathers; mean error on shapes that the fit did not see: {errors}. Experts, k-means, all-reduce, block-wise "
        "fp8 and attention over fp8 were not measured: constants of the serving set."
    )
    return found


def plain(value: Any) -> Any:
    """Nested dataclasses and pairs as mappings, without what is left at its default."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if not is_dataclass(value):
        return value
    found: dict[str, Any] = {}
    for field in fields(value):
        given = getattr(value, field.name)
        if field.default is not MISSING and given == field.default:
            continue
        if isinstance(given, tuple) and given and isinstance(given[0], tuple):
            found[field.name] = {name: plain(item) for name, item in given}
        else:
            found[field.name] = [plain(item) for item in given] if isinstance(given, tuple) else plain(given)
    return found


class _Flat(yaml.SafeDumper):
    """Innermost mappings on one line."""


def _mapping(dumper: yaml.SafeDumper, mapping: dict[str, Any]) -> yaml.Node:
    inner = not any(isinstance(value, dict) or (isinstance(value, list) and value) for value in mapping.values())
    long = any(isinstance(value, str) for value in mapping.values())
    return dumper.represent_mapping("tag:yaml.org,2002:map", mapping, flow_style=inner and not long)


_Flat.add_representer(dict, _mapping)


def as_yaml(document: Mapping[str, Any]) -> str:
    """A GPU's document as its file is written."""
    return yaml.dump(dict(document), Dumper=_Flat, sort_keys=False, width=116, allow_unicode=True)
