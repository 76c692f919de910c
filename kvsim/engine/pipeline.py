"""Iterations on a pipeline of stages: how a batch's micro-batches follow one another, how long that takes, what moves.

A micro-batch enters a stage when its activations have come and the stage has done with the one before. Chunks of
prompts need nothing from the end of the pipeline, so they follow at once, also those of the next iteration; sequences
that decode enter again when their token is out. Of many equal decode iterations each takes as long as all micro-batches
on the slowest stage, or one of them through all stages.
"""

from kvsim.engine.batch.crowd import LARGE, SMALL, WORK
from kvsim.engine.batch.hops import charge_sends, hop_s, send_s
from kvsim.engine.batch.load import Scheduled, decoding_alone, prompt_tokens, scheduled, share_of
from kvsim.engine.batch.meeting import BEGIN, END, begin_to_meet, clear_stages, meet, uses_host
from kvsim.engine.batch.pricing import price_batch
from kvsim.engine.books.causes import note_shared
from kvsim.engine.books.replica import charge_loads, charge_model
from kvsim.engine.features import needs
from kvsim.engine.speculation import charge_guesses, guess
from kvsim.engine.state.cluster import (
    DECODING,
    NOBODY,
    PREFILLING,
    Cluster,
    Floats,
    Ints,
    Prices,
    Record,
)
from kvsim.hardware.machine import D2H, H2D, HOST_LANES
from kvsim.iteration.busy import BOUND, BUSY, BY_CPU, BY_NVLINK, BY_PCIE

LAPS = 4  # rounds of micro-batches after which they follow one another as they will


@needs("pipeline", otherwise=(0, 0.0))
def price_round(cluster: Cluster, prices: Prices, number: int, now_s: float) -> tuple[int, float]:
    """The micro-batches that an iteration has, and its seconds; sets `round_busy_s`. May make detours.

    As many as there are stages, or one where nobody decodes and that is out earlier: each of them reads all weights.
    Where nobody else is about, sequences decode in as many as in a run.
    """
    decoding, prompts = cluster.replicas[number]["length"][DECODING], prompt_tokens(cluster, number)
    split = int(min(cluster.world["stages"], max(decoding, prompts)))
    if not prompts:
        split = micro_batches(cluster.world, decoding)
    whole_s = 0.0
    if not decoding:
        _, whole_s = _settled(cluster, prices, number, now_s, 1)
    seconds, last_s = _settled(cluster, prices, number, now_s, split)
    if last_s <= whole_s or decoding:
        return split, seconds
    seconds, _ = _settled(cluster, prices, number, now_s, 1)
    return 1, seconds


def _settled(cluster: Cluster, prices: Prices, number: int, now_s: float, parts: int) -> tuple[float, float]:
    """What `_pass` says once the stages know how they meet on their host. May make detours."""
    for _ in range(begin_to_meet(cluster, number, parts)):
        seconds, _ = _pass(cluster, prices, number, now_s, parts)
        if not uses_host(cluster, number):
            break
        meet(cluster, number, seconds, parts, 0)
    return _pass(cluster, prices, number, now_s, parts)


