"""Whose request is next: the queues of the tenants at a replica, their service counters and their quotas.

`next_request` is the one place that says who is next. `fcfs` and `priority` need no more than the order of arrival
and a number; `fair` is the Virtual Token Counter of arXiv:2401.00588 (Algorithm 2), one counter for each tenant and
replica: the service that a tenant has had, by its weight, raised when it comes back to the queue after an absence.
"""

from kvsim.engine.features import needs
from kvsim.engine.requests.queues import push_first, push_last, take_out
from kvsim.engine.state.cluster import FAIR, NOBODY, PRIORITY, SWAPPED, WAITING, Cluster, Record


def next_request(cluster: Cluster, number: int, iterations: int) -> int:
    """The swapped or waiting request that is next after so many further decode iterations.

    Requests of a tenant that is over its quota are passed over. Those swapped out come before those that wait (with
    `priority`, among equals), and at a tie the one that has queued for longest.
    """
    chosen = NOBODY
    for tenant in range(cluster.tenants.shape[1]):
        index = _head(cluster.tenants[number, tenant])
        if index != NOBODY and (chosen == NOBODY or _precedes(cluster, number, index, chosen, iterations)):
            chosen = index
    return chosen


def _head(tenant: Record) -> int:
    if tenant["over_quota"]:
        return NOBODY
    return int(tenant["first"][SWAPPED] if tenant["length"][SWAPPED] else tenant["first"][WAITING])


@needs("tenants", otherwise=False)
def _precedes(cluster: Cluster, number: int, index: int, other: int, iterations: int) -> bool:
    one, two = cluster.requests[index], cluster.requests[other]
    scheduler, tenants = cluster.world["scheduler"], cluster.tenants[number]
    if scheduler == PRIORITY and tenants[one["tenant"]]["priority"] != tenants[two["tenant"]]["priority"]:
        return bool(tenants[one["tenant"]]["priority"] > tenants[two["tenant"]]["priority"])
    if one["queue"] != two["queue"]:
        return bool(one["queue"] == SWAPPED)
    if scheduler == FAIR and one["queue"] == WAITING:
        own = counter(cluster, number, one["tenant"], iterations)
        others = counter(cluster, number, two["tenant"], iterations)
        if own != others:
            return own < others
    return bool(one["ticket"] < two["ticket"])


def counter(cluster: Cluster, number: int, tenant: int, iterations: int) -> float:
    """A tenant's virtual counter after so many further iterations of its decoding sequences."""
    world, record = cluster.world, cluster.tenants[number, tenant]
    output_tokens = record["output_tokens"] + iterations * record["decoding"] * world["tokens_per_step"]
    service = world["prompt_weight"] * record["prompt_tokens"] + world["output_weight"] * output_tokens
    return float(record["lift"] + service / record["weight"])


def queue_newcomer(cluster: Cluster, number: int, index: int, iterations: int) -> bool:
    """Let a request that has arrived wait, `iterations` after the last boundary; whether it changes who is next.

    That is judged at the end of the iteration under way.
    """
    replica, tenant = cluster.replicas[number], cluster.tenants[number, cluster.requests[index]["tenant"]]
    joins = tenant["length"][WAITING] == 0
    _queue(cluster, number, index, False, iterations)
    if joins and cluster.world["scheduler"] == FAIR and not replica["length"][SWAPPED]:
        return True
    return next_request(cluster, number, iterations + 1) == index


def queue_again(cluster: Cluster, number: int, index: int) -> None:
    """Let a request that has been preempted wait before all others of its tenant."""
    _queue(cluster, number, index, True, 0)


def _queue(cluster: Cluster, number: int, index: int, first: bool, iterations: int) -> None:
    request = cluster.requests[index]
    if cluster.world["scheduler"] == FAIR and cluster.tenants[number, request["tenant"]]["length"][WAITING] == 0:
        _lift(cluster, number, request["tenant"], iterations)
    put(cluster, number, index, WAITING, first)


@needs("tenants")
def _lift(cluster: Cluster, number: int, tenant: int, iterations: int) -> None:
    """A tenant comes back to the queue: its counter is at least the smallest there, or that of who left it last."""
    least, floor = NOBODY, 0.0
    for other in range(cluster.tenants.shape[1]):
        if cluster.tenants[number, other]["length"][WAITING]:
            value = counter(cluster, number, other, iterations)
            if least == NOBODY or value < floor:
                least, floor = other, value
    if least == NOBODY:
        least = cluster.replicas[number]["left_queue"]
        if least == NOBODY:
            return
        floor = counter(cluster, number, least, iterations)
    own = counter(cluster, number, tenant, iterations)
    if own < floor:
        cluster.tenants[number, tenant]["lift"] += floor - own


