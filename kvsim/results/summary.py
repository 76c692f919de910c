"""What a simulation gives, and the summary of it that `summary.json` holds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvsim.results.causes import attribution, bottleneck
from kvsim.results.crowding import crowding
from kvsim.results.fairness import Tenancy, fairness
from kvsim.results.identity import identity
from kvsim.results.token_gaps import TenantGaps
from kvsim.results.truth import Limits, warnings_of
from kvsim.results.uncertainty import over_blocks, over_seeds
from kvsim.scenario.choices import LATENCIES
from kvsim.text.names import unknown_name

SCHEMA_VERSION = 1

Array: TypeAlias = NDArray[Any]
Floats: TypeAlias = NDArray[np.float64]
Mask: TypeAlias = NDArray[np.bool_]
Statistics: TypeAlias = dict[str, float | None]
"""`mean`, `p50`, `p90`, `p99` and `max` of a sample; all None when it is empty."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """One finished simulation.

    `requests` are columns with one row per submitted request, in the trace's order: request, tenant, session, replica,
    arrival_s, admitted_s, first_token_s, finish_s (NaN for what did not happen), prompt_tokens, cached_tokens,
    output_tokens, preemptions, status (`finished`, `rejected`, `timed_out` or `unfinished`), and seconds by cause
    (`kvsim.results.causes.columns`); where replicas either process prompts or decode, `replica` is the one that
    decoded, and prefill_replica the other. With timeouts there is timed_out_s as well, when a request left.
    `series` are columns with one row per iteration boundary of a replica: time_s (ascending for each replica), replica,
    hbm_bytes, ddr_bytes, running, waiting. Values change linearly between rows; two rows of one time are a jump.
    """

    inputs: dict[str, Any]  # everything resolved: trace, model, gpu, host, policy (its text), options, versions
    requests: dict[str, Array]
    token_gaps: tuple[Array, Array]  # inter-token latencies: seconds, and how many tokens waited as long
    series: dict[str, Array]
    preempted: dict[str, Array]  # request, from_s, to_s: while it was swapped out or to be recomputed
    memory: dict[str, dict[str, float]]  # node -> capacity_bytes, peak_bytes, mean_bytes
    links: dict[str, dict[str, float]]  # "src->dst" -> bytes, busy_s, utilization
    traffic: dict[str, dict[str, int]]  # link -> bytes by cause, which add up to the link's bytes
    cache: dict[str, dict[str, int]]  # tier -> lookup_blocks, hit_blocks
    swaps: dict[str, int]  # count, bytes
    recomputed: dict[str, int]  # count of preempted sequences that began anew, tokens computed once more
    busy: dict[str, float]  # resource -> share of the makespan, mean over replicas
    makespan_s: float
    wall_s: float
    cpu_s: float
    setup_cpu_s: float
    tenancy: Tenancy = field(default_factory=Tenancy)
    tenant_gaps: TenantGaps | None = None  # of each of several; None: not recorded
    session_kv: dict[str, int] = field(default_factory=dict)  # states kept, swapped, dropped, evicted, resumed
    # Of a window, in order of replica, lane and time: replica, lane, operation, layer, begin_s, end_s.
    operations: dict[str, Array] | None = None
    # Where tokens are guessed: how many a decode step emits in the mean and emitted, steps of sequences, the draft's
    # bytes of weights and of KV for each token, all ranks together.
    speculation: dict[str, float] | None = None
    limits: Limits | None = None  # of the datasheets, which nothing may exceed; None: not known
    # The same run on traces of other seeds; () where the trace is recorded, None where nobody asked.
    repeats: "tuple[Result, ...] | None" = None
    partial: bool = False  # interrupted: some requests were not replayed to their end


def latencies(result: Result) -> dict[str, Floats]:
    """The four `LATENCIES` in seconds, one value per submitted request, NaN where a request has none.

    `tpot_s` is the mean time per output token after the first, so a request of one output token has none.
    """
    columns = result.requests
    arrival_s, first_token_s, finish_s = (columns[name] for name in ("arrival_s", "first_token_s", "finish_s"))
    later_tokens = columns["output_tokens"].astype(np.int64) - 1
    tpot_s = np.full(len(arrival_s), np.nan)
    np.divide(finish_s - first_token_s, later_tokens, out=tpot_s, where=later_tokens > 0)
    return {
        "ttft_s": first_token_s - arrival_s,
        "tpot_s": tpot_s,
        "e2e_s": finish_s - arrival_s,
        "queue_s": columns["admitted_s"] - arrival_s,
    }


def finished(result: Result) -> Mask:
    """Which of the submitted requests finished."""
    return np.asarray(result.requests["status"] == "finished")


def statistics(values: Array, weights: Array | None = None) -> Statistics:
    """Mean, nearest-rank percentiles and maximum of a sample, in which value i counts `weights[i]` times (or once).

    The p-th percentile is the smallest value that at least p % of the sample does not exceed: always one that occurred.
    """
    counts = np.ones(len(values), np.int64) if weights is None else np.asarray(weights, np.int64)
    present = counts > 0
    values, counts = np.asarray(values, np.float64)[present], counts[present]
    if not len(values):
        return dict.fromkeys(("mean", "p50", "p90", "p99", "max"))
    order = np.argsort(values)
    values, counts = values[order], counts[order]
    ranks = np.cumsum(counts)
    total = int(ranks[-1])

    def percentile(percent: int) -> float:
        rank = -(-total * percent // 100)  # in integers, because 0.07 * 100 is more than 7
        return float(values[np.searchsorted(ranks, rank)])

    mean = float((values * counts).sum() / total)
    return {"mean": mean, **{f"p{p}": percentile(p) for p in (50, 90, 99)}, "max": float(values[-1])}


def summarize(result: Result, slo: Mapping[str, float] | None = None, warmup_s: float = 0.0) -> dict[str, Any]:
    """The content of `summary.json`, in plain Python values without NaN.

    `tokens` and rates count finished requests. `slo` bounds latencies of each request whose tenant has no SLO class, as
    {"ttft_s": 10, "tpot_s": 0.1}; `goodput_rps` counts the finished requests within all bounds, and a request without
    the latency (a TPOT, for one output token) is within; `slo_attainment` is their share of all that were submitted,
    also of those that were rejected or timed out. `warmup_s` leaves requests that arrived earlier out of the
    latencies (`itl_s`, which knows no requests, keeps all tokens). `run_id`, `inputs_sha256` and `version` stand in all
    files of the run, and only its last three figures, the simulator's own times, differ between two runs of the same
    inputs. Raises ValueError for an unknown bound and for
    negative numbers.
    """
    slo = _checked(slo or {}, warmup_s)
    tenants, members = np.unique(result.requests["tenant"].astype(str), return_inverse=True)
    names = [str(name) for name in tenants]
    bounds = [result.tenancy.bounds(name, slo) for name in names]
    outcome = _outcome(result, bounds, members, warmup_s)
    everything = _group(result, outcome, np.arange(len(outcome.finished)), statistics(*result.token_gaps))
    # Sorted by tenant, so that each one's requests are a run of rows, however many tenants there are.
    rows = np.split(np.argsort(members, kind="stable"), np.cumsum(np.bincount(members))[:-1]) if len(members) else []
    fair = fairness(result.requests, names, members, result.tenancy)
    served = fair.pop("tenants")
    summary = {
        "partial": result.partial,
        "inputs": plain(result.inputs),
        **everything,
        "makespan_s": float(result.makespan_s),
        "fairness": fair,
        "tenants": {
            name: {
                **_group(result, outcome, own, _tenant_itl_s(result, name, len(names))),
                **_terms(result.tenancy, name, within),
                **served[name],
            }
            for name, own, within in zip(names, rows, bounds, strict=True)
        },
        "memory": plain(result.memory),
        "links": plain(result.links),
        "traffic": plain(result.traffic),
        "cache": plain(result.cache),
        "swaps": plain(result.swaps),
        "preemptions": _preemptions(result),
        "session_kv": plain(result.session_kv),
        "busy": plain(result.busy),
        "bottleneck": bottleneck(everything["attribution"]["e2e"]["mean_s"]),
        "warnings": _warnings(result),
        **({} if result.speculation is None else {"speculation": plain(result.speculation)}),
        "uncertainty": _uncertainty(result, outcome, slo, warmup_s),
        "wall_s": float(result.wall_s),
        "cpu_s": float(result.cpu_s),
        "setup_cpu_s": float(result.setup_cpu_s),
    }
    return {"schema_version": SCHEMA_VERSION, **identity(summary), **summary}


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: numpy values become Python's, NaN and infinities None, other objects text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _warnings(result: Result) -> list[str]:
    found = warnings_of(
        inputs=result.inputs,
        requests=result.requests,
        gaps=result.token_gaps,
        links=result.links,
        busy=result.busy,
        makespan_s=result.makespan_s,
        limits=result.limits,
    )
    return [*found, *filter(None, [crowding(result.requests)])]


def _preemptions(result: Result) -> dict[str, int]:
    """How often sequences made room, whatever became of them later; by swap are those that kept their state in DDR."""
    count, anew = int(result.requests["preemptions"].sum()), int(result.recomputed["count"])
    tokens = int(result.recomputed["tokens"])
    return {"count": count, "by_swap": count - anew, "by_recomputation": anew, "recomputed_tokens": tokens}


def _uncertainty(
    result: Result, outcome: "_Outcome", slo: Mapping[str, float] | None, warmup_s: float
) -> dict[str, Any] | None:
    if result.repeats is None:
        return None
    if result.repeats:
        runs = (replace(result, repeats=None), *result.repeats)
        return over_seeds([summarize(run, slo, warmup_s) for run in runs], (*LATENCIES, "itl_s"))
    columns = result.requests
    arrival_s = columns["arrival_s"]
    per_step = result.speculation["emitted_per_step"] if result.speculation else 1  # tokens, of which one is waited for
    later_tokens = np.where(outcome.finished, columns["output_tokens"] - 1, 0)
    decoding_s = per_step * np.where(outcome.finished, columns["finish_s"] - columns["first_token_s"], 0.0)
    order = np.argsort(arrival_s, kind="stable")[: len(arrival_s) - int(np.isnan(arrival_s).sum())]
    return over_blocks(
        arrival_s[order],
        result.makespan_s,
        np.where(outcome.finished, columns["output_tokens"], 0)[order],
        outcome.good[order],
        {name: np.where(outcome.measured, values, np.nan)[order] for name, values in outcome.latencies.items()},
        (decoding_s[order], later_tokens[order]),
        int(result.inputs["seed"]),
    )


class _Outcome(NamedTuple):
    """What became of each request: one value per row of the request table."""

    finished: Mask
    measured: Mask  # finished, and arrived after the warm-up
    good: Mask  # finished within the SLO
    latencies: dict[str, Floats]


def _outcome(result: Result, bounds: Sequence[Mapping[str, float]], members: Array, warmup_s: float) -> _Outcome:
    """`bounds` are those of each tenant, and `members` say which one's a row is."""
    done, times = finished(result), latencies(result)
    good = done.copy()
    for name, values in times.items():
        limits = np.array([own.get(name, math.inf) for own in bounds])
        good &= ~(values > limits[members])  # NaN, no such latency, exceeds nothing
    return _Outcome(done, done & (result.requests["arrival_s"] >= warmup_s), good, times)