def _pass(cluster: Cluster, prices: Prices, number: int, now_s: float, parts: int) -> tuple[float, float]:
    """Let an iteration pass in so many micro-batches; its seconds, and when the last is out. May make detours.

    Sets `round_busy_s`, when stages are free (`stage_s`) and when micro-batches are out (`exit_s`).
    """
    world, replica = cluster.world, cluster.replicas[number]
    follows = replica["round_end_s"] == now_s  # at once after another iteration
    world["ready_s"] = ready_s = _ready_s(cluster, number) if follows else now_s
    _clear(world["round_busy_s"])
    clear_stages(cluster, number)
    for stage in range(world["stages"]):
        world["stage_s"][stage] = replica["stage_free_s"][stage]
    decoding, ends, tokens, work_s = replica["length"][DECODING], 0, 0, 0.0
    for part in range(parts):
        batch = scheduled(cluster, number, part, parts)
        tokens = batch.tokens
        decodes = share_of(decoding, part + 1, parts) - share_of(decoding, part, parts)
        prompts = tokens - decodes * world["step_tokens"]
        ends += batch.logits - (tokens - prompts)
        at_s = ready_s if prompts else 0.0
        if decodes:
            out_s = replica["exit_s"][max(0, replica["parts"] - parts + part)]
            at_s = max(at_s, out_s if follows and replica["parts"] else now_s)
        for stage in range(world["stages"]):
            if stage:
                at_s += hop_s(world, stage, tokens)
            seconds = _price_stage(cluster, prices, number, batch, 1.0, (stage, SMALL, 1), world["round_busy_s"])
            if stage == world["stages"] - 1:
                guess_s = guess(world, world["round_busy_s"], decodes, prompts)
                seconds += guess_s
                cluster.stages[number, stage]["tail_s"] += guess_s
            cluster.spans[BEGIN, stage, part] = max(at_s, world["stage_s"][stage])
            at_s = max(at_s, world["stage_s"][stage]) + seconds
            cluster.spans[END, stage, part] = at_s - cluster.stages[number, stage]["tail_s"]
            world["stage_s"][stage] = at_s
            work_s += seconds
        world["exit_s"][part] = at_s
    last_s = world["exit_s"][parts - 1]
    emits = decoding > 0 or ends > 0
    seconds = max(0.0, (last_s if emits else world["stage_s"][0]) - now_s)
    sent_s = min(seconds, send_s(world, tokens)) if emits else 0.0
    _attribute(cluster, number, world["round_busy_s"], seconds, sent_s, work_s)
    return float(seconds), float(last_s)


def _ready_s(cluster: Cluster, number: int) -> float:
    """When the prompts of an iteration could have begun: with the one before if that was full and they had come."""
    replica, index = cluster.replicas[number], cluster.replicas[number]["first"][PREFILLING]
    if not replica["full"]:
        return float(replica["round_end_s"])
    while index != NOBODY:
        request = cluster.requests[index]
        loaded = request["prefix_s"] > 0 and request["ready_s"] > replica["round_begin_s"]
        late = request["arrival_s"] > replica["round_begin_s"] or request["preemptions"] > 0 or loaded
        if request["chunk_tokens"] and request["past_tokens"] in (0, request["cached_tokens"]) and late:
            return float(replica["round_end_s"])
        index = request["after"]
    return float(replica["round_begin_s"])


@needs("pipeline", otherwise=0.0)
def circulate(cluster: Cluster, prices: Prices, number: int, loads: Ints, busy: Floats) -> float:
    """Seconds of a decode iteration that computes these loads; sets the seconds of each of BUSY. May make detours.

    Each sequence is the mean of all, so that times stay convex in the step. A token takes the larger of all
    micro-batches on the slowest stage and one of the largest through all stages.
    """
    world, decoding = cluster.world, cluster.replicas[number]["length"][DECODING]
    parts = micro_batches(world, decoding)
    small, larger = decoding // parts, decoding % parts
    _clear(busy)
    clear_stages(cluster, number)
    slowest_s = through_s = work_s = 0.0
    for stage in range(world["stages"]):
        largest_s = whole_s = 0.0
        for size, times in ((small, parts - larger), (small + 1, larger)):
            if times:
                tokens = size * world["step_tokens"]
                batch, place = Scheduled(loads, tokens, tokens), (stage, LARGE if size > small else SMALL, times)
                largest_s = _price_stage(cluster, prices, number, batch, size / decoding, place, busy)
                if stage == world["stages"] - 1:
                    for _ in range(times):
                        guess_s = guess(world, busy, size, 0)
                    largest_s += guess_s
                    cluster.stages[number, stage]["tail_s"] += guess_s
                whole_s += times * largest_s
                cluster.stages[number, stage]["part_s"][place[1]] = largest_s
        slowest_s = max(slowest_s, whole_s)
        through_s += largest_s
        work_s += whole_s
    sent_s = send_s(world, (small + (larger > 0)) * world["step_tokens"])
    if through_s + sent_s <= slowest_s:
        _attribute(cluster, number, busy, slowest_s, 0.0, work_s)
        return float(slowest_s)
    _attribute(cluster, number, busy, through_s + sent_s, sent_s, work_s)
    return float(through_s + sent_s)