def put(cluster: Cluster, number: int, index: int, queue: int, first: bool) -> None:
    """Put a request that is in no list into its tenant's swapped or waiting ones."""
    replica, request = cluster.replicas[number], cluster.requests[index]
    tenant = cluster.tenants[number, request["tenant"]]
    replica["length"][queue] += 1
    if queue == WAITING:
        replica["queued_ps"] += request["prefill_ps"]
    if first:
        replica["first_ticket"] -= 1
        request["ticket"] = replica["first_ticket"]
        push_first(cluster.requests, tenant, queue, index)
    else:
        replica["last_ticket"] += 1
        request["ticket"] = replica["last_ticket"]
        push_last(cluster.requests, tenant, queue, index)


def pick(cluster: Cluster, number: int, index: int) -> None:
    """Take a request out of its tenant's swapped or waiting ones."""
    replica, request = cluster.replicas[number], cluster.requests[index]
    replica["length"][request["queue"]] -= 1
    if request["queue"] == WAITING:
        replica["left_queue"] = request["tenant"]
        replica["queued_ps"] -= request["prefill_ps"]
    take_out(cluster.requests, cluster.tenants[number, request["tenant"]], index)


def steps_until_overtaken(cluster: Cluster, number: int, steps: int) -> int:
    """Iterations until another tenant's request overtakes the waiting one that is next, at most `steps`.

    Counters of decoding tenants grow evenly, so once another one's is smaller it stays so.
    """
    if cluster.world["scheduler"] != FAIR:
        return steps
    index = next_request(cluster, number, 0)
    if index == NOBODY or cluster.requests[index]["queue"] == SWAPPED:
        return steps
    for tenant in range(cluster.tenants.shape[1]):
        other = _head(cluster.tenants[number, tenant])
        if other in (NOBODY, index) or not _precedes(cluster, number, other, index, steps):
            continue
        low = 0  # it does not precede yet
        while steps - low > 1:
            half = (low + steps) // 2
            if _precedes(cluster, number, other, index, half):
                steps = half
            else:
                low = half
    return steps


def steps_within_quotas(cluster: Cluster, number: int, steps: int) -> int:
    """Iterations until a tenant's next one would exceed its quota, at most `steps`."""
    for i in range(cluster.tenants.shape[1]):
        tenant = cluster.tenants[number, i]
        if tenant["growth_bytes"] > 0:
            steps = min(steps, (tenant["quota_bytes"] - used_by_tenant(tenant)) // tenant["growth_bytes"] + 1)
    return steps


def used_by_tenant(tenant: Record) -> int:
    """Bytes of HBM that a tenant's sequences hold in the next iteration."""
    return int(tenant["held_bytes"] + tenant["stored_bytes"])


def fits_quota(cluster: Cluster, number: int, index: int, hbm_bytes: int) -> bool:
    """Whether so much more HBM fits the quota of a request's tenant, with a margin as that of a replica."""
    tenant = cluster.tenants[number, cluster.requests[index]["tenant"]]
    margin_bytes = tenant["watermark_bytes"] if used_by_tenant(tenant) else 0
    return bool(used_by_tenant(tenant) + hbm_bytes + margin_bytes <= tenant["quota_bytes"])


def clear_over_quota(cluster: Cluster, number: int) -> None:
    """Forget which tenants were over their quota when requests were last admitted."""
    for tenant in range(cluster.tenants.shape[1]):
        cluster.tenants[number, tenant]["over_quota"] = 0


def charge_prompt(cluster: Cluster, number: int, index: int, tokens: int) -> None:
    """A request has been admitted whose prefill computes so many tokens of its prompt."""
    cluster.tenants[number, cluster.requests[index]["tenant"]]["prompt_tokens"] += tokens


def charge_output(cluster: Cluster, number: int, index: int) -> None:
    """A prefill has emitted a token."""
    cluster.tenants[number, cluster.requests[index]["tenant"]]["output_tokens"] += 1


def take_back_output(cluster: Cluster, number: int, index: int, tokens: float) -> None:
    """A request's last step has emitted so many tokens less than steps do."""
    cluster.tenants[number, cluster.requests[index]["tenant"]]["output_tokens"] -= tokens


def advance_tenants(cluster: Cluster, number: int, steps: int) -> None:
    """All decoding sequences have done `steps` iterations."""
    for i in range(cluster.tenants.shape[1]):
        tenant = cluster.tenants[number, i]
        last_bytes = used_by_tenant(tenant) + (steps - 1) * tenant["growth_bytes"]
        tenant["peak_bytes"] = max(tenant["peak_bytes"], used_by_tenant(tenant), last_bytes)
        tenant["output_tokens"] += steps * tenant["decoding"] * cluster.world["tokens_per_step"]
        tenant["stored_bytes"] += steps * tenant["growth_bytes"]
