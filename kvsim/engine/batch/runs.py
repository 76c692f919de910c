"""Runs of decode iterations in closed form: durations that grow evenly, piece by piece, between two events.

Between two events every amount of a batch grows linearly, each operation's time is a maximum of linear functions, and
the makespan adds and maximises those: a convex function of the iteration. So it is linear on an interval as soon as one
inner point lies on the chord, and the run is split exactly where that fails.
"""

import math

from kvsim.engine.batch.decoding import advance
from kvsim.engine.batch.load import decoding_alone
from kvsim.engine.batch.memory import used
from kvsim.engine.batch.preemption import below_max_num_seqs
from kvsim.engine.batch.pricing import price_batch
from kvsim.engine.batch.scheduling import next_ready_s
from kvsim.engine.books.replica import charge_model, charge_plans, emit, gap, note, note_now
from kvsim.engine.pipeline import charge_circulation, circulate, note_exits, share_stages
from kvsim.engine.requests.tenants import steps_until_overtaken, steps_within_quotas
from kvsim.engine.speculation import charge_guesses, guess
from kvsim.engine.state.cluster import (
    COUNT,
    DDR,
    DECODING,
    EVERYBODY,
    HBM,
    MOST_PARTS,
    RUNNING,
    Cluster,
    Floats,
    Prices,
    Record,
    Records,
)
from kvsim.iteration.busy import BUSY, BY_SWAP

MOST_STEPS = 4096  # iterations charged at once
ON_CHORD = 1e-7  # relative distance from the chord that counts as none: settled layers are extrapolated to 1e-9


