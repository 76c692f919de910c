"""The state of a cluster before anything has happened: who will come, to which replicas, and what these have."""

import math

import numpy as np

from kvsim.engine.caches.tiers import PrefixTiers
from kvsim.engine.features import FEATURES
from kvsim.engine.sessions.turns import find_turns
from kvsim.engine.state.cluster import (
    IDLE,
    MOST_PARTS,
    NO_QUOTA,
    NOBODY,
    NOWHERE,
    OPEN_SPANS,
    TURNS_ANEW,
    Cluster,
    Record,
    Records,
)
from kvsim.engine.state.records import (
    AWAY,
    GAP,
    INBOUND,
    NOTE,
    PART,
    PATIENCE,
    PIN,
    REPLICA,
    REQUEST,
    STAGE,
    TENANT,
    WORLD,
)
from kvsim.engine.state.tables import PlanArrays, set_guesses
from kvsim.iteration.clock import Clock
from kvsim.plans.sent_state import SentState
from kvsim.scenario.choices import ROUTERS, SCHEDULERS, SESSION_KVS
from kvsim.scenario.setup import Setup
from kvsim.scenario.tenants import Tenant, terms_of
from policies import Reuse, reuse_of
from policies.plan import Tier
from traces import Trace
from traces.sessions import Followers, followers

WATERMARK = 0.01  # of HBM kept free at admission (as vLLM)
ROWS_AT_ONCE = 1 << 20  # so large that their memory is given back when they are freed, and none is used until written


