"""State on its way to a replica, for which a request waits: when it will be there.

The step fidelity tells that when it sets out, at the rates of that moment. Where somebody else keeps the time, what
moves competes with all else that does, and the request waits until he says that it has come
(`kvsim/run/op/transfers.py`).
"""

import math

from kvsim.engine.state.cluster import Cluster

BY_LOADER, BY_PEER, BY_NIC = range(3)  # ways: from the host's DDR, from another GPU of the host, from another host


def bring(cluster: Cluster, index: int, way: int, nbytes: int, from_s: float, ready_s: float) -> float:
    """Let so many bytes of each rank set out, not before `from_s`; until when the request waits.

    `ready_s` is when they will have come, as far as is known.
    """
    if not cluster.world["step_by_step"]:
        return ready_s
    inbound = cluster.inbound[index]
    cluster.world["set_out"] += 1
    inbound["serial"] = cluster.world["set_out"]
    inbound["way"], inbound["nbytes"], inbound["from_s"] = way, nbytes, from_s
    inbound["late_s"], inbound["least_s"] = 0.0, 0.0
    return math.inf


def delay(cluster: Cluster, index: int, late_s: float, least_s: float) -> None:
    """What comes has to come up to DDR first, block by block: it is there so much later, and not before `least_s`."""
    request = cluster.requests[index]
    request["ready_s"] = max(request["ready_s"] + late_s, least_s)
    if cluster.world["step_by_step"]:
        cluster.inbound[index]["late_s"], cluster.inbound[index]["least_s"] = late_s, least_s
