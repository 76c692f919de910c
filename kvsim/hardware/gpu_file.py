"""The YAML file of a GPU: its parameter sets, figures given as numbers or as shares of the datasheet, and sources."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, TypeAdapter

from kvsim.hardware.kernels.kernel_file import CONSTANTS, KernelFits, Likeness
from kvsim.text.documents import validated
from kvsim.text.printable import brief

PARAMETER_SETS = ("datasheet", "eager", "serving", "measured")
"""The chip's peaks, Hugging Face and research code, serving engines, and what was calibrated on a machine.

A figure that one leaves out is that of the set before it.
"""

_CAPACITIES = ("memory_bytes", "device_bytes", "sms")

FORMER_NAMES = {"achievable": "eager"}
"""What a set was called, and is still read as, with a note."""


@dataclass(frozen=True, slots=True)
class Share:
    """A fraction of the datasheet's figure, written `80%`."""

    of_datasheet: float


Figure = float | Share


def _figure(value: object) -> object:
    share = isinstance(value, str) and value.endswith("%")
    try:
        number = float(str(value).removesuffix("%"))
    except ValueError:
        raise ValueError("must be a number, or a percentage of the datasheet's figure such as '80%'") from None
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError("must be a finite number")
    return Share(number / 100) if share else number


def _rate(value: object) -> object:
    figure = _figure(value)
    if figure == 0 or figure == Share(0) or _negative(figure):
        raise ValueError("must be greater than 0")
    return figure


def _cost(value: object) -> object:
    figure = _figure(value)
    if _negative(figure):
        raise ValueError("must be 0 or more")
    return figure


def _fraction(value: object) -> object:
    figure = _cost(value)
    if isinstance(figure, float) and figure > 1:
        raise ValueError("must be between 0 and 1")
    return figure


def _negative(figure: object) -> bool:
    number = figure.of_datasheet if isinstance(figure, Share) else figure
    return isinstance(number, float) and number < 0


_Rate = Annotated[Figure, BeforeValidator(_rate)]
_Cost = Annotated[Figure, BeforeValidator(_cost)]
_Fraction = Annotated[Figure, BeforeValidator(_fraction)]


class Figures(BaseModel):
    """One parameter set as written; the fields are those of `Rates`.

    `matmul_flops` is a figure for each dtype, or one percentage for all; percentages in `gather_curve` are of the
    datasheet's `pcie_h2d_Bps`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    hbm_Bps: _Rate | None = None
    matmul_flops: dict[str, _Rate] | _Rate | None = None
    attention_flops: _Rate | None = None
    elementwise_Bps: _Rate | None = None
    topk_elements_per_s: _Rate | None = None
    launch_s: _Cost | None = None
    sync_s: _Cost | None = None
    pcie_h2d_Bps: _Rate | None = None
    pcie_d2h_Bps: _Rate | None = None
    pcie_latency_s: _Cost | None = None
    gather_curve: Annotated[dict[Annotated[int, Field(gt=0)], _Rate], Field(min_length=1)] | None = None
    gather_sm_share: _Fraction | None = None
    nvlink_Bps: _Cost | None = None
    nvlink_latency_s: _Cost | None = None


def _kind(value: object) -> str:
    return "like" if isinstance(value, Likeness) or (isinstance(value, dict) and "like" in value) else "fits"


class KernelFigures(Figures):
    """A parameter set that also prices every kernel, by constants of its own or those of another GPU."""

    kernels: (
        Annotated[Annotated[KernelFits, Tag("fits")] | Annotated[Likeness, Tag("like")], Discriminator(_kind)] | None
    ) = None


class GpuFile(BaseModel):
    """The whole file. `sources` says for a set (`eager`) or a figure (`eager.hbm_Bps`) where it is from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    memory_bytes: Annotated[int, Field(gt=0)]
    device_bytes: Annotated[int, Field(gt=0)] | None = None
    sms: Annotated[int, Field(gt=0)]
    datasheet: Figures
    eager: Figures | None = None
    serving: KernelFigures | None = None
    measured: KernelFigures | None = None
    sources: dict[str, str] = {}

    @property
    def parameter_sets(self) -> tuple[str, ...]:
        """The sets that the file has."""
        return tuple(name for name in PARAMETER_SETS if getattr(self, name) is not None)

    def kernels(self, chosen: str) -> KernelFits | Likeness | None:
        """The kernels' constants of a parameter set, or of the set before it; None where there are none."""
        found = None
        for name in PARAMETER_SETS[: PARAMETER_SETS.index(chosen) + 1]:
            found = getattr(getattr(self, name), "kernels", None) or found
        return found

    def figures(self, chosen: str) -> tuple[dict[str, Any], dict[str, str]]:
        """The figures of a parameter set as absolute numbers, and the sources of those that have one."""
        values: dict[str, Any] = {}
        peaks: dict[str, Any] = {}
        sources = {key: text for key, text in self.sources.items() if key in _CAPACITIES}
        for name in PARAMETER_SETS[: PARAMETER_SETS.index(chosen) + 1]:
            part = getattr(self, name)
            for field in Figures.model_fields if part else ():
                value = getattr(part, field)
                if value is None:
                    continue
                values[field] = self._absolute(field, value, values)
                if name != "datasheet":
                    peak = peaks.get("pcie_h2d_Bps" if field == "gather_curve" else field)
                    _check_below(f"{name}.{field}", values[field], peak)
                source = self.sources.get(f"{name}.{field}", self.sources.get(name))
                if source is not None:
                    sources[field] = source
            if getattr(part, "kernels", None) and (source := self.sources.get(f"{name}.kernels")) is not None:
                sources["kernels"] = source
            if name == "datasheet":
                peaks = dict(values)
        missing = [field for field in Figures.model_fields if field not in values]
        if missing:
            raise ValueError(f"datasheet.{missing[0]} is missing")
        return values, sources

    def _absolute(self, field: str, value: Any, before: Mapping[str, Any]) -> Any:
        """Numbers for shares of the datasheet; dtypes that a set leaves out keep the rates from `before`."""
        peak = getattr(self.datasheet, "pcie_h2d_Bps" if field == "gather_curve" else field)
        if field == "gather_curve":
            return tuple((row_bytes, _number(figure, field, peak)) for row_bytes, figure in sorted(value.items()))
        if field != "matmul_flops":
            return _number(value, field, peak)
        match peak:
            case dict():
                given = value if isinstance(value, dict) else dict.fromkeys(peak, value)
            case _:
                raise ValueError("datasheet.matmul_flops must give a rate for each dtype, such as {bf16: 312e12}")
        absolute = {dtype: _number(figure, f"{field}.{dtype}", peak.get(dtype)) for dtype, figure in given.items()}
        return tuple({**dict(before.get(field, ())), **absolute}.items())