def initial_cluster(trace: Trace, setup: Setup, clock: Clock, prefixes: PrefixTiers) -> Cluster:
    """The state before anything has happened, without plans."""
    world, requests = _world(trace, setup, clock), _requests(trace, setup)
    return Cluster(
        world=world,
        requests=requests,
        inbound=np.zeros(len(trace) if world["step_by_step"] else 0, dtype=INBOUND),
        order=np.full(len(trace), NOBODY),
        known=np.full(len(trace), NOBODY),
        replicas=_replicas(setup, prefixes),
        stages=_stages(setup),
        meets=np.zeros((2, 2, setup.replicas, setup.pp, setup.gpus_on_host // setup.tp)),
        spans=np.zeros((2, setup.pp, setup.pp)),
        tenants=_tenants(trace, setup, requests),
        pins=_pins(trace, setup, requests),
        patience=_patience(trace, setup, requests),
        sums=np.zeros((setup.replicas, 0, 2, 0), np.int64),
        rows=np.zeros((0, 0), np.int64),
        parts=np.zeros((setup.replicas, MOST_PARTS + OPEN_SPANS), dtype=PART),
        notes=np.zeros(ROWS_AT_ONCE + 6 * setup.max_num_seqs, dtype=NOTE),
        gaps=np.zeros(ROWS_AT_ONCE + 8 * setup.max_num_seqs, dtype=GAP),
        aways=np.zeros(4 * setup.max_num_seqs, dtype=AWAY),
        plans=PlanArrays().plans(world),
        prefixes=prefixes.arrays,
        features=_features(trace, setup, prefixes),
    )


def _features(trace: Trace, setup: Setup, prefixes: PrefixTiers) -> tuple[str, ...]:
    """What this simulation has of `kvsim.engine.features`."""
    terms = terms_of(setup.tenants, trace.tenants)
    has = {
        "caches": prefixes.on,
        "handoff": setup.prefill_gpus > 0,
        "impatience": setup.timeout_s is not None or any(one.timeout_s is not None for one in terms),
        "pipeline": setup.pp > 1,
        "sessions": setup.session_kv != "recompute",
        "tenants": setup.scheduler != "fcfs" or any(one.quota < 1 for one in terms),
    }
    return tuple(feature for feature in FEATURES if has[feature])


def _requests(trace: Trace, setup: Setup) -> Records:
    requests = np.zeros(len(trace), dtype=REQUEST)
    for name in ("arrival_s", "prompt_tokens", "output_tokens"):
        requests[name] = getattr(trace, name)
    requests["arrival_s"] += setup.request_overhead_s  # here a request arrives when the scheduler hears of it
    for name in ("admitted_s", "first_token_s", "finish_s", "last_token_s", "stream_s"):
        requests[name] = np.nan
    requests["queue"], requests["whose"] = NOWHERE, trace.tenant
    requests["receiver"] = requests["sender"] = NOBODY
    requests["leader"] = requests["follower"] = requests["sibling"] = NOBODY
    requests["parent"] = NOBODY
    if setup.sessions == "closed":
        _lead(requests, followers(trace))
        requests["delay_s"][requests["after_end"] == 1] += setup.request_overhead_s
    if setup.prefill_gpus:
        state = SentState(setup.policy, setup.rank)
        lengths, of_request = np.unique(trace.prompt_tokens, return_inverse=True)
        requests["sent"] = np.array([state.bytes_of(tokens) for tokens in lengths.tolist()], np.int64)[of_request]
    return requests


def set_turns(cluster: Cluster, trace: Trace, setup: Setup) -> None:
    """Say which turns go on from which, where their states may be kept."""
    if setup.session_kv == "recompute" or reuse_of(setup.policy) is not Reuse.BLOCKS:
        cluster.world["session_kv"] = TURNS_ANEW
        return
    turns, requests = find_turns(trace), cluster.requests
    cluster.world["think_s"], cluster.world["return_share"] = turns.think_s, turns.return_share
    for name in ("parent", "shared_tokens", "in_session"):
        requests[name] = getattr(turns, name)


def _lead(requests: Records, waits: Followers) -> None:
    """Let requests arrive after those that they waited for."""
    for name in ("leader", "delay_s", "after_end"):
        requests[name] = getattr(waits, name)
    for index in np.flatnonzero(waits.leader != NOBODY).tolist()[::-1]:
        leader = requests[waits.leader[index]]
        requests[index]["arrival_s"], requests[index]["sibling"] = np.nan, leader["follower"]
        leader["follower"] = index


def _tenants(trace: Trace, setup: Setup, requests: Records) -> Records:
    """The tenants of each replica; where nothing depends on whose a request is, all are one."""
    terms = terms_of(setup.tenants, trace.tenants)
    if setup.scheduler == "fcfs" and all(one.quota == 1 for one in terms):
        terms = [Tenant()]
    else:
        requests["tenant"] = trace.tenant
    tenants = np.zeros((setup.replicas, len(terms)), dtype=TENANT)
    hbm_bytes, *_ = setup.capacity()
    tenants["weight"], tenants["priority"] = [one.weight for one in terms], [one.priority for one in terms]
    tenants["quota_bytes"] = [int(one.quota * hbm_bytes) if one.quota < 1 else NO_QUOTA for one in terms]
    tenants["watermark_bytes"] = [int(WATERMARK * one.quota * hbm_bytes) for one in terms]
    tenants["first"] = tenants["last"] = NOBODY
    return tenants


def _pins(trace: Trace, setup: Setup, requests: Records) -> Records:
    """The ranges of replicas that requests may go to."""
    front = setup.prefill_replicas or setup.replicas  # those that take requests
    ranges = [one.replicas or (0, front - 1) for one in terms_of(setup.tenants, trace.tenants)]
    known = list(dict.fromkeys(ranges))
    requests["pin"] = np.array([known.index(one) for one in ranges])[trace.tenant]
    pins = np.zeros(len(known), dtype=PIN)
    pins["first"] = [first for first, _ in known]
    pins["n_replicas"] = [last - first + 1 for first, last in known]
    return pins


def _patience(trace: Trace, setup: Setup, requests: Records) -> Records:
    """The different times that requests wait for their first token."""
    terms = terms_of(setup.tenants, trace.tenants)
    own_s = [setup.timeout_s if one.timeout_s is None else one.timeout_s for one in terms]
    known_s = [timeout_s for timeout_s in dict.fromkeys(own_s) if timeout_s is not None]
    numbers = [NOBODY if timeout_s is None else known_s.index(timeout_s) for timeout_s in own_s]
    requests["patience"], requests["later"] = np.array(numbers)[trace.tenant], NOBODY
    patience = np.zeros(len(known_s), dtype=PATIENCE)
    patience["timeout_s"], patience["first"] = np.array(known_s) - setup.request_overhead_s, NOBODY
    return patience


def _replicas(setup: Setup, prefixes: PrefixTiers) -> Records:
    replicas = np.zeros(setup.replicas, dtype=REPLICA)
    per_host, own = setup.replicas_per_host, setup.gpus_on_host
    numbers = np.arange(setup.replicas)
    replicas["phase"], replicas["wake_s"], replicas["next_due"] = IDLE, math.inf, np.iinfo(np.int64).max
    replicas["first"] = replicas["last"] = replicas["left_queue"] = NOBODY
    replicas["first_neighbour"] = numbers // per_host * per_host
    replicas["n_neighbours"] = np.minimum(per_host, setup.replicas - replicas["first_neighbour"])
    replicas["sharing"] = setup.machine().sharing(own, min(own, setup.host.gpus_per_switch))
    replicas["cached"] = prefixes.on
    return replicas


def _stages(setup: Setup) -> Records:
    stages = np.zeros((setup.replicas, setup.pp), dtype=STAGE)
    stages["sharing"] = stages["of_large"] = setup.machine().sharing(
        setup.tp, min(setup.tp, setup.host.gpus_per_switch)
    )
    return stages


def _world(trace: Trace, setup: Setup, clock: Clock) -> Record:
    world = np.zeros(1, dtype=WORLD)[0]
    rates, host, capacity = setup.gpu.rates, setup.host, setup.capacity()
    world["max_num_seqs"], world["max_num_batched_tokens"] = setup.max_num_seqs, setup.max_num_batched_tokens
    world["capacity_bytes"], world["watermark_bytes"] = capacity, int(WATERMARK * capacity[0])
    world["swaps"], world["step_by_step"] = setup.preemption == "swap", setup.fidelity == "op"
    world["router"], world["scheduler"] = ROUTERS.index(setup.router), SCHEDULERS.index(setup.scheduler)
    world["prompt_weight"], world["output_weight"] = setup.prompt_token_weight, setup.output_token_weight
    world["tp"], world["gpus_per_switch"] = setup.tp, host.gpus_per_switch
    stages, hosts = setup.stages, setup.stages.hosts
    world["stages"], world["gpus_on_host"], world["row_bytes"] = setup.pp, setup.gpus_on_host, stages.row_bytes
    world["nic_hops"] = hosts[-1]
    world["peer_hops"] = setup.pp - 1 - hosts[-1]
    world["widest_stage"] = max(setup.held_shares(Tier.HBM))
    world["head_bytes"] = clock.model.head_bytes
    world["window_from_s"], world["window_to_s"] = setup.perfetto or (math.inf, -math.inf)
    set_guesses(world, clock.guesser)
    world["prefill_replicas"], world["layers"] = setup.prefill_replicas, setup.rank.n_layers
    world["streams_chunks"] = reuse_of(setup.policy) is Reuse.BLOCKS
    machine = clock.machine
    for name, (latency_s, rate_Bps) in (("peer", machine.peer), ("nic", machine.nic)):
        world[f"{name}_latency_s"], world[f"{name}_byte_s"] = latency_s, 1 / rate_Bps if rate_Bps else math.inf
    world["pcie_latency_s"] = rates.pcie_latency_s
    world["pcie_up_s"], world["pcie_down_s"] = 1 / rates.pcie_h2d_Bps, 1 / rates.pcie_d2h_Bps
    world["ddr_Bps"], world["switch_Bps"], world["nic_Bps"] = host.ddr_Bps, host.switch_Bps, host.nic_Bps
    world["session_kv"] = SESSION_KVS.index(setup.session_kv)
    world["several_tenants"] = len(trace.tenants) > 1
    return world
