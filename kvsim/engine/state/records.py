"""The layouts of the records that the state of a simulation is made of, field by field."""

from typing import Any

import numpy as np

from kvsim.engine.state.cluster import N_LINKS, N_TIERS, QUEUES, TENANT_QUEUES
from kvsim.hardware.machine import HOST_LANES, LANES, SHARING
from kvsim.hardware.sharing import MOST_GPUS
from kvsim.iteration.busy import BOUNDS, BUSY
from kvsim.plans.guessing import FIELDS as GUESSING
from kvsim.scenario.stages import MOST_STAGES


def _ints(*names: str) -> list[Any]:
    return [(name, np.int64) for name in names]


def _floats(*names: str) -> list[Any]:
    return [(name, np.float64) for name in names]


def _seconds(*names: str) -> list[Any]:
    return [(name, np.float64, (len(BUSY),)) for name in names]


REQUEST = np.dtype(
    _floats(
        "arrival_s",
        "admitted_s",
        "first_token_s",
        "finish_s",
        "last_token_s",  # before it was preempted
        "ready_s",  # when its cached prefix has come up, or its state has come from another replica
        "since_s",  # when it began to wait for the former, or was preempted
        "prefix_s",  # for how long it waited for that
        "stream_s",  # from when on some of its state could be sent to another replica
        "delay_s",  # after its leader
        "generated_at_join",  # the generated token that it fed then: a mean where steps emit several
        "anew_s",  # to compute its state when it has ended
        "parked_s",  # when that is where it will be until the session's next turn
    )
    + _ints(
        "prompt_tokens",
        "output_tokens",
        "cached_tokens",
        "past_tokens",  # of its prompt that are done
        "recomputed_tokens",  # output tokens that a preemption made part of its prompt
        "dropped_tokens",  # whose state a preemption gave up, until they are computed anew
        "chunk_tokens",  # of its prompt in this iteration
        "preemptions",
        "rejected",  # or timed out
        "patience",  # which of the different timeouts is its, and who came next with the same one
        "later",
        "leader",  # after whose end, or else arrival, it arrives
        "after_end",
        "follower",  # the first of those that it leads itself, and the next of those that have its leader
        "sibling",
        "parent",  # the turn whose state it goes on from, with so many tokens
        "shared_tokens",
        "in_session",
        "state_bytes",  # of HBM, when it has ended
        "copied",  # that is in DDR as well
        "replica",
        "tenant",  # its number among those that the scheduler tells apart
        "whose",  # its number among all of the trace
        "pin",  # to which replicas it may go
        "ticket",  # its place in the order of its replica's queue
        "queue",  # the list that it is in, and its neighbours there
        "before",
        "after",
        "piece",  # while it decodes: its plan, the iteration with which that began, and the one at which it ends
        "joined",
        "due",
        "loading",  # whether it waits for its cached prefix
        "prefill_ps",  # picoseconds that its prefill was estimated to take where it went
    )
    + _ints("receiver", "sender")  # replicas: where memory for its decoding is reserved, and who had its prompt
    + [
        (
            "held",
            np.int64,
            (N_TIERS,),
        ),  # bytes reserved for its prefill, or taken while it is swapped out or on its way
        ("sent", np.int64, (N_TIERS,)),  # of its state after the prompt
        ("reserved", np.int64, (N_TIERS,)),  # at its receiver, before it is on its way
        ("lent", np.int64, (N_TIERS,)),  # at its sender, until it has arrived
    ]
    + [(name, np.float64, (len(BOUNDS),)) for name in ("bound_s", "ttft_bound_s")]  # all of it, up to its first token
)
REPLICA = np.dtype(
    _floats(
        "wake_s",  # when it next does something by itself
        "end_s",  # of the run under way
        "began_s",
        "stall_s",  # swaps that the next iteration waits for
        "run_stall_s",
        "loader_free_s",
        "link_free_s",  # when all state that it sends or receives has moved
        "nic_s",  # for which it sends to other hosts
        "tail_s",  # of the iteration under way: the head and guesses, after all layers
        "round_begin_s",  # of a pipeline's last iteration
        "round_end_s",
    )
    + _ints(
        "phase",
        "iteration",  # decode iterations so far
        "next_due",
        "batch_tokens",  # what is left of an iteration's
        "chunks",
        "decoding_now",  # sequences that decode in this iteration or run
        "late",  # the last so many of them have been swapped in: their next token comes after a longer gap
        "outstanding_tokens",  # of requests that have not left, for the router
        "expected",  # sequences to come for which memory is reserved
        "left",  # requests that finished, were rejected or timed out
        "n_parts",
        "parts",  # micro-batches of a pipeline's last iteration in which sequences decode; none: 0
        "round_parts",  # all of that
        "full",  # whether that had as many tokens as it may
        "cut",  # whether the run under way has been shortened
        "first_neighbour",  # the replicas of its host
        "n_neighbours",
        "first_ticket",  # the smallest and the largest of its queue so far
        "last_ticket",
        "left_queue",  # the tenant whose request left the queue last
        "cached",  # whether it has a prefix cache, and how often that has changed
        "cache_version",
        "queued_ps",  # the estimated prefills of those that wait
        "weight_bytes",
        "collective_bytes",
        "handoff_peer_bytes",
        "handoff_nic_bytes",
        "activation_peer_bytes",
        "activation_nic_bytes",
        "prefix_up_bytes",
        "prefix_down_bytes",
        "swap_up_bytes",
        "swap_down_bytes",
        "swaps",
        "recomputations",  # preempted sequences that begin anew
        "anew_tokens",  # that they compute once more
        "stalls",  # copies of all that iterations have waited for, and their bytes up and down
        "turns_kept",
        "turns_swapped",
        "turns_dropped",
        "turns_resumed",
        "states_evicted",
    )
    + [
        ("first", np.int64, (QUEUES,)),
        ("last", np.int64, (QUEUES,)),
        ("length", np.int64, (QUEUES,)),
        ("held_bytes", np.int64, (N_TIERS,)),  # by sequences in prefill and by swapped ones
        ("stored_bytes", np.int64, (N_TIERS,)),  # by decoding sequences in the next iteration
        ("growth_bytes", np.int64, (N_TIERS,)),  # and how much more in each further one
        ("used_bytes", np.int64, (N_TIERS,)),  # at the start of this iteration or run
        ("cache_bytes", np.int64, (N_TIERS,)),
        ("plan_bytes", np.int64, (N_LINKS,)),
        ("stall_bytes", np.int64, (2,)),
        ("adapters_free_s", np.float64, (2,)),  # of its host, if it is the first there: sending and receiving
        ("background_s", np.float64, (2,)),  # up and down: swaps and prefixes, beside the iterations' own copies
        ("stage_free_s", np.float64, (MOST_STAGES,)),  # when each stage is free
        ("exit_s", np.float64, (MOST_STAGES,)),  # when those micro-batches are out
        ("sharing", np.float64, (len(SHARING), len(LANES))),  # what it has of the host for what moves beside iterations
        ("shared_s", np.float64, (3,)),  # copies, CPU work and all-reduces of the iteration under way, if alone
        *_seconds("busy_s"),
    ]
)
STAGE = np.dtype(  # of a replica
    [
        ("sharing", np.float64, (len(SHARING), len(LANES))),  # what its iterations have of the host
        ("of_large", np.float64, (len(SHARING), len(LANES))),  # the same for micro-batches with a sequence more
        ("use", np.float64, (len(HOST_LANES),)),  # the share of time in which it uses each of these lanes now
        ("bound", np.float64, (len(HOST_LANES),)),  # and of the iteration under way, what is bound by each
        # Of a pipeline's iteration that is priced: seconds on each of these lanes, bound by each, and of all layers.
        ("lane_s", np.float64, (len(HOST_LANES),)),
        ("bound_s", np.float64, (len(HOST_LANES),)),
        ("window_s", np.float64),
        ("part_s", np.float64, (2,)),  # of a micro-batch, and of one with a sequence more
        ("tail_s", np.float64),  # and after all layers
    ]
)
TENANT = np.dtype(  # one tenant at one replica
    _floats(
        "weight",
        "lift",  # what its counter has been raised by, beyond its service
        "output_tokens",  # served: generated
    )
    + _ints(
        "priority",
        "quota_bytes",  # of HBM
        "watermark_bytes",
        "over_quota",  # its next request has to wait for its own ones; of this schedule
        "decoding",  # sequences
        "prompt_tokens",  # served: computed by prefill
        "held_bytes",  # of HBM: as those of a replica
        "stored_bytes",
        "growth_bytes",
        "peak_bytes",
    )
    + [(name, np.int64, (TENANT_QUEUES,)) for name in ("first", "last", "length")]
)
PATIENCE = np.dtype(_floats("timeout_s") + _ints("first", "last"))  # those who have come and may yet lose it
PIN = np.dtype(_ints("first", "n_replicas", "arrived"))  # neighbours that requests may go to, and how many have arrived
PART = np.dtype(  # iterations whose durations lie on a line, and while a run is split, a span that may not yet
    _ints("low", "steps") + _floats("first_s", "last_s", "slope_s") + _seconds("busy_s", "last_busy_s", "busy_slope_s")
)
NOTE = np.dtype(
    _floats("time_s") + _ints("hbm_bytes", "ddr_bytes") + [(n, np.int32) for n in ("replica", "running", "waiting")]
)
INBOUND = np.dtype(
    _ints("serial", "way", "nbytes") + _floats("from_s", "late_s", "least_s")
)  # what a request waits for
AWAY = np.dtype(_ints("request") + _floats("from_s", "to_s"))  # while it was preempted
# Before a token of `whose`, or those of a batch (EVERYBODY); without steps, who joined or left that.
GAP = np.dtype(
    _floats("first_s", "slope_s") + _ints("steps", "tokens") + [(name, np.int32) for name in ("replica", "whose")]
)

