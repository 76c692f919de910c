"""The engine's loop: which event is next, and what a replica does at one.

A replica lives through phases: it ends what has run, lets sequences leave and join, makes room, schedules and begins
what runs next. Each step is whole or not at all, so that after a detour a replica goes on where it stopped.
"""

import math

from kvsim.engine.batch.iterations import end_iteration, join_completed, launch, stall
from kvsim.engine.batch.neighbours import publish, set_sharing
from kvsim.engine.batch.preemption import preempt_to_fit
from kvsim.engine.batch.runs import begin_run, cut_run, end_run, steps_by
from kvsim.engine.batch.scheduling import admit, continue_prompts, next_ready_s
from kvsim.engine.batch.settling import settle
from kvsim.engine.books.replica import look, note_now
from kvsim.engine.caches.prompts import arrived
from kvsim.engine.handoff import take_in, take_over
from kvsim.engine.pipeline import fills
from kvsim.engine.requests.arrivals import has_arrived, next_arrival
from kvsim.engine.requests.patience import depart, departure_s, drop_departed, has_come, next_departure
from kvsim.engine.requests.routing import route
from kvsim.engine.requests.tenants import clear_over_quota, queue_newcomer
from kvsim.engine.sessions.between_turns import price_anew, state_of
from kvsim.engine.state.cluster import (
    ADMITTING,
    DECODING,
    FAIR,
    IDLE,
    ITERATING,
    JOINING,
    LEAST_LOADED,
    MOST_PARTS,
    NOBODY,
    READY,
    ROUND_ROBIN,
    RUNNING,
    SCHEDULING,
    SETTLING,
    STALLED,
    WANT_ROWS,
    Cluster,
    Detour,
    Prices,
)

MOST_NOTES = 8  # of one event


def play(cluster: Cluster, prices: Prices, only: int, at_s: float, most_events: int) -> bool:
    """Let events happen, at most so many: a request arrives or leaves, a replica ends and begins what it runs.

    False when nothing is left to happen. At equal times requests come first, then replicas in order, and last those
    leave who have lost patience. A caller that keeps the time itself names the `only` replica that an event concerns,
    and the time. May make detours. (One long function, because its parts would be compiled, with all that they call,
    once by themselves and once more as parts of this.)
    """
    world, requests = cluster.world, cluster.requests
    for _ in range(most_events):
        number, now_s = only, at_s
        if only == NOBODY:
            now_s = math.inf
            for i in range(len(cluster.replicas)):
                if cluster.replicas[i]["wake_s"] < now_s:
                    number, now_s = i, cluster.replicas[i]["wake_s"]
            arriving, leaving = next_arrival(cluster), next_departure(cluster)
            arrival_s = math.inf if arriving == NOBODY else requests[arriving]["arrival_s"]
            if departure_s(cluster, leaving) < min(now_s, arrival_s):
                depart(cluster, leaving, departure_s(cluster, leaving))
                continue
            if arriving != NOBODY and arrival_s <= now_s:
                arrive(cluster, prices, arriving, arrival_s)
                continue
            if number == NOBODY:
                return False
        _check_rows(cluster)
        replica = cluster.replicas[number]
        # End what has run.
        if replica["phase"] == RUNNING and now_s < replica["end_s"]:
            cut_run(cluster, number, now_s)  # a prefix or a sequence has come
            continue
        if replica["phase"] == STALLED:
            launch(cluster, prices, number, now_s)
            publish(cluster, prices, number, now_s)
            look(cluster, number, now_s)
            continue
        if replica["phase"] == IDLE:
            note_now(cluster, number, now_s)
            replica["phase"] = SCHEDULING
        elif replica["phase"] == ITERATING:
            end_iteration(cluster, number, now_s)
            replica["phase"] = SETTLING
        elif replica["phase"] == RUNNING:
            end_run(cluster, prices, number, now_s)
            replica["phase"] = SETTLING
        # Decide what is next.
        set_sharing(cluster, number)
        if replica["phase"] == SETTLING:
            settle(cluster, number, now_s)
            replica["phase"] = JOINING
        if replica["phase"] == JOINING:
            join_completed(cluster, number, now_s)
            replica["phase"] = SCHEDULING
        if replica["phase"] == SCHEDULING:
            clear_over_quota(cluster, number)
            drop_departed(cluster, number, now_s)
            preempt_to_fit(cluster, number, now_s)
            if 0 < world["prefill_replicas"] <= number:
                take_in(cluster, number, now_s)
                take_over(cluster, number, now_s)
            continue_prompts(cluster, replica, now_s)
            replica["phase"] = ADMITTING
        if replica["phase"] == ADMITTING:
            admit(cluster, prices, number, now_s)
            replica["phase"] = READY
        # Begin it.
        decodes = replica["length"][DECODING]
        if replica["chunks"] or (decodes and (world["step_by_step"] or fills(cluster, number, now_s))):
            if not stall(cluster, number, now_s):
                launch(cluster, prices, number, now_s)
        elif decodes:
            begin_run(cluster, prices, number, now_s)
        else:
            note_now(cluster, number, now_s)
            ready_s = next_ready_s(cluster, replica, now_s)
            replica["phase"], replica["wake_s"] = IDLE, ready_s
        publish(cluster, prices, number, now_s)
        look(cluster, number, now_s)
    return True


