"""Which replicas of a host are busy at the moment: what the host is divided by."""

from kvsim.engine.batch.runs import cut_run
from kvsim.engine.state.cluster import COUNT, RUNNING, Cluster, Prices
from kvsim.hardware.machine import share_evenly


def share(cluster: Cluster, prices: Prices, number: int, busy: int, now_s: float) -> None:
    """A replica has something to do (1), or has run out of work (0).

    Divides the host anew, and ends the runs of other replicas early where their times depend on that.
    """
    cluster.replicas[number]["busy_now"] = busy
    if cluster.world["step_by_step"]:
        return
    first = cluster.replicas[number]["first_neighbour"]
    for other in range(first, first + cluster.replicas[number]["n_neighbours"]):
        replica = cluster.replicas[other]
        _set_shares(cluster, other)
        running = other != number and replica["phase"] == RUNNING and not replica["cut"]
        if running and _uses_host(cluster, prices, other):
            cut_run(cluster, other, now_s)


def _set_shares(cluster: Cluster, number: int) -> None:
    """How many GPUs of the host, and of this replica's most crowded switch, are busy; its own count always."""
    replica, world = cluster.replicas[number], cluster.world
    first, each, per_switch = replica["first_neighbour"], world["gpus_on_host"], world["gpus_per_switch"]
    on_host, on_switch, own = 0, 0, (number - first) * each
    for other in range(first, first + replica["n_neighbours"]):
        if other == number or cluster.replicas[other]["busy_now"]:
            on_host += each
    for switch in range(own // per_switch, (own + each - 1) // per_switch + 1):
        there = 0
        for other in range(first, first + replica["n_neighbours"]):
            if other == number or cluster.replicas[other]["busy_now"]:
                low, high = (other - first) * each, (other - first + 1) * each
                there += max(0, min(high, (switch + 1) * per_switch) - max(low, switch * per_switch))
        on_switch = max(on_switch, there)
    replica["on_host"], replica["on_switch"] = on_host, on_switch
    share_evenly(replica["sharing"], on_host, on_switch, world["ddr_Bps"], world["switch_Bps"])


def _uses_host(cluster: Cluster, prices: Prices, number: int) -> bool:
    for structure in range(cluster.sums.shape[1]):
        if cluster.sums[number, structure, 0, COUNT] and prices.structures[structure]["uses_host"]:
            return True
    return False
