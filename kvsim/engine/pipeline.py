"""Iterations on a pipeline of stages: how a batch's micro-batches follow one another, how long that takes, what moves.

A micro-batch enters a stage when its activations have come and the stage has done with the one before. Chunks of
prompts need nothing from the end of the pipeline, so they follow at once, also those of the next iteration; sequences
that decode enter again when their token is out. Of many equal decode iterations each takes as long as all micro-batches
on the slowest stage, or one of them through all stages.
"""

from kvsim.engine.batch.load import Scheduled, prompt_tokens, scheduled, share_of
from kvsim.engine.batch.pricing import price_batch
from kvsim.engine.books.replica import charge_loads, charge_model
from kvsim.engine.features import needs
from kvsim.engine.speculation import charge_guesses, guess
from kvsim.engine.state.cluster import (
    DECODING,
    NOBODY,
    PREFILLING,
    WANT_TIMES,
    Cluster,
    Detour,
    Floats,
    Ints,
    Prices,
    Record,
)
from kvsim.hardware.machine import NVLINK, share_evenly
from kvsim.iteration.busy import BOUND, BUSY, BY_NVLINK


@needs("pipeline", otherwise=(0, 0.0))
def price_round(cluster: Cluster, prices: Prices, number: int, now_s: float) -> tuple[int, float]:
    """The micro-batches that an iteration has, and its seconds; sets `round_busy_s`. May make detours.

    As many as there are stages, or one where nobody decodes and that is out earlier: each of them reads all weights.
    """
    decoding = cluster.replicas[number]["length"][DECODING]
    split = int(min(cluster.world["stages"], max(decoding, prompt_tokens(cluster, number))))
    whole_s = 0.0
    if not decoding:
        _, whole_s = _pass(cluster, prices, number, now_s, 1)
    seconds, last_s = _pass(cluster, prices, number, now_s, split)
    if last_s <= whole_s or decoding:
        return split, seconds
    seconds, _ = _pass(cluster, prices, number, now_s, 1)
    return 1, seconds