def begin_run(cluster: Cluster, prices: Prices, number: int, now_s: float) -> None:
    """Decode until a sequence ends or changes, or memory runs out. May make detours."""
    replica = cluster.replicas[number]
    steps = min(MOST_STEPS, replica["next_due"] - replica["iteration"])
    for tier in (HBM, DDR):
        growth = replica["growth_bytes"][tier]
        if growth > 0:
            steps = min(steps, (cluster.world["capacity_bytes"][tier] - used(replica, tier)) // growth + 1)
    steps = steps_within_quotas(cluster, number, steps)
    if replica["batch_tokens"] > 0 and below_max_num_seqs(cluster, replica):
        steps = steps_until_overtaken(cluster, number, steps)
    share_stages(cluster, prices, number)
    replica["n_parts"] = split(cluster, prices, number, steps)
    note_now(cluster, number, now_s)
    replica["run_stall_s"], replica["stall_s"] = replica["stall_s"], 0.0
    replica["decoding_now"] = replica["length"][DECODING]
    replica["cut"] = 0
    replica["phase"], replica["began_s"] = RUNNING, now_s
    replica["end_s"] = now_s + run_s(cluster.parts[number], replica)
    replica["wake_s"] = min(replica["end_s"], next_ready_s(cluster, replica, now_s))


def end_run(cluster: Cluster, prices: Prices, number: int, now_s: float) -> None:
    """Book a run that is over."""
    replica, parts = cluster.replicas[number], cluster.parts[number]
    decoding, steps = replica["decoding_now"], charge_busy(parts, replica)
    replica["busy_s"][BY_SWAP] += replica["run_stall_s"]
    sums = cluster.sums
    for structure in range(sums.shape[1]):
        if sums[number, structure, 0, COUNT]:
            charge_plans(cluster.world, replica, prices, structure, sums[number, structure, 0], steps)
            charge_plans(
                cluster.world, replica, prices, structure, sums[number, structure, 1], steps * (steps - 1) // 2
            )
    if cluster.world["stages"] == 1:
        tokens = decoding * cluster.world["step_tokens"]
        charge_model(cluster.world, replica, prices, steps, tokens, tokens)
        charge_guesses(cluster.world, replica, steps, decoding, 0)
    else:
        charge_circulation(cluster.world, replica, prices, steps, decoding)
        last = parts[replica["n_parts"] - 1]
        note_exits(cluster.world, replica, now_s, last["first_s"] + (last["steps"] - 1) * last["slope_s"])
    note(cluster, number, now_s, steps - 1)
    whole = 0
    if replica["run_stall_s"] > 0 or replica["late"]:
        emit(cluster, number, replica["run_stall_s"] + parts[0]["first_s"])
        whole = 1  # the first iteration has been recorded by itself
    for i in range(replica["n_parts"]):
        first_s, slope_s = parts[i]["first_s"], parts[i]["slope_s"]
        gap(cluster, number, EVERYBODY, first_s + whole * slope_s, slope_s, parts[i]["steps"] - whole, decoding)
        whole = 0
    advance(cluster, number, steps)


def cut_run(cluster: Cluster, number: int, now_s: float) -> None:
    """End the run under way at the next boundary of its iterations."""
    replica, parts = cluster.replicas[number], cluster.parts[number]
    replica["cut"] = 1
    if now_s < replica["end_s"]:
        shorten(parts, replica, steps_by(parts, replica, now_s - replica["began_s"]))
        replica["end_s"] = max(now_s, replica["began_s"] + run_s(parts, replica))
    replica["wake_s"] = replica["end_s"]


def split(cluster: Cluster, prices: Prices, number: int, steps: int) -> int:
    """Set the parts of a run of at most `steps` iterations; prices are asked only where the slope changes.

    Spans that may not lie on a line wait after the parts, the earliest last. Returns the number of parts. May make
    detours.
    """
    parts, n, open_spans = cluster.parts[number], 0, 1
    span = parts[MOST_PARTS]
    span["low"], span["steps"] = 0, steps
    span["first_s"] = _price_step(cluster, prices, number, 0, span["busy_s"])
    span["last_s"] = _price_step(cluster, prices, number, steps - 1, span["last_busy_s"])
    while open_spans and n < MOST_PARTS:
        span, part = parts[MOST_PARTS + open_spans - 1], parts[n]
        rise = span["steps"] - 1
        slope_s = (span["last_s"] - span["first_s"]) / max(1, rise)
        if rise > 1:
            half = rise // 2
            half_s = _price_step(cluster, prices, number, span["low"] + half, part["last_busy_s"])
            if abs(half_s - (span["first_s"] + slope_s * half)) > ON_CHORD * half_s:
                _copy(span, parts[MOST_PARTS + open_spans])
                first = parts[MOST_PARTS + open_spans]
                first["steps"], first["last_s"] = half + 1, half_s
                for i in range(len(BUSY)):
                    first["last_busy_s"][i] = part["last_busy_s"][i]
                span["low"] += half + 1
                span["steps"] -= half + 1
                span["first_s"] = _price_step(cluster, prices, number, span["low"], span["busy_s"])
                open_spans += 1
                continue
        _copy(span, part)
        part["slope_s"] = slope_s
        for i in range(len(BUSY)):
            part["busy_slope_s"][i] = (part["last_busy_s"][i] - part["busy_s"][i]) / max(1, rise)
        n += 1
        open_spans -= 1
    return n


def _copy(span: Record, part: Record) -> None:
    part["low"], part["steps"] = span["low"], span["steps"]
    part["first_s"], part["last_s"] = span["first_s"], span["last_s"]
    for i in range(len(BUSY)):
        part["busy_s"][i], part["last_busy_s"][i] = span["busy_s"][i], span["last_busy_s"][i]


def _price_step(cluster: Cluster, prices: Prices, number: int, step: int, busy: Floats) -> float:
    """Seconds of the decode iteration after the next `step`; sets the seconds of each of BUSY."""
    replica, world, batch = cluster.replicas[number], cluster.world, decoding_alone(cluster, number, step)
    if world["stages"] > 1:
        return circulate(cluster, prices, number, batch.loads, busy)
    seconds = price_batch(world, prices, batch, 1.0, 0, cluster.stages[number, 0]["sharing"], busy)
    return seconds + guess(world, busy, replica["length"][DECODING], 0)


def part_s(part: Record, steps: int) -> float:
    """Time of the first `steps` iterations of a part."""
    return float(steps * part["first_s"] + part["slope_s"] * (steps * (steps - 1) // 2))


def run_s(parts: Records, replica: Record) -> float:
    """Time of a run."""
    seconds = replica["run_stall_s"]
    for i in range(replica["n_parts"]):
        seconds += part_s(parts[i], parts[i]["steps"])
    return float(seconds)


def charge_busy(parts: Records, replica: Record) -> int:
    """Book the seconds of each of BUSY; the iterations of the run."""
    steps = 0
    for i in range(replica["n_parts"]):
        n = parts[i]["steps"]
        steps += n
        for j in range(len(BUSY)):
            growth_s = (n * (n - 1) // 2) * parts[i]["busy_slope_s"][j]
            replica["busy_s"][j] += n * parts[i]["busy_s"][j] + growth_s
    return int(steps)


def shorten(parts: Records, replica: Record, steps: int) -> None:
    """Keep the first iterations of a run, at least one."""
    kept = 0
    while steps > 0:
        parts[kept]["steps"] = min(steps, parts[kept]["steps"])
        steps -= parts[kept]["steps"]
        kept += 1
    replica["n_parts"] = kept


def steps_by(parts: Records, replica: Record, seconds: float) -> int:
    """The iterations of a run that are done, or under way, `seconds` after its start: at least one."""
    left_s, done = seconds - replica["run_stall_s"], 0
    for i in range(replica["n_parts"]):
        part = parts[i]
        whole_s = part_s(part, part["steps"])
        if left_s > whole_s:
            left_s -= whole_s
            done += part["steps"]
            continue
        if left_s <= part["first_s"]:
            return int(done + 1)
        steps = min(part["steps"], max(1, _root(part, left_s)))
        while steps > 1 and part_s(part, steps - 1) >= left_s:
            steps -= 1
        while part_s(part, steps) < left_s:
            steps += 1
        return int(done + steps)
    return int(done)


def _root(part: Record, seconds: float) -> int:
    """About how many iterations of a part take `seconds`: the root of its time, in the form that cancels no digits."""
    half = part["slope_s"] / 2
    linear = part["first_s"] - half
    return int(2 * seconds / (linear + math.sqrt(max(0.0, linear * linear + 4 * half * seconds))))
