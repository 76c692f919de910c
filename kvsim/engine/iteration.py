"""One iteration of a replica: chunks of prompts beside all decoding sequences, from its start to its end."""

import math

from kvsim.engine.attribution import contend, finish, first_token, note_shared
from kvsim.engine.books import charge_model, charge_plans, emit, gap, look, note, note_member, note_now
from kvsim.engine.decoding import advance, join, last_generated, leave, target_tokens
from kvsim.engine.handoff import first_layer_s, hand_over, hands_over
from kvsim.engine.memory import release
from kvsim.engine.plans import DECODE, PREFILL, amounts, find
from kvsim.engine.pricing import price
from kvsim.engine.queues import take_out
from kvsim.engine.speculation import charge_guesses, guess
from kvsim.engine.state import (
    BUSY,
    BY_SWAP,
    COUNT,
    DECODING,
    ITERATING,
    NOBODY,
    PREFILLING,
    PROMPTS,
    STALLED,
    TIMED_OUT,
    VECTOR,
    WANT_STORE,
    Cluster,
    Detour,
    Prices,
)
from kvsim.engine.tenants import charge_output


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
    replica, world, rows, first = cluster.replicas[number], cluster.world, cluster.rows, first_load(cluster)
    decoding = replica["length"][DECODING]
    set_batch(cluster, number)
    tokens, logits = world["tokens"], world["logits"]
    seconds = price(world, prices, rows, first, tokens, logits, replica["on_host"], replica["on_switch"])
    prompt_tokens = tokens - decoding * world["step_tokens"]
    seconds += guess(world, world["busy_s"], decoding, prompt_tokens)
    if replica["phase"] != STALLED:
        note_now(cluster, number, now_s)
        replica["began_s"] = now_s
    for row in range(first, first + world["loads"]):
        charge_plans(replica, prices, rows[row, 0], rows[row], 1)
    charge_model(world, replica, prices, 1, tokens, logits)
    charge_guesses(world, replica, 1, decoding, prompt_tokens)
    for i in range(len(BUSY)):
        replica["busy_s"][i] += world["busy_s"][i]
    note_shared(replica, world["busy_s"])
    replica["decoding_now"] = decoding
    replica["phase"], replica["wake_s"] = ITERATING, now_s + seconds
    look(cluster, number, now_s)


def end_iteration(cluster: Cluster, number: int, now_s: float) -> None:
    """Every decoding sequence has emitted a token, and every chunk is done."""
    replica = cluster.replicas[number]
    note(cluster, number, now_s, 0)
    if now_s != replica["wake_s"]:  # whoever keeps the time let others compete with it
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
    decodes = last_generated(request) > 0
    if decodes:
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
    request["chunk_tokens"] = 0
    if first and replica["cached"]:
        cluster.world["wanted"][0], cluster.world["wanted"][1] = WANT_STORE, index
        cluster.world["now_s"] = now_s
        raise Detour


def first_load(cluster: Cluster) -> int:
    """The row of a batch's first load."""
    return PROMPTS + int(cluster.sums.shape[1])


def set_batch(cluster: Cluster, number: int) -> None:
    """Set the rows of the batch, its tokens and rows of the head, to an iteration's. May make detours.

    Loads stand in the order of their structures, decode before prefill, so that equal batches take equal times
    whatever happened before.
    """
    replica, world, rows, plans = cluster.replicas[number], cluster.world, cluster.rows, cluster.plans
    n_structures = cluster.sums.shape[1]
    tokens = logits = replica["length"][DECODING] * world["step_tokens"]
    for structure in range(n_structures):
        for i in range(rows.shape[1]):
            rows[PROMPTS + structure, i] = 0
    index = replica["first"][PREFILLING]
    while index != NOBODY:
        request = cluster.requests[index]
        chunk, past = request["chunk_tokens"], request["past_tokens"]
        if chunk:
            target = target_tokens(request)
            piece = find(plans, PREFILL, target, past, chunk)
            amounts(plans, piece, rows, VECTOR)
            row = PROMPTS + plans.pieces[piece]["structure"]
            for i in range(plans.pieces[piece]["columns"]):
                rows[row, i] += rows[VECTOR, i]
            tokens += chunk
            logits += past + chunk == target
        index = request["after"]
    set_decoding_batch(cluster, number, 0)
    for structure in range(n_structures):
        if rows[PROMPTS + structure, COUNT]:
            row = first_load(cluster) + world["loads"]
            for i in range(1, rows.shape[1]):
                rows[row, i] = rows[PROMPTS + structure, i]
            rows[row, 0] = structure
            world["loads"] += 1
    world["tokens"], world["logits"] = tokens, logits


def set_decoding_batch(cluster: Cluster, number: int, step: int) -> None:
    """Set the rows of the batch to the decoding sequences' loads in the iteration after the next `step`."""
    sums, rows, row = cluster.sums, cluster.rows, first_load(cluster)
    for structure in range(sums.shape[1]):
        if sums[number, structure, 0, COUNT]:
            for i in range(1, sums.shape[3]):
                rows[row, i] = sums[number, structure, 0, i] + step * sums[number, structure, 1, i]
            rows[row, 0] = structure
            row += 1
    cluster.world["loads"] = row - first_load(cluster)