def _pass(cluster: Cluster, prices: Prices, number: int, now_s: float, parts: int) -> tuple[float, float]:
    """Let an iteration pass in so many micro-batches; its seconds, and when the last is out. May make detours.

    Sets `round_busy_s`, when stages are free (`stage_s`) and when micro-batches are out (`exit_s`).
    """
    world, replica = cluster.world, cluster.replicas[number]
    follows = replica["round_end_s"] == now_s  # at once after another iteration
    ready_s = _ready_s(cluster, number) if follows else now_s
    _clear(world["round_busy_s"])
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
                at_s += _hop_s(world, stage, tokens)
            seconds = _price_stage(cluster, prices, number, batch, 1.0, stage, parts, world["round_busy_s"])
            if stage == world["stages"] - 1:
                seconds += guess(world, world["round_busy_s"], decodes, prompts)
            at_s = max(at_s, world["stage_s"][stage]) + seconds
            world["stage_s"][stage] = at_s
            work_s += seconds
        world["exit_s"][part] = at_s
    last_s = world["exit_s"][parts - 1]
    emits = decoding > 0 or ends > 0
    seconds = max(0.0, (last_s if emits else world["stage_s"][0]) - now_s)
    sent_s = min(seconds, send_s(world, tokens)) if emits else 0.0
    _attribute(world["round_busy_s"], seconds, sent_s, work_s, 1)
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

    Each micro-batch has the mean of the sequences, so that times stay convex in the step.
    """
    world, decoding = cluster.world, cluster.replicas[number]["length"][DECODING]
    size, parts = micro_batches(world, decoding)
    tokens, last = size * world["step_tokens"], (decoding - (parts - 1) * size) * world["step_tokens"]
    if not prices.own[last * world["stages"]]["known"]:  # for the books
        world["wanted"][0], world["wanted"][1], world["wanted"][2] = WANT_TIMES, last, last
        raise Detour
    _clear(busy)
    batch = Scheduled(loads, tokens, tokens)
    slowest_s = through_s = 0.0
    for stage in range(world["stages"]):
        seconds = _price_stage(cluster, prices, number, batch, size / decoding, stage, parts, busy)
        if stage == world["stages"] - 1:
            seconds += guess(world, busy, size, 0)
        slowest_s = max(slowest_s, parts * seconds)
        through_s += seconds
    sent_s = send_s(world, tokens)
    if through_s + sent_s <= slowest_s:
        _attribute(busy, slowest_s, 0.0, parts * through_s, parts)
        return float(slowest_s)
    _attribute(busy, through_s + sent_s, sent_s, parts * through_s, parts)
    return float(through_s + sent_s)


def note_exits(world: Record, replica: Record, now_s: float, seconds: float) -> None:
    """Micro-batches of a decode iteration that ends now and took so long came out one after the other."""
    _, parts = micro_batches(world, replica["decoding_now"])
    for part in range(parts):
        replica["exit_s"][part] = now_s - (parts - 1 - part) * seconds / world["stages"]
    replica["parts"], replica["round_end_s"], replica["full"] = parts, now_s, 0


def micro_batches(world: Record, decoding: int) -> tuple[int, int]:
    """Sequences in each micro-batch of a decode iteration but the last, and how many there are."""
    size = -(-decoding // world["stages"])
    return int(size), int(-(-decoding // size))


def send_s(world: Record, tokens: int) -> float:
    """How long the activations of so many tokens are under way between all stages."""
    seconds = 0.0
    for stage in range(1, world["stages"]):
        seconds += _hop_s(world, stage, tokens)
    return seconds


def _hop_s(world: Record, stage: int, tokens: int) -> float:
    """How long the activations of so many tokens take to a stage: over the network where a host begins with it."""
    nbytes = _sent_bytes(world, tokens)
    if stage * world["tp"] % world["gpus_on_host"]:
        return float(world["peer_latency_s"] + nbytes * world["peer_byte_s"])
    return float(world["nic_latency_s"] + nbytes * world["nic_byte_s"])


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
    replica["parts"] = parts if decoding else 0
    replica["round_begin_s"], replica["round_end_s"] = now_s, now_s + seconds
    replica["full"] = replica["batch_tokens"] <= 0


@needs("pipeline")
def charge_circulation(world: Record, replica: Record, prices: Prices, iterations: int, decoding: int) -> None:
    """Book the weights that decode iterations read, and the bytes of their collectives and activations."""
    size, parts = micro_batches(world, decoding)
    for times, sequences in ((iterations * (parts - 1), size), (iterations, decoding - (parts - 1) * size)):
        tokens = sequences * world["step_tokens"]
        charge_model(world, replica, prices, times, tokens, tokens)
        charge_sends(world, replica, times, tokens)
        charge_guesses(world, replica, times, sequences, 0)


def charge_sends(world: Record, replica: Record, times: int, tokens: int) -> None:
    """Book activations on their way between all stages."""
    nbytes = _sent_bytes(world, tokens)
    replica["activation_peer_bytes"] += times * world["peer_hops"] * nbytes
    replica["activation_nic_bytes"] += times * world["nic_hops"] * nbytes
    replica["busy_s"][NVLINK] += times * world["peer_hops"] * nbytes * world["peer_byte_s"]
    if world["nic_hops"]:
        replica["nic_s"] += times * world["nic_hops"] * nbytes * world["nic_byte_s"]


def _sent_bytes(world: Record, tokens: int) -> int:
    return int(-(-tokens * world["row_bytes"] // world["tp"]))


def _price_stage(
    cluster: Cluster,
    prices: Prices,
    number: int,
    batch: Scheduled,
    share: float,
    stage: int,
    parts: int,
    total: Floats,
) -> float:
    """Seconds of one micro-batch of `parts` on a stage, with as many stages at work; adds those of BUSY to a total."""
    world, replica = cluster.world, cluster.replicas[number]
    own = world["gpus_on_host"]
    idle = own - min(own, parts * world["tp"])
    own_switch = min(own, world["gpus_per_switch"])
    on_host = replica["on_host"] - idle
    on_switch = replica["on_switch"] - own_switch + min(own_switch, own - idle)
    share_evenly(world["sharing"], on_host, on_switch, world["ddr_Bps"], world["switch_Bps"])
    seconds = price_batch(world, prices, batch, share, stage, world["sharing"], world["busy_s"])
    for i in range(len(BUSY)):
        total[i] += world["busy_s"][i]
    return seconds


def _clear(busy: Floats) -> None:
    for i in range(len(BUSY)):
        busy[i] = 0.0


def _attribute(busy: Floats, seconds: float, sent_s: float, work_s: float, times: int) -> None:
    """An iteration takes so long, `sent_s` of it for activations; the rest is bound by what all its work is bound by.

    What has been added up happens so many times.
    """
    for i in range(len(BUSY)):
        busy[i] *= times
        if i >= BOUND:
            busy[i] *= (seconds - sent_s) / work_s
    busy[BY_NVLINK] += sent_s