@needs("pipeline", otherwise=False)
def fills(cluster: Cluster, number: int, now_s: float) -> bool:
    """Whether sequences that decode alone would enter the first stage together: then the stages fill up first."""
    world, replica = cluster.world, cluster.replicas[number]
    if world["stages"] == 1:
        return False
    parts = micro_batches(world, replica["length"][DECODING])
    return bool(parts > 1 and (replica["round_end_s"] != now_s or replica["parts"] < parts))


def note_exits(world: Record, replica: Record, now_s: float, seconds: float) -> None:
    """Micro-batches of a decode iteration that ends now and took so long came out one after the other."""
    parts = micro_batches(world, replica["decoding_now"])
    for part in range(parts):
        replica["exit_s"][part] = now_s - (parts - 1 - part) * seconds / world["stages"]
    replica["parts"], replica["round_end_s"], replica["full"] = parts, now_s, 0


def micro_batches(world: Record, decoding: int) -> int:
    """How many micro-batches a decode iteration has: as few as there can be that are no larger than with all stages."""
    return int(-(-decoding // -(-decoding // world["stages"])))


@needs("pipeline")
def charge_round(cluster: Cluster, prices: Prices, number: int, now_s: float, seconds: float, parts: int) -> None:
    """Book an iteration that begins now, takes so long in so many micro-batches, and was the last to be priced."""
    world, replica = cluster.world, cluster.replicas[number]
    decoding = replica["length"][DECODING]
    for part in range(parts):
        batch = scheduled(cluster, number, part, parts)
        decodes = share_of(decoding, part + 1, parts) - share_of(decoding, part, parts)
        charge_loads(world, replica, prices, batch.loads)
        charge_model(world, replica, prices, 1, batch.tokens, batch.logits)
        charge_sends(world, replica, 1, batch.tokens)
        charge_guesses(world, replica, 1, decodes, batch.tokens - decodes * world["step_tokens"])
    for i in range(len(BUSY)):
        replica["busy_s"][i] += world["round_busy_s"][i]
    for stage in range(world["stages"]):
        replica["stage_free_s"][stage] = world["stage_s"][stage]
    for part in range(parts):
        replica["exit_s"][part] = world["exit_s"][part]
    note_shared(replica, world["round_busy_s"])
    replica["round_parts"], replica["parts"] = parts, parts if decoding else 0
    replica["round_begin_s"], replica["round_end_s"] = now_s, now_s + seconds
    replica["full"] = replica["batch_tokens"] <= 0


@needs("pipeline")
def charge_circulation(world: Record, replica: Record, prices: Prices, iterations: int, decoding: int) -> None:
    """Book the weights that decode iterations read, and the bytes of their collectives and activations."""
    parts = micro_batches(world, decoding)
    small, larger = decoding // parts, decoding % parts
    for times, sequences in ((iterations * (parts - larger), small), (iterations * larger, small + 1)):
        if not times:
            continue
        tokens = sequences * world["step_tokens"]
        charge_model(world, replica, prices, times, tokens, tokens)
        charge_sends(world, replica, times, tokens)
        charge_guesses(world, replica, times, sequences, 0)


@needs("pipeline")
def share_stages(cluster: Cluster, prices: Prices, number: int) -> None:
    """Before a run of a pipeline: let its stages know how they meet on their host. May make detours."""
    world = cluster.world
    if world["stages"] == 1:
        return
    parts = micro_batches(world, cluster.replicas[number]["length"][DECODING])
    for left in range(begin_to_meet(cluster, number, parts), -1, -1):
        batch = decoding_alone(cluster, number, 0)
        seconds = circulate(cluster, prices, number, batch.loads, world["round_busy_s"])
        if left == 0 or not uses_host(cluster, number):
            return
        lap(cluster, number, parts)
        meet(cluster, number, seconds, parts, int(cluster.replicas[number]["length"][DECODING]))


@needs("pipeline")
def delay_round(cluster: Cluster, number: int, now_s: float, left_s: float) -> None:
    """An iteration under way of which so much was left ends at another time: so does what is left on each stage."""
    world, replica = cluster.world, cluster.replicas[number]
    factor = (replica["wake_s"] - now_s) / left_s
    replica["round_end_s"] = replica["wake_s"]
    for i in range(world["stages"]):
        if replica["stage_free_s"][i] > now_s:
            replica["stage_free_s"][i] = now_s + factor * (replica["stage_free_s"][i] - now_s)
        if replica["exit_s"][i] > now_s:
            replica["exit_s"][i] = now_s + factor * (replica["exit_s"][i] - now_s)


@needs("pipeline")
def lap(cluster: Cluster, number: int, parts: int) -> None:
    """Let micro-batches of a decode iteration that has been priced go round until their times settle (`spans`)."""
    world, decoding = cluster.world, cluster.replicas[number]["length"][DECODING]
    small = decoding // parts
    for i in range(world["stages"]):
        world["stage_s"][i] = world["exit_s"][i] = 0.0
    for _ in range(LAPS):
        for part in range(parts):
            size, at_s = share_of(decoding, part + 1, parts) - share_of(decoding, part, parts), world["exit_s"][part]
            for stage in range(world["stages"]):
                own = cluster.stages[number, stage]
                if stage:
                    at_s += hop_s(world, stage, size * world["step_tokens"])
                begin_s = max(at_s, world["stage_s"][stage])
                at_s = begin_s + own["part_s"][LARGE if size > small else SMALL]
                cluster.spans[BEGIN, stage, part], cluster.spans[END, stage, part] = begin_s, at_s - own["tail_s"]
                world["stage_s"][stage] = at_s
            world["exit_s"][part] = at_s


def _price_stage(
    cluster: Cluster,
    prices: Prices,
    number: int,
    batch: Scheduled,
    share: float,
    place: tuple[int, int, int],
    total: Floats,
) -> float:
    """Seconds of a micro-batch, small or large, on a stage; adds what so many keep busy to a total and the stage's."""
    stage, kind, times = place
    world, own, busy = cluster.world, cluster.stages[number, stage], cluster.world["busy_s"]
    sharing = own["of_large"] if kind == LARGE else own["sharing"]
    seconds = price_batch(world, prices, batch, share, stage, sharing, busy)
    for i in range(len(BUSY)):
        total[i] += times * busy[i]
    pcie_s = busy[H2D] + busy[D2H]
    for i in range(len(HOST_LANES)):
        own["lane_s"][i] += times * busy[HOST_LANES[i]]
        if i == WORK:
            own["bound_s"][i] += times * busy[BY_CPU]
        elif pcie_s > 0:
            own["bound_s"][i] += times * busy[BY_PCIE] * (busy[HOST_LANES[i]] / pcie_s)
    own["tail_s"] = prices.head[batch.logits]["seconds"] if stage == world["stages"] - 1 else 0.0
    own["window_s"] += times * (seconds - own["tail_s"])
    return seconds


def _clear(busy: Floats) -> None:
    for i in range(len(BUSY)):
        busy[i] = 0.0


def _attribute(cluster: Cluster, number: int, busy: Floats, seconds: float, sent_s: float, work_s: float) -> None:
    """Of an iteration's time `sent_s` is for activations; the rest is bound by what all its work is bound by."""
    share = (seconds - sent_s) / work_s
    for i in range(BOUND, len(BUSY)):
        busy[i] *= share
    busy[BY_NVLINK] += sent_s
    for stage in range(cluster.world["stages"]):
        for i in range(len(HOST_LANES)):
            cluster.stages[number, stage]["bound_s"][i] *= share
