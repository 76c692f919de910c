"""From a file of clients' records to serving constants, the error that they leave, and the words that say so."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kvsim.observed.fit import Fit, fitted
from kvsim.observed.records import Records, read_records
from kvsim.observed.replayed import CONSTANTS, Replayed, held_out
from kvsim.scenario.setup import Setup
from kvsim.text.units import format_s
from policies import Full
from traces.schema import Floats

KEYS = {name.removesuffix("_s"): name for name in CONSTANTS}
"""The constants by the keys of a scenario file."""

_MOST = 2000  # requests, the first ones: more of them say little more, and take as much longer
_FAR = 0.25  # error left in the middle, beyond which a reader is warned


def calibrated(
    text: str, setup: Setup, given: Mapping[str, Any], progress: Callable[[int], None] = lambda _ended: None
) -> dict[str, Any]:
    """The constants that the records of a file tell (`constants`, by their keys), and how well (`error_left`).

    `setup` is the fleet that was measured; it is taken to run full attention, as all servers with such an interface do.
    `given` are the user's own options: constants among them are not fitted. Raises ValueError for records that are
    none, or that do not tell the constants.
    """
    records = _first(read_records(text))
    stated = {name: getattr(setup, name) for key, name in KEYS.items() if key in given}
    replayed = Replayed(records, replace(setup, policy=Full(), counts={}), stated, progress)
    fit = fitted(replayed)
    out = held_out(len(records))
    found: dict[str, Any] = {
        "file": text,
        "sha256": hashlib.sha256(Path(records.source).read_bytes()).hexdigest(),
        "written_by": records.written_by,
        "requests": len(records),
        "fitted": int((~out).sum()),
        "held_out": int(out.sum()),
        "failed": records.failed,
        "fleet": {"gpu": setup.gpu.name, "gpus": setup.gpus, "tp": setup.tp, "pp": setup.pp, "model": setup.model.name},
        "constants": {key: fit.constants[name] for key, name in KEYS.items()},
        "standard_errors": {key: fit.errors[name] for key, name in KEYS.items()},
        "stated": sorted(key for key in KEYS if key in given),
        "error_left": _errors(records, fit, out),
        "simulations": replayed.simulations,
        "notes": list(records.notes),
    }
    return {**found, "words": _words(found), "warnings": _warnings(found)}


def _first(records: Records) -> Records:
    if len(records) <= _MOST:
        return records
    return replace(
        records,
        trace=records.trace.head(_MOST),
        ttft_s=records.ttft_s[:_MOST],
        tpot_s=records.tpot_s[:_MOST],
        notes=(*records.notes, f"the first {_MOST:,} of {len(records):,} requests are taken"),
    )


def _errors(records: Records, fit: Fit, out: np.ndarray) -> dict[str, dict[str, float | None]]:
    """Of requests held out: how far simulated latencies are from recorded ones, after the fit and before it."""
    found = {}
    for name in ("ttft_s", "tpot_s"):
        own, simulated, plain = (getattr(values, name)[..., out] for values in (records, fit.found, fit.plain))
        after, before = (_relative(values[0], own) for values in (simulated, plain))  # as recorded, without jitter
        known = own[np.isfinite(own)]
        found[name] = {
            "median": _quantile(np.abs(after), 0.5),
            "p90": _quantile(np.abs(after), 0.9),
            "bias": _quantile(after, 0.5),
            "median_before": _quantile(np.abs(before), 0.5),
            **{f"measured_p{p}_s": _quantile(known, p / 100) for p in (50, 99)},
            **{f"simulated_p{p}_s": _quantile(simulated[0], p / 100) for p in (50, 99)},
        }
    return found


def _relative(simulated_s: Floats, own_s: Floats) -> Floats:
    return simulated_s / np.where(own_s > 0, own_s, np.nan) - 1


def _quantile(values: Floats, share: float) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.quantile(known, share, method="inverted_cdf")) if len(known) else None


def _words(found: Mapping[str, Any]) -> str:
    """One sentence for whoever reads a result."""
    constants, errors = found["constants"], found["standard_errors"]
    shown = [
        f"{key.replace('_', ' ')} {_value(key, value)}"
        + (" (stated)" if key in found["stated"] else f" ± {_value(key, errors[key], digits=2)}")
        for key, value in constants.items()
    ]
    left = [
        f"{name.removesuffix('_s').upper()} {own['median']:.1%} in the middle and {own['p90']:.0%} at p90 "
        f"(before: {own['median_before']:.0%} in the middle)"
        for name, own in found["error_left"].items()
        if own["median"] is not None
    ]
    return (
        f"serving constants fitted to {found['fitted']:,} of {found['requests']:,} requests that {found['written_by']} "
        f"recorded: {', '.join(shown)}; error left on the {found['held_out']:,} held out: {', '.join(left)}"
    )


def _value(key: str, value: float, digits: int = 4) -> str:
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:g}" if key == "kernel_slowdown" else format_s(rounded)


def _warnings(found: Mapping[str, Any]) -> list[str]:
    words = [*found["notes"]]
    if found["failed"]:
        words.append(f"{found['failed']:,} requests of the records failed and are left out, whatever work they were")
    for name, own in found["error_left"].items():
        if own["median"] is not None and own["median"] > _FAR:
            words.append(
                f"after the fit {name.removesuffix('_s').upper()} is still {own['median']:.0%} off in the middle: is "
                "this the fleet that was measured?"
            )
    return [f"calibration: {one}" for one in words]
