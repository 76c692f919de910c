"""One iteration of a replica: chunks of prompts beside all decoding sequences, from its start to its end."""

import math

from kvsim.engine.batch.decoding import advance, join, last_generated, leave, target_tokens
from kvsim.engine.batch.load import scheduled
from kvsim.engine.batch.memory import release
from kvsim.engine.batch.plans import DECODE, amounts, find
from kvsim.engine.batch.pricing import price_batch
from kvsim.engine.books.causes import contend, finish, first_token, note_shared
from kvsim.engine.books.replica import charge_loads, charge_model, emit, gap, note, note_member, note_now
from kvsim.engine.caches.prompts import completed
from kvsim.engine.handoff import first_layer_s, hand_over, hands_over
from kvsim.engine.pipeline import charge_round, price_round
from kvsim.engine.requests.queues import take_out
from kvsim.engine.requests.tenants import charge_output
from kvsim.engine.sessions.between_turns import end_turn
from kvsim.engine.speculation import charge_guesses, guess
from kvsim.engine.state.cluster import (
    DECODING,
    ITERATING,
    NOBODY,
    PREFILLING,
    STALLED,
    TIMED_OUT,
    TURNS_ANEW,
    VECTOR,
    Cluster,
    Prices,
)
from kvsim.iteration.busy import BUSY, BY_SWAP


def stall(cluster: Cluster, number: int, now_s: float) -> bool:
    """Begin the wait for swaps that come before an iteration; whether there is one."""
    replica = cluster.replicas[number]
    if replica["stall_s"] == 0:
        return False
    note_now(cluster, number, now_s)
    replica["phase"], replica["began_s"], replica["wake_s"] = STALLED, now_s, now_s + replica["stall_s"]
    replica["busy_s"][BY_SWAP] += replica["stall_s"]
    replica["stall_s"] = 0.0
    return True


def launch(cluster: Cluster, prices: Prices, number: int, now_s: float) -> None:
    """Price and book an iteration whose swaps are done. May make detours."""
    replica = cluster.replicas[number]
    if cluster.world["stages"] > 1:
        parts, seconds = price_round(cluster, prices, number, now_s)
        charge_round(cluster, prices, number, now_s, seconds, parts)
    else:
        seconds = _charge_batch(cluster, prices, number)
    if replica["phase"] != STALLED:
        note_now(cluster, number, now_s)
        replica["began_s"] = now_s
    replica["decoding_now"] = replica["length"][DECODING]
    replica["phase"], replica["wake_s"] = ITERATING, now_s + seconds


def _charge_batch(cluster: Cluster, prices: Prices, number: int) -> float:
    """Price and book an iteration of a replica without stages; its seconds. May make detours."""
    replica, world, batch = cluster.replicas[number], cluster.world, scheduled(cluster, number, 0, 1)
    decoding, busy = replica["length"][DECODING], world["busy_s"]
    prompt_tokens = batch.tokens - decoding * world["step_tokens"]
    seconds = price_batch(world, prices, batch, 1.0, 0, cluster.stages[number, 0]["sharing"], busy)
    guess_s = guess(world, busy, decoding, prompt_tokens)
    replica["tail_s"] = guess_s + prices.head[batch.logits]["seconds"]
    charge_loads(world, replica, prices, batch.loads)
    charge_model(world, replica, prices, 1, batch.tokens, batch.logits)
    charge_guesses(world, replica, 1, decoding, prompt_tokens)
    for i in range(len(BUSY)):
        replica["busy_s"][i] += busy[i]
    note_shared(replica, busy)
    return seconds + guess_s


def end_iteration(cluster: Cluster, number: int, now_s: float) -> None:
    """Every decoding sequence has emitted a token, and every chunk is done."""
    replica = cluster.replicas[number]
    note(cluster, number, now_s, 0)
    if now_s != replica["wake_s"]:  # the op fidelity let others compete with it
        contend(replica, now_s - replica["wake_s"])
    emit(cluster, number, now_s - replica["began_s"])
    advance(cluster, number, 1)
    index = replica["first"][PREFILLING]
    while index != NOBODY:
        request = cluster.requests[index]
        request["past_tokens"] += request["chunk_tokens"]
        if request["chunk_tokens"] and math.isnan(request["stream_s"]):
            request["stream_s"] = first_layer_s(cluster, number, now_s)
        index = request["after"]


def join_completed(cluster: Cluster, number: int, now_s: float) -> None:
    """Prompts that are complete have emitted a token and decode from now on. May make detours."""
    replica, requests = cluster.replicas[number], cluster.requests
    index = replica["first"][PREFILLING]
    while index != NOBODY:
        after = requests[index]["after"]
        done = requests[index]["past_tokens"] == target_tokens(requests[index])
        if done and requests[index]["chunk_tokens"] and requests[index]["rejected"] != TIMED_OUT:
            _complete(cluster, number, index, now_s)
        index = after


def _complete(cluster: Cluster, number: int, index: int, now_s: float) -> None:
    replica, request = cluster.replicas[number], cluster.requests[index]
    decodes, turns = last_generated(request) > 0, cluster.world["session_kv"] != TURNS_ANEW
    if decodes or turns:
        find(cluster.plans, DECODE, target_tokens(request), 1, 0)
    take_out(cluster.requests, replica, index)
    charge_output(cluster, number, index)
    first = math.isnan(request["first_token_s"])
    if first:
        first_token(replica, request, now_s)
    else:
        gap(cluster, number, request["whose"], now_s - request["last_token_s"], 0.0, 1, 1)
    if hands_over(cluster, request):
        hand_over(cluster, number, index, now_s)
    else:
        release(cluster, index)
        if decodes:
            join(cluster, index, 1.0)
            note_member(cluster, index, 1)
        else:
            finish(replica, request, now_s)
            leave(cluster, index, now_s)
            if turns:
                piece = find(cluster.plans, DECODE, target_tokens(request), 1, 0)
                amounts(cluster.plans, piece, cluster.rows, VECTOR)
                end_turn(cluster, index, now_s)
    request["chunk_tokens"] = 0
    if first and replica["cached"]:
        completed(cluster, number, index, now_s)