def _group(result: Result, outcome: _Outcome, rows: NDArray[np.intp], itl_s: Statistics) -> dict[str, Any]:
    """The counts, rates and latencies of the requests in `rows`."""
    columns = result.requests
    done = rows[outcome.finished[rows]]
    measured = rows[outcome.measured[rows]]
    output_tokens, good = int(columns["output_tokens"][done].sum()), int(outcome.good[rows].sum())
    times = {name: values[measured] for name, values in outcome.latencies.items()}
    spread = {name: statistics(values[~np.isnan(values)]) for name, values in times.items()}
    return {
        "requests": {
            "submitted": len(rows),
            "finished": len(done),
            "rejected": int((columns["status"][rows] == "rejected").sum()),
            "timed_out": int((columns["status"][rows] == "timed_out").sum()),
        },
        "tokens": {
            "prompt": int(columns["prompt_tokens"][done].sum()),
            "output": output_tokens,
            "prompt_cached": int(columns["cached_tokens"][done].sum()),
        },
        "output_tokens_per_s": _per_s(output_tokens, result.makespan_s),
        "goodput_rps": _per_s(good, result.makespan_s),
        "slo_attainment": good / len(rows) if len(rows) else None,
        "ttft_s": spread["ttft_s"],
        "tpot_s": spread["tpot_s"],
        "itl_s": dict(itl_s),
        "e2e_s": spread["e2e_s"],
        "queue_s": spread["queue_s"],
        "attribution": attribution(columns, measured),
    }


