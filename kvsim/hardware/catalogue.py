"""GPUs and hosts: capacities and rates, from the catalogue or from a user's YAML file."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter

from kvsim.hardware.gpu_file import FORMER_NAMES, PARAMETER_SETS, GpuFile, read_gpu_file
from kvsim.hardware.kernels.chip import Chip
from kvsim.hardware.kernels.fitted import FittedPrices
from kvsim.hardware.kernels.kernel_file import KernelFits, Likeness, slowed
from kvsim.hardware.kernels.prices import Kernels
from kvsim.hardware.kernels.rated import RatedPrices
from kvsim.hardware.rates import Rates, interpolate
from kvsim.hardware.switches import switch_figures
from kvsim.text.documents import parse_yaml, read_document, validated
from kvsim.text.names import unknown_name
from kvsim.text.printable import brief
from policies.shown import shown

_CATALOGUE = files("kvsim") / "catalogue"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU under one parameter set; `sources` says for each figure where it comes from."""

    name: str
    memory_bytes: int
    sms: int
    rates: Rates
    parameter_set: str
    parameter_sets: tuple[str, ...]  # all that its file has
    sources: tuple[tuple[str, str], ...]
    kernels: Kernels  # what each kernel costs
    device_bytes: int | None = None  # what the driver reports of memory_bytes; None where that is not known
    notes: tuple[str, ...] = ()  # what was read in another way than it was written


def _pairs(value: object) -> object:
    """A mapping, as YAML writes curves and sources, in the order of its keys."""
    if not isinstance(value, dict):
        return value
    alike = len(set(map(type, value))) == 1  # others have no order, and are refused
    return tuple(sorted(value.items(), key=itemgetter(0)) if alike else value.items())