WORLD = np.dtype(
    _ints(
        "max_num_seqs",
        "max_num_batched_tokens",
        "watermark_bytes",
        "swaps",  # what was preempted, rather than recomputing it
        "step_by_step",  # the op fidelity keeps the time: it takes iterations one by one and shares the host itself
        "router",
        "scheduler",
        "several_tenants",  # have sent requests
        "session_kv",  # what becomes of turns' state
        "prefill_replicas",  # the first so many process prompts, the others decode; 0: all do both
        "streams_chunks",  # whether state is final once it is computed, so that chunks can be sent
        "layers",
        "tp",
        "stages",  # of a pipeline, on how many hops between which activations stay on a host or do not
        "peer_hops",
        "nic_hops",
        "row_bytes",  # of a token's activations
        "gpus_on_host",  # of one replica, at the most
        "gpus_per_switch",
        "head_bytes",
        "arrived",  # requests so far
        "recorded",  # the next that waits for nobody
        "known",  # size of the heap of those that waited
        "notes",  # rows written
        "gaps",
        "aways",
        "set_out",  # states so far for which requests wait, where the op fidelity keeps the time
        "step_tokens",  # that run through the model in a decode step of one sequence
    )
    + _floats("pcie_latency_s", "pcie_up_s", "pcie_down_s")  # the last two for each byte
    + _floats("peer_latency_s", "peer_byte_s", "nic_latency_s", "nic_byte_s")  # between replicas
    + _floats("ddr_Bps", "switch_Bps", "nic_Bps")
    + _floats("think_s", "return_share")  # on average, of sessions
    + _floats("prompt_weight", "output_weight")  # service of a token
    + _floats("window_from_s", "window_to_s")  # what begins within is shown
    + _floats("ready_s")  # when the prompts of the iteration of a pipeline that is priced could have begun
    + _floats("look_s")  # when that began, swaps aside
    + _floats("tokens_per_step")  # that a decode step of one sequence emits
    + GUESSING
    + _floats("widest_stage")  # the largest part of a sequence's HBM that a stage holds
    + [
        ("capacity_bytes", np.int64, (N_TIERS,)),
        ("wanted", np.int64, (5,)),  # by a detour: what, and its arguments
        ("first_piece", np.int64, (2,)),  # the one found last, for decode steps and chunks of prompts
        *_seconds("busy_s", "round_busy_s"),  # of the batch priced last, and of all micro-batches on all stages
        ("stage_s", np.float64, (MOST_STAGES,)),  # when stages are free, and micro-batches out, of the iteration priced
        ("exit_s", np.float64, (MOST_STAGES,)),
        ("chances", np.float64, (MOST_GPUS + 1,)),  # scratch
        ("sharing", np.float64, (len(SHARING), len(LANES))),  # scratch
    ]
)