def _tenant_itl_s(result: Result, name: str, tenants: int) -> Statistics:
    """Inter-token latencies of a tenant: all of them where there is no other."""
    if tenants == 1:
        return statistics(*result.token_gaps)
    return statistics(*result.tenant_gaps.of(name)) if result.tenant_gaps else statistics(np.empty(0))


def _terms(tenancy: Tenancy, name: str, bounds: Mapping[str, float]) -> dict[str, Any]:
    """What was agreed with a tenant, and the most HBM that its sequences held at a replica where that is counted."""
    terms = tenancy.of(name)
    return {
        "weight": float(terms.weight),
        "priority": terms.priority,
        "quota": float(terms.quota),
        "slo_class": terms.slo_class,
        "slo": dict(bounds),
        "kv_peak_bytes": tenancy.kv_peak_bytes.get(name),
    }


def _per_s(count: int, makespan_s: float) -> float | None:
    return float(count / makespan_s) if makespan_s > 0 else None


def _checked(slo: Mapping[str, float], warmup_s: float) -> Mapping[str, float]:
    """`slo`, when its bounds and `warmup_s` are what `summarize` takes."""
    if not (math.isfinite(warmup_s) and warmup_s >= 0):
        raise ValueError(f"warmup_s={warmup_s:g} must be a finite number of seconds >= 0")
    for name, bound_s in slo.items():
        if name not in LATENCIES:
            raise unknown_name("SLO bound", name, LATENCIES)
        if not bound_s > 0:
            raise ValueError(f"the SLO bound {name}={bound_s:g} must be greater than 0 seconds")
    return slo
