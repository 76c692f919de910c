"""Whether what came out can be so: what contradicts itself, or the datasheet, is said in words.

- *Less served than offered.* Of the requests that are not rejected, fewer are admitted than arrive in the later half of
  the time in which requests arrive, by more than 5 % and by more than three standard deviations of a Poisson count:
  the queue grows, and no ramp at the start explains it. Yet no resource would have been busy for 90 % of the time in
  which any request waited, had it done all its work of the whole run in that time: an upper bound, so that the end of
  a run, when the last requests leave their replicas idle, raises no false alarm. Then memory for KV, the limits of a
  batch, waits of one resource for another, or uneven replicas bound the run, not a resource's speed. Closed sessions
  offer what is served, and are not asked.
- *A link above its bandwidth.* More bytes crossed it than the datasheet lets it carry in the makespan, or it was busy
  for longer than that.
- *A time below the datasheet's floor.* A token that came sooner than the weights it multiplies can be read from HBM, or
  a prompt that took less than its products with the weights, at the datasheet's rates.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvsim.hardware.catalogue import Gpu, gpu_names, load_gpu
from kvsim.scenario.setup import Setup
from kvsim.text.units import format_bytes, format_s

_FEWEST = 20  # requests in half of a trace, below which a rate says little
_UNSERVED, _DEVIATIONS = 0.05, 3.0
_BUSY = 0.9
_ROUNDING = 1e-3


class Limits(NamedTuple):
    """What the datasheets of a cluster allow at the most: none of it depends on how the simulator prices anything."""

    prompt_token_s: float  # of a replica's GPUs for a prompt's token: its products with weights alone
    decode_step_s: float  # to read the weights that one token multiplies
    link_Bps: dict[str, float]  # of all GPUs together


def limits_of(setup: Setup) -> Limits | None:
    """The limits of a setup; None for a GPU whose datasheet is not in the catalogue."""
    gpu = _datasheet(setup.gpu)
    if gpu is None:
        return None
    model, rates = setup.rank, gpu.rates
    prompt_token_s = read_bytes = 0.0
    for layer in model.layers:
        share = layer.share_run(1)
        products_s = sum(2 * params / rates.product_flops(dtype) for dtype, params in model.products(layer) if params)
        prompt_token_s += share * products_s
        read_bytes += share * model.layer_bytes_touched(layer, 1)
    gpus = setup.replicas * setup.pp * setup.tp
    links = {"hbm->sm": rates.hbm_Bps, "ddr->hbm": rates.pcie_h2d_Bps, "hbm->ddr": rates.pcie_d2h_Bps}
    return Limits(
        prompt_token_s=prompt_token_s / setup.pp,  # its chunks may be in all stages at a time
        decode_step_s=read_bytes / rates.hbm_Bps,
        link_Bps={link: gpus * link_Bps for link, link_Bps in links.items()},
    )


def _datasheet(gpu: Gpu) -> Gpu | None:
    if gpu.name not in gpu_names():
        return None
    found = load_gpu(f"{gpu.name}@datasheet")
    return found if (found.memory_bytes, found.sms) == (gpu.memory_bytes, gpu.sms) else None  # or a file of that name


def warnings_of(
    *,
    inputs: Mapping[str, Any],
    requests: Mapping[str, NDArray[Any]],
    gaps: tuple[NDArray[Any], NDArray[Any]],
    links: Mapping[str, Mapping[str, float]],
    busy: Mapping[str, float],
    makespan_s: float,
    limits: Limits | None,
) -> list[str]:
    """What cannot be so of a result, each in a sentence; `gaps` are inter-token latencies in s and their counts."""
    found = [_served_less(inputs, requests, busy, makespan_s)]
    found += [_beyond_bandwidth(name, own, makespan_s, limits) for name, own in links.items()]
    if limits is not None:
        found += [_token_too_soon(gaps, limits), _prompt_too_soon(requests, limits)]
    return [text for text in found if text]


def _served_less(
    inputs: Mapping[str, Any], requests: Mapping[str, NDArray[Any]], busy: Mapping[str, float], makespan_s: float
) -> str:
    offered = requests["status"] != "rejected"
    if inputs.get("sessions") == "closed" or not offered.any():
        return ""
    arrival_s, admitted_s = (requests[name][offered] for name in ("arrival_s", "admitted_s"))
    begin_s = float(arrival_s.min())
    end_s = min(float(arrival_s.max()), begin_s + makespan_s)
    half_s = (end_s - begin_s) / 2
    come, served = (int(((t > begin_s + half_s) & (t <= end_s)).sum()) for t in (arrival_s, admitted_s))
    if come < _FEWEST or come - served <= max(_UNSERVED * come, _DEVIATIONS * math.sqrt(come)):
        return ""
    left_s = np.fmin(admitted_s, requests["timed_out_s"][offered]) if "timed_out_s" in requests else admitted_s
    waited_s = _time_in_any(arrival_s, np.nan_to_num(left_s, nan=math.inf), begin_s + makespan_s)
    shares = {name: own * makespan_s / waited_s for name, own in busy.items()}
    shares["compute and hbm together"] = shares.get("compute", 0.0) + shares.get("hbm", 0.0)
    most = max(shares, key=shares.__getitem__)
    if shares[most] >= _BUSY:
        return ""
    return (
        f"less is served than offered: {come / half_s:.3g} requests/s arrive in the later half of the trace and "
        f"{served / half_s:.3g} are admitted, yet no resource is busy for {_BUSY:.0%} of the time in which requests "
        f"wait (the most, {most}: {shares[most]:.1%}); memory for KV, the limits of a batch, launches, waits of one "
        "resource for another or uneven replicas bound it"
    )


def _time_in_any(begin_s: NDArray[Any], end_s: NDArray[Any], last_s: float) -> float:
    """Seconds until `last_s` that lie in any of the intervals."""
    order = np.argsort(begin_s, kind="stable")
    begins, ends = np.minimum(begin_s[order], last_s), np.minimum(end_s[order], last_s)
    reached = np.maximum.accumulate(ends)
    return float(reached[-1] - begins[0] - np.maximum(begins[1:] - reached[:-1], 0).sum())


def _beyond_bandwidth(link: str, figures: Mapping[str, float], makespan_s: float, limits: Limits | None) -> str:
    if figures["utilization"] > 1 + _ROUNDING:
        return f"a link above its bandwidth: {link} is busy for {figures['utilization']:.1%} of the time"
    most_Bps = math.inf if limits is None else limits.link_Bps.get(link, math.inf)
    if figures["bytes"] > most_Bps * makespan_s * (1 + _ROUNDING):
        return (
            f"a link above its bandwidth: {format_bytes(figures['bytes'])} crossed {link} in {format_s(makespan_s)}, "
            f"and the datasheet lets {format_bytes(most_Bps * makespan_s)} cross"
        )
    return ""


def _token_too_soon(gaps: tuple[NDArray[Any], NDArray[Any]], limits: Limits) -> str:
    seconds = gaps[0][gaps[1] > 0]
    if not len(seconds) or seconds.min() >= limits.decode_step_s * (1 - _ROUNDING):
        return ""
    return (
        f"a time below the datasheet's floor: a token came {format_s(float(seconds.min()))} after the one before, and "
        f"reading the weights that it multiplies takes {format_s(limits.decode_step_s)}"
    )


def _prompt_too_soon(requests: Mapping[str, NDArray[Any]], limits: Limits) -> str:
    floor_s = (requests["prompt_tokens"] - requests["cached_tokens"]) * limits.prompt_token_s
    took_s = requests["first_token_s"] - requests["admitted_s"]
    sooner = np.flatnonzero(took_s < floor_s * (1 - _ROUNDING))  # never where there is no first token
    if not len(sooner):
        return ""
    first = int(sooner[0])
    return (
        f"a time below the datasheet's floor: {len(sooner):,} prompts took less than their products with the weights, "
        f"request {requests['request'][first]} with {format_s(float(took_s[first]))} in place of at least "
        f"{format_s(float(floor_s[first]))}"
    )