_Count = Annotated[int, Field(gt=0)]
_Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Cost = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_RowCurve = Annotated[tuple[tuple[_Count, _Rate], ...], BeforeValidator(_pairs), Field(min_length=1)]
_Sources = Annotated[tuple[tuple[str, str], ...], BeforeValidator(_pairs)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A server: its memory, processors, drives, network and PCIe switches; effective figures of the whole of it."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    gpus_max: _Count
    ddr_bytes: _Count
    ddr_Bps: _Rate  # reads and writes together
    cpu_cores: _Count
    cpu_flops: _Rate  # fp32, all cores
    random_curve: _RowCurve  # scattered reads by all cores
    copy_Bps: _Rate  # payload of a memcpy by all cores
    nvme_bytes: Annotated[int, Field(ge=0)]  # 0: no drive
    nvme_read_Bps: _Cost
    nvme_write_Bps: _Cost
    nvme_latency_s: _Cost
    nic_Bps: _Cost  # each way; 0: no network
    nic_latency_s: _Cost
    gpus_per_switch: _Count
    switch_Bps: _Rate  # from one PCIe switch to the root complex, each way
    sources: _Sources = ()

    def __post_init__(self) -> None:
        if self.nvme_bytes and not (self.nvme_read_Bps and self.nvme_write_Bps):
            raise ValueError("nvme_read_Bps and nvme_write_Bps must be greater than 0 where nvme_bytes is")
        names = {field.name for field in fields(self)} - {"name", "sources"}
        for name, _ in self.sources:
            if name not in names:
                raise ValueError(f"sources.{brief(name, 80)} names no figure of a host; write one, such as ddr_Bps")

    def random_Bps(self, row_bytes: int) -> float:
        """Rate at which all cores together read scattered rows of `row_bytes`."""
        return interpolate(self.random_curve, row_bytes)


_HOST = TypeAdapter(Host)


def gpu_names() -> list[str]:
    """Names of the catalogue's GPUs, sorted."""
    return _names("gpus")


def host_names() -> list[str]:
    """Names of the catalogue's hosts, sorted."""
    return _names("hosts")


def load_gpu(text: str) -> Gpu:
    """A GPU by catalogue name or YAML path, then `@datasheet`, `@eager`, `@serving` or `@measured`.

    Without one it is `serving`, or `eager` where a file has no such set. `@achievable` is read as `@eager`. Raises
    ValueError for an unknown name or parameter set and for a file that is not valid.
    """
    where, at, asked = text.rpartition("@")
    if not at or "/" in asked or asked.endswith((".yaml", ".yml")):
        where, asked = text, ""
    chosen = FORMER_NAMES.get(asked, asked)
    if chosen and chosen not in PARAMETER_SETS:
        raise unknown_name("parameter set", asked, PARAMETER_SETS)
    name, data, origin = _document("gpus", "GPU", where, gpu_names())
    file = read_gpu_file(data, origin)
    if not chosen:
        chosen = "serving" if file.serving is not None else "eager"
    if chosen not in file.parameter_sets:
        raise ValueError(f"{origin} has no parameter set {shown(chosen)}; it has {', '.join(file.parameter_sets)}")
    try:
        figures, sources = file.figures(chosen)
        kernels = _kernels(file, chosen, Rates(**figures))
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None
    return Gpu(
        name=name,
        memory_bytes=file.memory_bytes,
        sms=file.sms,
        rates=Rates(**figures),
        parameter_set=chosen,
        parameter_sets=file.parameter_sets,
        sources=tuple(sources.items()),
        kernels=kernels,
        device_bytes=file.device_bytes,
        notes=tuple(
            f"{origin}: the parameter set {former} is called {name} now, and was read as that"
            for former, name in FORMER_NAMES.items()
            if former in data or asked == former
        ),
    )


def gpu_document(text: str) -> dict[str, Any]:
    """The document of a catalogue's GPU or of a user's file, as it is written; ValueError as from `load_gpu`."""
    _, data, origin = _document("gpus", "GPU", text, gpu_names())
    read_gpu_file(data, origin)
    return data


def _kernels(file: GpuFile, chosen: str, rates: Rates) -> Kernels:
    """What each kernel costs under a parameter set: by constants where there are some, else by its rates."""
    peak, _ = file.figures("datasheet")
    chip = Chip(
        hbm_Bps=peak["hbm_Bps"],
        flops=peak["matmul_flops"],
        sms=file.sms,
        nvlink_Bps=peak["nvlink_Bps"],
        pcie_h2d_Bps=peak["pcie_h2d_Bps"],
        pcie_d2h_Bps=peak["pcie_d2h_Bps"],
    )
    rated = RatedPrices(chip=chip, rates=rates, overlapped=chosen == "datasheet")
    fits = file.kernels(chosen)
    if isinstance(fits, Likeness):
        fits = _alike(fits)
    return Kernels(chip=chip, prices=FittedPrices(chip=chip, fits=fits, rated=rated) if fits else rated)


def _alike(likeness: Likeness) -> KernelFits:
    """The constants of the catalogue's GPU that another one is taken to be like."""
    if likeness.like not in gpu_names():
        raise unknown_name("GPU of kernels.like", likeness.like, gpu_names())
    _, data, origin = _document("gpus", "GPU", likeness.like, gpu_names())
    fits = read_gpu_file(data, origin).kernels("serving")
    if not isinstance(fits, KernelFits):
        raise ValueError(
            f"kernels.like={shown(likeness.like)} has no constants of its own; name the GPU it takes them from"
        )
    return slowed(fits, likeness.products)


def load_host(text: str) -> Host:
    """A host by catalogue name or YAML path; ValueError for an unknown name and for a file that is not valid.

    A file may draw its PCIe switches (`kvsim.hardware.switches`) in place of `gpus_per_switch` and `switch_Bps`.
    """
    name, data, origin = _document("hosts", "host", text, host_names())
    known = [*(field.name for field in fields(Host)), "switches"]
    return validated(_HOST, {"name": name, **_drawn(data, origin)}, known, origin)


def _drawn(data: dict[str, Any], origin: str) -> dict[str, Any]:
    """A host's figures, those of its switches read off a drawing of them where there is one."""
    if "switches" not in data:
        return data
    figures = {name: value for name, value in data.items() if name != "switches"}
    if stated := [name for name in ("gpus_per_switch", "switch_Bps") if name in figures]:
        raise ValueError(f"{origin}: {stated[0]} follows from switches; leave one of them out")
    gpus_max = figures.get("gpus_max")
    if not isinstance(gpus_max, int) or not isinstance(data["switches"], dict):
        raise ValueError(f"{origin}: switches must be a mapping of names, and gpus_max a whole number beside it")
    return figures | switch_figures(data["switches"], gpus_max, origin)


def _names(folder: str) -> list[str]:
    entries = (_CATALOGUE / folder).iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml"))


@cache
def _catalogue_document(folder: str, name: str, origin: str) -> dict[str, Any]:
    return parse_yaml((_CATALOGUE / folder / f"{name}.yaml").read_text(encoding="utf-8"), origin)


def _document(folder: str, kind: str, text: str, names: Sequence[str]) -> tuple[str, dict[str, Any], str]:
    """Name, content and origin (for errors) of a catalogue file or a user's."""
    if text in names:
        origin = f"catalogue {kind} {shown(text)}"
        return text, deepcopy(_catalogue_document(folder, text, origin)), origin
    path = Path(text).expanduser()
    if path.suffix not in (".yaml", ".yml") and len(path.parts) <= 1:
        raise unknown_name(kind, text, names)
    return path.stem, parse_yaml(read_document(path), str(path)), str(path)
