"""Fit the constants of kernels' prices to measured tables, and write them to the catalogue.

`python benchmarks/kernel_fit.py FOLDER` reads AIConfigurator's tables (docs/measured/kernel_prices.md) from FOLDER,
needs scipy (`pip install -e '.[fit]'`), and writes the `serving` sets of kvsim/catalogue/gpus, benchmarks/results/
kernel_fit.json, docs/measured/kernel_prices.md and the sample of rows that the tests compare with.
"""

import argparse
import json
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import yaml
from kernels.composite import composites
from kernels.fits import fitted
from kernels.page import document
from kernels.tables import GPUS, Table, tables

from kvsim.hardware.catalogue import load_gpu
from kvsim.hardware.kernels.chip import Chip
from kvsim.hardware.kernels.prices import Kernels

ROOT = Path(__file__).parents[1]
CATALOGUE = ROOT / "kvsim" / "catalogue" / "gpus"
RESULTS = ROOT / "benchmarks" / "results" / "kernel_fit.json"
PAGE = ROOT / "docs" / "measured" / "kernel_prices.md"
SAMPLE = ROOT / "tests" / "kvsim" / "kernel_sample.json"
SAMPLED = 40
"""Rows of each table in the sample, of shapes that the fit did not see."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder of *.parquet")
    folder = parser.parse_args().folder
    found = {gpu: tables(folder, gpu, load_gpu(f"{gpu}@datasheet").kernels.chip) for gpu in GPUS}
    for gpu, measured in found.items():
        write_constants(gpu, constants(measured, load_gpu(f"{gpu}@datasheet").kernels.chip))
    rows, steps, sample = [], [], []
    for gpu, measured in found.items():
        kernels = load_gpu(gpu).kernels
        rows += [errors(table, kernels) for table in measured]
        sample += [sampled(table) for table in measured]
        if gpu in ("h100-sxm", "a100-80g-sxm"):
            steps += [{"gpu": gpu, **step} for step in composites(measured, kernels)]
    RESULTS.write_text(json.dumps({"errors": rows, "composites": steps}, indent=1) + "\n", encoding="utf-8")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(document(rows, steps), encoding="utf-8")
    SAMPLE.write_text("[\n" + ",\n".join(sample) + "\n]\n", encoding="utf-8")


def constants(measured: list[Table], chip: Chip) -> dict[str, Any]:
    """Fitted constants by kernel and type."""
    found: dict[str, Any] = {}
    for table in measured:
        fit = plain(fitted(table, chip))
        if table.kernel == "all_reduce":
            found[table.kernel] = fit
        else:
            found.setdefault(table.kernel, {})[table.dtype] = fit
    return found


def plain(value: Any) -> Any:
    """Nested dataclasses as mappings, without what is left at its default."""
    if not is_dataclass(value):
        return value
    pairs = {field.name: (getattr(value, field.name), field.default) for field in fields(value)}
    return {
        name: [plain(item) for item in given] if isinstance(given, tuple) else given
        for name, (given, default) in pairs.items()
        if given != default
    }


def write_constants(gpu: str, found: dict[str, Any]) -> None:
    """Replace the fitted kernels in a catalogue file; those that no table has are kept."""
    path = CATALOGUE / f"{gpu}.yaml"
    text = path.read_text(encoding="utf-8")
    kept = (yaml.safe_load(text).get("serving") or {}).get("kernels") or {}
    block = yaml.dump({"serving": {"kernels": kept | found}}, Dumper=Flat, sort_keys=False, width=116)
    serving = re.compile(r"^serving:\n(?:[ ].*\n|\n(?=[ ]))*", re.MULTILINE)
    if not serving.search(text):
        text = text.replace("\nsources:\n", "\nserving:\n\nsources:\n")
    path.write_text(serving.sub(lambda _: block, text), encoding="utf-8")


class Flat(yaml.SafeDumper):
    """Innermost mappings on one line."""


def _mapping(dumper: yaml.SafeDumper, mapping: dict[str, Any]) -> yaml.Node:
    inner = not any(isinstance(value, dict) or (isinstance(value, list) and value) for value in mapping.values())
    return dumper.represent_mapping("tag:yaml.org,2002:map", mapping, flow_style=inner)


Flat.add_representer(dict, _mapping)


def errors(table: Table, kernels: Kernels) -> dict[str, Any]:
    """MAPE and bias of the catalogue's prices on seen and unseen shapes; columns and single prices must agree."""
    price = getattr(kernels, f"{table.kernel}_s")
    priced = np.array([price(**table.arguments(row)) for row in range(len(table.seconds))])
    error = priced / table.seconds - 1
    found: dict[str, Any] = {"gpu": table.gpu, "kernel": table.kernel, "dtype": table.dtype, "rows": len(error)}
    found["dropped"] = table.dropped
    for name, part in (("seen", error[table.seen]), ("unseen", error[~table.seen])):
        found[f"mape_{name}"] = round(float(np.abs(part).mean()), 4)
        found[f"bias_{name}"] = round(float(part.mean()), 4)
    return found


def sampled(table: Table) -> str:
    """Unseen rows, drawn by a hash of their arguments: their names, then a line of values and microseconds each."""
    rows = np.flatnonzero(~table.seen).tolist()
    rows.sort(key=lambda row: crc32(repr(table.arguments(row)).encode()))
    names = [name for name in table.columns if name != "routed"]
    head = json.dumps({"gpu": table.gpu, "kernel": table.kernel, "dtype": table.dtype, "names": [*names, "us"]})
    values = [
        json.dumps([*(table.columns[name][row].item() for name in names), float(f"{table.seconds[row] * 1e6:.5g}")])
        for row in rows[:SAMPLED]
    ]
    return f'{head[:-1]}, "rows": [\n  ' + ",\n  ".join(values) + "\n]}"


if __name__ == "__main__":
    main()
