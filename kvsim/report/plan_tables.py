"""The tables of a plan's page, from the document that `kvsim plan --json` prints."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from kvsim.report.page import MISSING, Cell, Table, name_cell, number_cell, table, text_cell
from kvsim.report.plots import Style
from kvsim.report.runs import format_rate
from kvsim.text.units import format_s

Row = Mapping[str, Any]


class Fleet(NamedTuple):
    """One of the document's plans, and how the page names and draws it."""

    label: str
    style: Style
    row: Row

    @property
    def name_cell(self) -> Cell:
        """The fleet as the name of a table's row."""
        return name_cell(self.label, self.style.css_border)


def label_of(row: Row) -> str:
    """What a plan runs on what."""
    return f"{' '.join([row['policy'], *row['options']])} on {row['gpu']}"


def split_of(row: Row) -> str:
    """How a replica is split, and how many GPUs process prompts alone."""
    split = f"tp {row['tp']}" + (f" x pp {row['pp']}" if row["pp"] > 1 else "")
    return split + (f", {row['prefill_gpus']} GPUs for prompts" if row["prefill_gpus"] else "")


def gpus_of(row: Row) -> str:
    """How many GPUs, in words."""
    return "1 GPU" if row["gpus"] == 1 else f"{row['gpus']:,} GPUs"


def usd(value: float) -> str:
    """US dollars."""
    return f"${value:,.2f}"


def quality_of(quality: Row | str) -> str:
    """What a policy loses, in words."""
    if isinstance(quality, str):
        return quality
    if not quality["kl_nats"]:
        return "nothing lost, by construction" if "by construction" in quality["source"] else "KL 0 nats a token"
    return f"KL {quality['kl_nats']:.4f} nats a token, {quality['top1_share']:.1%} same top-1"


def decision(row: Row, load: Row) -> Table:
    """The plan in a few lines, for who reads nothing else."""
    replicas = f"{row['replicas']} replica{'s' if row['replicas'] > 1 else ''} of {row['tp'] * row['pp']}"
    cost, room, drawn = row["cost_per_million_tokens"], load["headroom"], row["kwh_per_million_tokens"]
    bottleneck, breaks = load["bottleneck"], load["breaks"]
    facts = {
        "policy": row["policy"],
        "GPU": row["gpu"],
        "GPUs": f"{row['gpus']} ({replicas})",
        "split": split_of(row),
        "chosen besides": " ".join(row["options"]) or None,
        "cost of a million output tokens": None
        if cost is None
        else f"{usd(cost)} ({usd(row['usd_per_hour'])} an hour)",
        "energy of a million output tokens": None if drawn is None else f"at most {drawn:.3g} kWh",
        "head-room": None if room is None else f"{room:.0%} more load",
        "breaks first when load grows": breaks,
        "bottleneck": bottleneck or row.get("bottleneck"),
        "quality": quality_of(row["quality"]),
    }
    rows = [[name_cell(name), text_cell(str(fact))] for name, fact in facts.items() if fact is not None]
    caption = "The plan." if row["feasible"] else "The nearest plan, which does not hold."
    return table(caption, ["what", "plan"], rows, ["plan"])


def objectives(row: Row) -> Table:
    """What must hold, what the plan has of it, and what one replica fewer has."""
    fewer = row["fewer"]
    headings = ["objective", "limit", "value", "from", "to", "held"]
    rows = []
    for name, bound in row["slo"].items():
        value_s, limit_s = bound["value_s"], bound["limit_s"]
        held = value_s is not None and value_s <= limit_s and not row.get("unserved")
        times = [number_cell(bound[key], format_s) for key in ("limit_s", "value_s", "low_s", "high_s")]
        rows.append([name_cell(name), *times, text_cell("yes" if held else "no")])
        if fewer is not None:
            rows[-1].append(number_cell(fewer["slo"][name]["value_s"], format_s))
    if fewer is not None:
        headings.append(f"with {gpus_of(fewer)}")
    caption = "What must hold; from and to are 95 % intervals, where there are any."
    if fewer is not None:
        caption += f" One replica fewer, {gpus_of(fewer)}, breaks {fewer['binding'] or 'nothing'}."
    return table(caption, headings, rows, ["held"])


