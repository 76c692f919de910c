"""The runs that a report compares, and what it reads from each one's summary beyond single figures."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from kvsim.report.page import MISSING, Cell, name_cell
from kvsim.report.plots import Style, style
from kvsim.results.causes import WAITS
from kvsim.results.summary import Result, summarize
from kvsim.text.units import format_s

RATES = {"output_tokens_per_s": "output tokens/s", "goodput_rps": "goodput req/s"}
LATENCIES = {"ttft_s": "TTFT", "tpot_s": "TPOT", "itl_s": "ITL", "e2e_s": "end to end", "queue_s": "queue"}


class Run(NamedTuple):
    """One result, its summary, and how the page names and draws it."""

    label: str
    style: Style
    result: Result
    summary: dict[str, Any]

    @property
    def name_cell(self) -> Cell:
        """The run as the name of a table's row."""
        return name_cell(self.label, self.style.css_border)

    def tier_bytes(self, tier: str, figure: str) -> float | None:
        """Sum of `figure` (`peak_bytes`, `capacity_bytes`) over all memories of a tier; None where there is none."""
        nodes = [node[figure] for name, node in self.summary["memory"].items() if _tier(name) == tier]
        return sum(nodes) if nodes else None

    def tiers(self) -> list[str]:
        """The tiers of the memories, in their order."""
        return list(dict.fromkeys(map(_tier, self.summary["memory"])))

    def bottleneck(self) -> str:
        """The bottleneck, and its share of the time that requests spent once admitted."""
        name, spent_s = self.summary["bottleneck"], self.summary["attribution"]["e2e"]["mean_s"]
        if name is None:
            return MISSING
        admitted_s = sum(seconds for cause, seconds in spent_s.items() if cause not in WAITS)
        return f"{name}, {spent_s[name] / admitted_s:.1%} of the time of admitted requests"

    def intervals(self) -> Iterator[tuple[str, Callable[[float], str], tuple[float, float, float]]]:
        """Of each figure with a known interval: its name, how to show it, and its mean and both ends."""
        found = self.summary["uncertainty"] or {}
        figures: list[tuple[str, Callable[[float], str], Mapping[str, Any] | None]]
        figures = [(name, format_rate, found.get(key)) for key, name in RATES.items()]
        figures += [
            (f"{name} {rank}", format_s, interval)
            for key, name in LATENCIES.items()
            for rank, interval in found.get(key, {}).items()
        ]
        for name, show, interval in figures:
            if interval and interval["mean"] is not None:
                yield name, show, (interval["mean"], interval["low"], interval["high"])

    def pcie_bytes(self) -> float:
        """Bytes that crossed between an HBM and its host, both ways; each byte counts at its GPU's link only."""
        moved: list[float] = [x["bytes"] for link, x in self.summary["links"].items() if _joins_gpu_and_host(link)]
        return sum(moved)

    def link_kinds(self) -> dict[str, list[str]]:
        """The links that moved bytes, grouped by name without the numbers of GPUs and switches."""
        kinds: dict[str, list[str]] = {}
        for link, figures in self.summary["links"].items():
            if figures["bytes"]:
                kinds.setdefault(re.sub(r"\d+", "*", link), []).append(link)
        return kinds

    def cause_bytes(self, links: Iterable[str]) -> dict[str, int]:
        """Bytes by cause, summed over links."""
        total: dict[str, int] = {}
        for link in links:
            for cause, moved_bytes in self.summary["traffic"].get(link, {}).items():
                total[cause] = total.get(cause, 0) + moved_bytes
        return total


def runs_of(results: Sequence[Result], slo: Mapping[str, float] | None, warmup_s: float) -> list[Run]:
    """The results with their summaries, labelled by policy; equal policies are numbered."""
    policies = [str(result.inputs["policy"]) for result in results]
    labels = [
        f"{policy} ({policies[: index + 1].count(policy)})" if policies.count(policy) > 1 else policy
        for index, policy in enumerate(policies)
    ]
    return [
        Run(label, style(index), result, summarize(result, slo, warmup_s))
        for index, (label, result) in enumerate(zip(labels, results, strict=True))
    ]


def format_rate(value: float) -> str:
    """A rate for people: whole from 100 on, three digits below."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _tier(node: str) -> str:
    """`hbm` of `gpu0.hbm`."""
    return node.rpartition(".")[2]


def _joins_gpu_and_host(link: str) -> bool:
    src, _, dst = link.partition("->")  # `nic` is one end
    src, dst = _tier(src), _tier(dst)
    other = {"hbm": dst}.get(src, src)
    return "hbm" in (src, dst) and (other in ("ddr", "nvme", "cpu", "root") or other.startswith("pcie"))
