"""The names that options choose from, in the order of the engine's numbers, and the latencies that an SLO may bound."""

FIDELITIES = ("step", "op")
SCHEDULERS = ("fcfs", "priority", "fair")
ROUTERS = ("round-robin", "least-loaded", "prefix-affinity", "kv-aware")
CACHE_ROUTERS = ROUTERS[2:]  # these look into prefix caches
PREEMPTIONS = ("swap", "recompute")
SESSIONS = ("open", "closed")
SESSION_KVS = ("recompute", "keep", "swap", "cheapest")  # what becomes of a turn's state
EVICTIONS = ("lru", "lfu", "fifo", "belady", "scheduler-aware")
WRITES = ("through", "back")
SHARINGS = ("tenant", "all")  # who may hit a block: its tenant alone, lest latency tells others of it, or everybody
REUSES = ("always", "cheaper")
LATENCIES = ("ttft_s", "tpot_s", "e2e_s", "queue_s")
"""The latencies that each finished request has; `itl_s` belongs to tokens instead."""