def plans(fleets: Sequence[Fleet], names: Iterable[str]) -> Table:
    """Every line's best fleet beside each other."""
    names = list(names)
    rows = [
        [
            fleet.name_cell,
            text_cell("yes" if fleet.row["feasible"] else "no"),
            number_cell(fleet.row["gpus"], "{:,}".format),
            text_cell(split_of(fleet.row)),
            number_cell(fleet.row["usd_per_hour"], usd),
            number_cell(fleet.row["cost_per_million_tokens"], usd),
            number_cell(fleet.row["kwh_per_million_tokens"], "{:.3g}".format),
            *(number_cell((fleet.row["slo"].get(name) or {}).get("value_s"), format_s) for name in names),
            number_cell(_kl_nats(fleet.row["quality"]), _nats),
            text_cell("yes" if fleet.row["pareto"] else "no"),
            text_cell(fleet.row["binding"] or MISSING),
        ]
        for fleet in fleets
    ]
    caption = "The best fleet of each GPU, policy and cache; costs and energy are of a million output tokens. On the "
    caption += "front is what no other plan beats in cost, distance from the SLO and quality together."
    headings = ["plan", "holds", "GPUs", "split", "$/hour", "$/M tokens", "kWh/M tokens", *names, "KL (nats)"]
    texts = ["on the front", "breaks first"]
    return table(caption, [*headings, *texts], rows, ["holds", "split", *texts])


def configurations(document: Row) -> Table | None:
    """Every split that was simulated, ranked; None where there is none."""
    rows, names = document["configurations"], list(document["slo_asked"])
    sought = any(row["sustained"] is not None for row in rows)
    found = [
        [
            name_cell(label_of(row)),
            text_cell("yes" if row["holds"] else "no"),
            number_cell(row["gpus"], "{:,}".format),
            text_cell(split_of(row)),
            number_cell(row["usd_per_hour"], usd),
            number_cell(row["cost_per_million_tokens"], usd),
            number_cell(row["output_tokens_per_s_per_gpu"], format_rate),
            *(number_cell(row["slo"][name], format_s) for name in names),
            *([number_cell(row["sustained"], "{:.2f} x".format)] if sought else []),
            text_cell("yes" if row["front"] else "no"),
        ]
        for row in rows
    ]
    headings = ["plan", "holds", "GPUs", "split", "$/hour", "$/M tokens", "tokens/s of a GPU", *names]
    headings += ["holds up to"] if sought else []
    caption = (
        "Every split that was simulated, at its best size, ranked. Searches stop where a split would be dearer than "
    )
    caption += "what holds already. On the front: nothing is both cheaper and further from its limits."
    texts = ["holds", "split", "on the front"]
    return table(caption, [*headings, "on the front"], found, texts)._replace(tall=True) if found else None


def curve(load: Row) -> Table | None:
    """Goodput and each objective against offered load; None where no load was tried."""
    names = list(dict.fromkeys(name for row in load["curve"] for name in row["slo"]))
    rows = [
        [
            name_cell(f"{row['rate_scale']:.2f} x"),
            number_cell(row["offered_rps"], format_rate),
            number_cell(row["goodput_rps"], format_rate),
            *(number_cell(row["slo"][name], format_s) for name in names),
            text_cell("yes" if row["holds"] else "no"),
            text_cell(row["binding"]),
            text_cell(row["bottleneck"] or MISSING),
        ]
        for row in load["curve"]
    ]
    caption = "The same fleet at other loads; the trace's own is 1 x."
    texts = ["holds", "nearest its limit", "bottleneck"]
    return table(caption, ["load", "offered req/s", "goodput req/s", *names, *texts], rows, texts) if rows else None


