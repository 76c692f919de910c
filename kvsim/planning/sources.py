"""Where the figures of a plan come from: measured, fitted, datasheet or assumed, with the source's own words."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvsim.hardware.catalogue import Gpu
from kvsim.planning.candidates import Candidates, Family
from traces import Trace

if TYPE_CHECKING:
    from kvsim.planning.question import Question

KINDS = ("measured", "fitted", "datasheet", "assumed")
_TIMES = ("hbm_Bps", "matmul_flops", "attention_flops", "pcie_h2d_Bps", "nvlink_Bps")
_BORROWED = ("no published", "taken for this chip", "the same chip", "no table of", "constants as shares")
_WORDS = {
    "measured": ("measured", "devicequery", "nvidia-smi", "arxiv", "repository"),
    "fitted": ("fitted",),
    "datasheet": ("datasheet", "whitepaper", "pcie gen", "specification", "dimms", "adapters of"),
    "assumed": ("estimate", "usually", "half of", "as in nodes"),
}


def sources_of(question: "Question", could: Candidates, trace: Trace) -> list[dict[str, str]]:
    """A row for each input that figures rest on: `figure`, `kind` (one of KINDS) and `source`."""
    found: dict[tuple[str, str], dict[str, str]] = {}

    def add(figure: str, of: str, kind: str, source: str) -> None:
        found.setdefault((figure, of), {"figure": figure, "of": of, "kind": kind, "source": " ".join(source.split())})

    synthetic = trace.name.startswith("synthetic") or any("drawn" in note for note in trace.notes)
    add(
        "requests",
        question.asked.trace,
        "assumed" if synthetic else "measured",
        f"trace {trace.name}, {len(trace):,} requests",
    )
    if question.calibration is not None:
        add("latency: serving constants", question.gpus[0], "fitted", question.calibration["words"])
    for family in could.families:
        setup, price = family.setup, family.price
        for figure, kind, source in _gpu_sources(setup.gpu):
            add(figure, family.gpu, kind, source)
        for name in ("ddr_bytes", "ddr_Bps", "nic_Bps"):
            stated = dict(setup.host.sources).get(name)
            if stated:
                add(f"host {name}", setup.host.name, kind_of(stated), stated)
        add(
            "usd_per_hour",
            family.gpu,
            "assumed",
            f"{price.usd_per_hour:g} USD: {price.price_source}, {price.price_date}",
        )
        if price.watts is not None:
            watts = f"{price.watts:g} W, taken as drawn all the time: {price.watts_source or question.prices.origin}"
            add("kwh_per_million_tokens", family.gpu, "datasheet", watts)
    return list(found.values())


def _gpu_sources(gpu: Gpu) -> list[tuple[str, str, str]]:
    """Memory, and what latencies are computed from: the kernels of a parameter set, or its rates."""
    stated = dict(gpu.sources)
    memory = stated.get("memory_bytes", "the GPU's file")
    rows = [("memory_bytes", kind_of(memory), memory)]
    for name, text in stated.items():
        if name.removeprefix(f"{gpu.parameter_set}.") in ("kernels", *_TIMES):
            rows.append((f"latency: {name.removeprefix(f'{gpu.parameter_set}.')}", kind_of(text), text))
    return rows


def kinds_of(family: Family, quality: Mapping[str, Any] | str) -> dict[str, str]:
    """Which of KINDS each figure of a plan rests on: latencies on what kernels cost, or the rates in place of that."""
    stated = dict(family.setup.gpu.sources)
    times = stated.get("kernels") or stated.get("hbm_Bps", "")
    kinds = {"slo": kind_of(times), "cost_per_million_tokens": "assumed", "gpus": kind_of(times)}
    if family.price.watts is not None:
        kinds["kwh_per_million_tokens"] = "datasheet"
    if not isinstance(quality, str):
        kinds["quality"] = "measured" if quality["source"].startswith("measured") else "assumed"
    return kinds


def kind_of(source: str) -> str:
    """Which of KINDS a source says that it is: what is taken from another chip is assumed, else its first such word."""
    text = source.casefold()
    if any(words in text.partition("; errors")[0] for words in _BORROWED):
        return "assumed"
    found = {text.find(word): kind for kind, words in _WORDS.items() for word in words if word in text}
    return found[min(found)] if found else "assumed"
