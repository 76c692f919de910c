"""What bounds an iteration, and what a request's time in the batch was bound by (`kvsim.results.causes`).

A replica's books say how much of its time until now each cause had. What a request has of that is the difference
between two of its events, all of which fall between iterations; so it costs nothing while iterations run.
"""

from kvsim.engine.books.replica import away
from kvsim.engine.state.cluster import Cluster, Floats, Record
from kvsim.hardware.machine import CPU, D2H, H2D, NVLINK
from kvsim.iteration.busy import BOUND, BOUNDS, BY_CPU, BY_HANDOFF, BY_NVLINK, BY_PCIE, BY_SWAP


def note_shared(replica: Record, busy: Floats) -> None:
    """Keep what of an iteration competes with others for the host."""
    replica["shared_s"][0], replica["shared_s"][1], replica["shared_s"][2] = (
        busy[H2D] + busy[D2H],
        busy[CPU],
        busy[NVLINK],
    )


def contend(replica: Record, late_s: float) -> None:
    """An iteration took so much longer than it would alone: copies, CPU work and all-reduces had to share."""
    shared_s = replica["shared_s"][0] + replica["shared_s"][1] + replica["shared_s"][2]
    if shared_s > 0:
        replica["busy_s"][BY_PCIE] += late_s * (replica["shared_s"][0] / shared_s)
        replica["busy_s"][BY_CPU] += late_s * (replica["shared_s"][1] / shared_s)
        replica["busy_s"][BY_NVLINK] += late_s * (replica["shared_s"][2] / shared_s)


def enter_batch(replica: Record, request: Record) -> None:
    """From now on the replica's time is the request's."""
    for i in range(len(BOUNDS)):
        request["bound_s"][i] -= replica["busy_s"][BOUND + i]


def leave_batch(replica: Record, request: Record) -> None:
    """Up to now it was."""
    for i in range(len(BOUNDS)):
        request["bound_s"][i] += replica["busy_s"][BOUND + i]


def preempted(replica: Record, request: Record, now_s: float) -> None:
    """A request makes room for others."""
    leave_batch(replica, request)
    request["since_s"] = now_s


def returned(cluster: Cluster, index: int, now_s: float) -> None:
    """A preempted request is taken on again: all the while it waited for memory."""
    request = cluster.requests[index]
    away(cluster, index, now_s)
    request["bound_s"][BY_SWAP - BOUND] += now_s - request["since_s"]


def taken_in(replica: Record, request: Record, now_s: float) -> None:
    """A request whose prompt was processed elsewhere, and which has left that batch, decodes here from now on."""
    request["bound_s"][BY_HANDOFF - BOUND] += now_s - request["last_token_s"]
    enter_batch(replica, request)


def prefix_ready(replica: Record, request: Record, now_s: float) -> None:
    """A request's cached prefix has come up."""
    request["loading"] = 0
    request["prefix_s"] += now_s - request["since_s"]
    enter_batch(replica, request)


def first_token(replica: Record, request: Record, now_s: float) -> None:
    """A request that is in the batch has its first token."""
    request["first_token_s"] = now_s
    for i in range(len(BOUNDS)):
        request["ttft_bound_s"][i] = request["bound_s"][i] + replica["busy_s"][BOUND + i]


def finish(replica: Record, request: Record, now_s: float) -> None:
    """A request that is in the batch has its last token."""
    request["finish_s"] = now_s
    leave_batch(replica, request)