def arrive(cluster: Cluster, prices: Prices, index: int, now_s: float) -> int:
    """Queue a request at a replica, which is returned; what that does is cut short unless the request must wait.

    May make a detour.
    """
    price_anew(cluster, prices, index)
    number, request = _route(cluster, prices, index, now_s), cluster.requests[index]
    has_arrived(cluster, index)
    has_come(cluster, index)
    replica = cluster.replicas[number]
    request["replica"] = number
    replica["outstanding_tokens"] += request["prompt_tokens"] + request["output_tokens"]
    iterations = 0  # that have ended by now
    if replica["phase"] == RUNNING and cluster.world["scheduler"] == FAIR:
        iterations = steps_by(cluster.parts[number], replica, now_s - replica["began_s"]) - 1
    is_next = queue_newcomer(cluster, number, index, iterations)
    if replica["cached"]:
        arrived(cluster, number, index, now_s)
    if replica["phase"] == IDLE and is_next:
        replica["wake_s"] = now_s
    elif replica["phase"] == RUNNING and is_next and not replica["cut"]:
        cut_run(cluster, number, now_s)
    return number


def _route(cluster: Cluster, prices: Prices, index: int, now_s: float) -> int:
    replicas, world = cluster.replicas, cluster.world
    pin = cluster.pins[cluster.requests[index]["pin"]]
    chosen, turn = pin["first"], state_of(cluster, index)
    if turn != NOBODY and 0 <= cluster.requests[turn]["replica"] - pin["first"] < pin["n_replicas"]:
        return int(cluster.requests[turn]["replica"])  # where its session's state is
    if world["router"] == ROUND_ROBIN:
        pin["arrived"] += 1
        return int(chosen + (pin["arrived"] - 1) % pin["n_replicas"])
    if world["router"] > LEAST_LOADED:  # it looks into prefix caches
        return route(cluster, prices, index, now_s)
    for i in range(chosen + 1, chosen + pin["n_replicas"]):
        if replicas[i]["outstanding_tokens"] < replicas[chosen]["outstanding_tokens"]:
            chosen = i
    return int(chosen)


def _check_rows(cluster: Cluster) -> None:
    """An event must find room for all that it may note: each sequence that joins or returns may leave a gap.

    Where tenants are told apart, so does each that joins or leaves a batch.

    And each that goes from one replica to another changes what two idle ones hold.
    """
    world = cluster.world
    returns = 2 * world["max_num_seqs"]
    gaps = returns + MOST_PARTS + 2 + (2 * returns if world["several_tenants"] else 0)
    notes = MOST_NOTES + (3 * returns if world["prefill_replicas"] else 0)
    full = world["notes"] + notes > len(cluster.notes) or world["gaps"] + gaps > len(cluster.gaps)
    if full or world["aways"] + returns > len(cluster.aways):
        world["wanted"][0] = WANT_ROWS
        raise Detour
