"""`kvsim hardware`: the catalogue of GPUs and hosts, every figure with its source."""

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvsim.cli.calibrate import calibrate
from kvsim.cli.output import Columns, JsonFlag, print_facts, print_json, print_line, print_table
from kvsim.text.names import unknown_name
from kvsim.text.units import format_bytes, format_rate, format_s

if TYPE_CHECKING:
    from kvsim.hardware.catalogue import Gpu, Host

app = typer.Typer(no_args_is_help=True)
app.command("calibrate")(calibrate)


@app.command("list")
def list_hardware(json: JsonFlag = False) -> None:
    """List the GPUs and hosts of the catalogue."""
    from kvsim.hardware.catalogue import gpu_names, host_names, load_gpu, load_host

    gpus = [load_gpu(name) for name in gpu_names()]
    hosts = [load_host(name) for name in host_names()]
    if json:
        shown_gpus = [_described(gpu, "name", "memory_bytes", "sms", "parameter_sets") for gpu in gpus]
        shown_hosts = [_described(host, "name", "gpus_max", "ddr_bytes", "cpu_cores", "nvme_bytes") for host in hosts]
        print_json({"gpus": shown_gpus, "hosts": shown_hosts})
        return
    gpu_columns: Columns = {"GPU": "left", "memory": "right", "SMs": "right", "HBM": "right", "parameter sets": "left"}
    print_table(
        gpu_columns,
        (
            (
                gpu.name,
                format_bytes(gpu.memory_bytes),
                str(gpu.sms),
                format_rate(gpu.rates.hbm_Bps, "B/s"),
                ", ".join(gpu.parameter_sets),
            )
            for gpu in gpus
        ),
    )
    typer.echo()
    host_columns: Columns = {"host": "left", "GPUs": "right", "DDR": "right", "cores": "right", "NVMe": "right"}
    print_table(
        host_columns,
        (
            (
                host.name,
                str(host.gpus_max),
                format_bytes(host.ddr_bytes),
                str(host.cpu_cores),
                format_bytes(host.nvme_bytes),
            )
            for host in hosts
        ),
    )


@app.command("show")
def show_hardware(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="A GPU or host of the catalogue or a GPU's YAML file; @measured shows that set alone."
        ),
    ],
    as_host: Annotated[
        bool, typer.Option("--host", help="NAME is a host, so that its YAML file can be shown.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Show a GPU's parameter sets beside each other, or a host, with the source of every figure."""
    from kvsim.hardware.catalogue import gpu_names, host_names, load_host

    if as_host or name in host_names():
        _show_host(load_host(name), json=json)
        return
    catalogued = name.rpartition("@")[0] or name
    if "." not in name and "/" not in name and catalogued not in gpu_names():
        raise unknown_name("GPU or host", catalogued, gpu_names() + host_names())
    _show_gpu(_parameter_sets(name), json=json)


def _parameter_sets(name: str) -> list["Gpu"]:
    from kvsim.hardware.catalogue import load_gpu
    from kvsim.hardware.gpu_file import FORMER_NAMES, PARAMETER_SETS

    if name.endswith(tuple(f"@{parameter_set}" for parameter_set in (*PARAMETER_SETS, *FORMER_NAMES))):
        return [load_gpu(name)]
    available = load_gpu(f"{name}@{PARAMETER_SETS[0]}").parameter_sets
    return [load_gpu(f"{name}@{parameter_set}") for parameter_set in available]


def _show_gpu(sets: Sequence["Gpu"], *, json: bool) -> None:
    gpu = sets[0]
    if json:
        names = [field.name for field in fields(gpu.rates)]
        rates = {one.parameter_set: _described(one.rates, *names) for one in sets}
        for figures in rates.values():
            figures["matmul_flops"] = dict(figures["matmul_flops"])
        sources = {one.parameter_set: dict(one.sources) for one in sets}
        print_json(
            {**_described(gpu, "name", "memory_bytes", "device_bytes", "sms"), "rates": rates, "sources": sources}
        )
        return
    facts = {"memory": f"{format_bytes(gpu.memory_bytes)} ({gpu.memory_bytes:,} B)"}
    if gpu.device_bytes is not None:
        facts["reported"] = f"{format_bytes(gpu.device_bytes)} ({gpu.device_bytes:,} B) by the driver"
    print_facts(gpu.name, facts | {"SMs": str(gpu.sms)})
    for note in gpu.notes:
        print_line(f"note: {note}")
    columns: Columns = {"figure": "left", **dict.fromkeys((one.parameter_set for one in sets), "right")}
    rows: list[list[str]] = []
    for field in fields(gpu.rates):
        printed = [_printed(field.name, getattr(one.rates, field.name)) for one in sets]
        labels = dict.fromkeys(label for figures in printed for label in figures)
        rows += [[label, *(figures.get(label, "") for figures in printed)] for label in labels]
    print_table(columns, rows)
    told: set[tuple[str, str]] = set()
    for one in sets:
        _print_sources(f"sources of {one.parameter_set}:", [source for source in one.sources if source not in told])
        told.update(one.sources)


def _show_host(host: "Host", *, json: bool) -> None:
    names = [field.name for field in fields(host) if field.name not in ("name", "sources")]
    if json:
        print_json({"name": host.name, **_described(host, *names), "sources": dict(host.sources)})
        return
    facts: dict[str, str] = {}
    for name in names:
        facts |= _printed(name, getattr(host, name))
    print_facts(host.name, facts)
    _print_sources("sources:", host.sources)


def _described(thing: object, *names: str) -> dict[str, Any]:
    return {name: getattr(thing, name) for name in names}


def _printed(name: str, value: Any) -> dict[str, str]:
    """A figure as text, its unit read from the end of its name; one entry for each point of a curve."""
    if isinstance(value, tuple):
        at = " at {:,} B" if name.endswith("_curve") else " {}"
        unit = "B/s" if name.endswith("_curve") else "FLOP/s"
        return {name + at.format(key): format_rate(rate, unit) for key, rate in value}
    if name.endswith("_Bps"):
        return {name: format_rate(value, "B/s")}
    if name.endswith("_flops"):
        return {name: format_rate(value, "FLOP/s")}
    if name.endswith("_elements_per_s"):
        return {name: format_rate(value, "elements/s")}
    if name.endswith("_s"):
        return {name: format_s(value)}
    if name.endswith("_bytes"):
        return {name: format_bytes(value)}
    if name.endswith("_share"):
        return {name: f"{value:.0%}"}
    return {name: f"{value:,}"}


def _print_sources(title: str, sources: Sequence[tuple[str, str]]) -> None:
    print_line(title)
    for text in dict.fromkeys(text for _, text in sources):
        names = ", ".join(name for name, source in sources if source == text)
        print_line(f"  {names}: {text}")