def _check_below(field: str, value: Any, peak: Any) -> None:
    """ValueError for a rate above the datasheet's; what a datasheet leaves out has no bound."""
    if peak is None or not field.endswith(("_Bps", "_flops", "_per_s", "gather_curve")):
        return
    if isinstance(value, tuple):
        bounds = dict(peak) if isinstance(peak, tuple) else dict.fromkeys((key for key, _ in value), peak)
        pairs = [(f"{field}.{key}", rate, bounds.get(key)) for key, rate in value]
    else:
        pairs = [(field, value, peak)]
    for name, rate, most in pairs:
        if most is not None and rate > most:
            raise ValueError(
                f"{name}={rate:g} is faster than the datasheet's {most:g}, which no chip is; mend one of the two"
            )


def _number(figure: Figure, field: str, peak: Figure | None) -> float:
    if not isinstance(figure, Share):
        return figure
    if peak is None or isinstance(peak, Share):
        raise ValueError(
            f"{field} is a percentage, but the datasheet gives no absolute figure for it; write the figure itself"
        )
    if peak == 0:
        raise ValueError(f"{field} is a percentage of the datasheet's 0; write the figure itself")
    return figure.of_datasheet * peak


_SCHEMA = TypeAdapter(GpuFile)
_KNOWN = [*GpuFile.model_fields, *KernelFigures.model_fields, *CONSTANTS]


def read_gpu_file(data: Mapping[str, Any], origin: str) -> GpuFile:
    """Check a GPU's document; ValueError, naming `origin` and the key, when it is not valid."""
    file = validated(_SCHEMA, _renamed(data, origin), _KNOWN, origin)
    known = {*_CAPACITIES, *PARAMETER_SETS}
    known |= {f"{name}.{field}" for name in PARAMETER_SETS for field in KernelFigures.model_fields}
    if file.device_bytes is not None and file.device_bytes > file.memory_bytes:
        raise ValueError(
            f"{origin}: device_bytes={file.device_bytes} exceeds memory_bytes={file.memory_bytes}; a driver keeps some"
        )
    for key in file.sources:
        if key not in known:
            raise ValueError(
                f"{origin}: sources.{brief(key, 80)} names no figure; write 'eager.hbm_Bps' or 'datasheet'"
            )
    return file


def _renamed(data: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The document with sets, and their sources, under the names that they have today."""
    renamed = dict(data)
    for former, name in FORMER_NAMES.items():
        if former not in data:
            continue
        if name in data:
            raise ValueError(f"{origin}: {former} is the former name of {name}; keep one of them")
        renamed[name] = renamed.pop(former)
        if isinstance(sources := renamed.get("sources"), dict):
            renamed["sources"] = {
                f"{name}{key.removeprefix(former)}" if str(key).partition(".")[0] == former else key: text
                for key, text in sources.items()
            }
    return renamed
