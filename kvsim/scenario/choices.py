"""The names that options choose from, in the order of the engine's numbers, and the latencies that an SLO may bound."""

from typing import NamedTuple

FIDELITIES = ("step", "op")
SCHEDULERS = ("fcfs", "priority", "fair")
ROUTERS = ("round-robin", "least-loaded", "prefix-affinity", "kv-aware")
CACHE_ROUTERS = ROUTERS[2:]  # these look into prefix caches
ENGINES = ("vllm", "vllm-0.16", "sglang")  # whose reserve of memory, in engine_memory
PREEMPTIONS = ("swap", "recompute")
SESSIONS = ("open", "closed")
SESSION_KVS = ("recompute", "keep", "swap", "cheapest")  # what becomes of a turn's state
LEVELS = ("none", "requests", "next-use", "queue")  # what an order knows of a block beside its age


class Eviction(NamedTuple):
    """An eviction order: what blocks are ranked by before their age, and whether use makes them young again."""

    level: str = "none"
    renewed_by_use: bool = True
    remark: str = ""


EVICTION_ORDERS = {
    "lru": Eviction(),
    "lfu": Eviction("requests"),
    "fifo": Eviction(renewed_by_use=False),
    "belady": Eviction("next-use", remark="knows the future"),
    "scheduler-aware": Eviction("queue"),
}
EVICTIONS = tuple(EVICTION_ORDERS)
EVICTION_HELP = ", ".join(f"{name} ({o.remark})" if o.remark else name for name, o in EVICTION_ORDERS.items()) + "."
WRITES = ("through", "back")
SHARINGS = ("tenant", "all")  # who may hit a block: its tenant alone, lest latency tells others of it, or everybody
REUSES = ("always", "cheaper")
LATENCIES = ("ttft_s", "tpot_s", "e2e_s", "queue_s")
"""The latencies that each finished request has; `itl_s` belongs to tokens instead."""
