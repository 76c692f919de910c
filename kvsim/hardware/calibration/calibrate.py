"""From passes of measurements to a checked GPU file with its residuals."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvsim.hardware.calibration.checks import check_physical, check_steady, steadiness
from kvsim.hardware.calibration.document import (
    Residual,
    as_yaml,
    fitted_kernels,
    measured_set,
    residuals,
    sources,
)
from kvsim.hardware.calibration.samples import Sample, joined
from kvsim.hardware.catalogue import gpu_document, gpu_names, load_gpu
from kvsim.hardware.gpu_file import read_gpu_file
from policies.shown import shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A GPU's document with its new `measured` set, and what it rests on."""

    document: Mapping[str, Any]
    samples: tuple[Sample, ...]
    residuals: tuple[Residual, ...]
    steadiness: tuple[tuple[str, float, float], ...]
    origin: str

    @property
    def yaml(self) -> str:
        """The file, which `load_gpu(path)` reads."""
        return as_yaml(self.document)

    @property
    def record(self) -> str:
        """Samples and residuals as JSON, a sample a line."""
        steady = [{"kernel": name, "spread": round(s, 4), "drift": round(d, 4)} for name, s, d in self.steadiness]
        head = {"origin": self.origin, "residuals": [asdict(one) for one in self.residuals], "steadiness": steady}
        lines = ",\n".join(
            json.dumps(
                {
                    "kernel": one.kernel,
                    "dtype": one.dtype,
                    **dict(one.arguments),
                    "us": float(f"{one.seconds * 1e6:.5g}"),
                    "spread": round(one.spread, 4),
                    "drift": round(one.drift, 4),
                }
            )
            for one in self.samples
        )
        return json.dumps(head, indent=1)[:-2] + f',\n "samples": [\n{lines}\n]}}\n'


def calibration(base: str, passes: Sequence[Sequence[Sample]], origin: str) -> Calibration:
    """Fit the samples of one or more passes over the GPU `base`, a name of the catalogue or a file.

    ValueError for a busy machine, for times quicker than the datasheet of `base` allows, and where `base` has none.
    """
    samples = joined(passes)
    check_steady(samples)
    datasheet = load_gpu(f"{base}@datasheet")
    check_physical(samples, datasheet.kernels, base)
    fits = fitted_kernels(samples, load_gpu(f"{base}@serving"))
    chip = datasheet.kernels.chip
    errors = residuals(samples, fits, chip)
    measured = measured_set(samples, fits, chip)
    document = dict(gpu_document(base))
    kept = {key: text for key, text in document.pop("sources", {}).items() if key.partition(".")[0] != "measured"}
    document["measured"] = measured
    document["sources"] = kept | sources(measured, origin, errors)
    read_gpu_file(document, f"the calibration of {shown(base)}")
    return Calibration(
        document=document,
        samples=tuple(samples),
        residuals=tuple(errors),
        steadiness=tuple(steadiness(samples)),
        origin=origin,
    )


_SAME = {"NVIDIA H200": "h200-sxm", "NVIDIA H100 80GB HBM3": "h100-sxm", "NVIDIA H100 PCIe": "h100-pcie"}
_SAME |= {"NVIDIA A100-SXM4-80GB": "a100-80g-sxm", "NVIDIA A100-SXM4-40GB": "a100-40g-sxm"}
_SAME |= {"NVIDIA A100 80GB PCIe": "a100-80g-pcie", "NVIDIA L40S": "l40s", "NVIDIA A10G": "a10g", "Tesla T4": "t4"}
_SAME |= {"NVIDIA GeForce RTX 4090": "rtx-4090", "NVIDIA B200": "b200", "NVIDIA GB200": "gb200"}


def catalogued(device: str) -> str:
    """The catalogue's name of what a driver calls `device`; ValueError where it has none."""
    if device not in _SAME:
        raise ValueError(
            f"the catalogue has no GPU that its driver calls {shown(device)}; give --gpu one of "
            f"{', '.join(gpu_names())}, or a YAML file with its datasheet"
        )
    return _SAME[device]