def sensitivity(document: Row) -> Table | None:
    """What becomes of the plan where things turn out otherwise; None where nothing was tried."""
    names = list(document["slo_asked"])
    rows = [
        [
            name_cell(row["change"]),
            text_cell({True: "yes", False: "no", None: MISSING}[row["holds"]]),
            *(number_cell(row["slo"].get(name), format_s) for name in names),
            number_cell(row["cost_per_million_tokens"], usd),
            number_cell(row["needed"] and row["needed"]["gpus"], "{:,}".format),
            number_cell(row["needed"] and row["needed"]["usd_per_hour"], usd),
            number_cell(row["needed"] and row["needed"]["cost_per_million_tokens"], usd),
            text_cell(row["method"]),
            text_cell(changed(row)),
        ]
        for row in document["sensitivity"]
    ]
    headings = ["change", "still holds", *names, "$/M tokens", "GPUs needed", "$/hour then", "$/M tokens then"]
    caption = (
        "One change at a time, all else as planned: what the same fleet has then, and the fewest GPUs that hold the "
    )
    caption += "SLO, split and kept as the plan is. It is not planned anew."
    return table(caption, [*headings, "method", "how"], rows, ["still holds", "method", "how"]) if rows else None


def changed(row: Row) -> str:
    """How a change was made, why it could not be, and what else would be cheaper."""
    words = [row["made_by"], row["reason"] or ""]
    if row["holds"] is False and row["needed"] is None:
        words.append("no size that was tried holds")
    instead = row.get("instead")
    if instead is not None:
        words.append(
            f"{gpus_of(instead)} of {label_of(instead)} would be cheaper, {usd(instead['usd_per_hour'])} an hour"
        )
    return "; ".join(filter(None, words))


def refused(rows: Iterable[Row]) -> Table | None:
    """What cannot serve, and why; None where everything could."""
    found = [[name_cell(label_of(row)), text_cell(split_of(row)), text_cell(row["reason"])] for row in rows]
    caption = "Candidates that cannot serve this trace."
    return table(caption, ["plan", "split", "reason"], found, ["split", "reason"]) if found else None


def qualities(fleets: Sequence[Fleet]) -> Table:
    """What each policy loses against full attention, as it was measured; a row for each policy."""
    rows: dict[str, list[Cell]] = {}
    for row in (fleet.row for fleet in fleets):
        quality = row["quality"]
        known: Row = {} if isinstance(quality, str) else quality
        ends = [number_cell(known.get(f"kl_nats_{end}"), _nats) for end in ("low", "high")]
        rows[row["policy"]] = [
            name_cell(row["policy"]),
            number_cell(known.get("kl_nats"), _nats),
            *ends,
            number_cell(known.get("top1_share"), "{:.1%}".format),
            number_cell(known.get("context_tokens"), "{:,}".format),
            text_cell(known.get("source", str(quality))),
        ]
    caption = (
        "Divergence from full attention in nats a token, with 95 % intervals; how often the likeliest token is the "
    )
    caption += "same; and the context at which it was measured."
    headings = ["policy", "KL", "from", "to", "same top-1", "context", "source"]
    return table(caption, headings, rows.values(), ["source"])


def sources(document: Row) -> Table:
    """What all figures rest on, the assumed first."""
    order = ("assumed", "fitted", "datasheet", "measured")
    ordered = sorted(document["sources"], key=lambda row: order.index(row["kind"]))
    rows = [[name_cell(row["figure"]), *(text_cell(row[key]) for key in ("of", "kind", "source"))] for row in ordered]
    headings = ["figure", "of", "kind", "source"]
    return table("What the figures rest on, what is assumed first.", headings, rows, headings[1:])


def kinds(row: Row) -> Table:
    """Which kind of source each figure of a plan rests on."""
    rows = [[name_cell(figure), text_cell(kind)] for figure, kind in row["sources"].items()]
    return table("What the plan's own figures rest on.", ["figure", "kind"], rows, ["kind"])


def _kl_nats(quality: Row | str) -> float | None:
    return None if isinstance(quality, str) else quality["kl_nats"]


_nats: Callable[[float], str] = "{:.4f}".format
