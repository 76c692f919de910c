"""What a replica has of its host while others use it too: each says how much of its time it keeps which lane busy.

Whether a neighbour uses a lane at some moment is taken as chance, by itself for each of them: a transfer's rate is the
mean over who else moves, for as long as it lasts. A run of a neighbour is cut, and priced anew, where that has moved by
more than it can be told apart from noise.
"""

import math

from kvsim.engine.batch.runs import cut_run
from kvsim.engine.state.cluster import COUNT, IDLE, ITERATING, NOBODY, RUNNING, STALLED, Cluster, Floats, Prices, Record
from kvsim.hardware.machine import CPU, D2H, DOWN, H2D, HOST_LANES, SHARING, SLOWDOWN, UP, byte_s, share_evenly
from kvsim.hardware.sharing import add, begin, crowd, mean_share
from kvsim.iteration.busy import BY_CPU, BY_PCIE

MOVED = 0.02  # of an iteration's time: less is no reason to cut a run
WORK = HOST_LANES.index(CPU)  # beside UP and DOWN


def set_sharing(cluster: Cluster, number: int) -> None:
    """Set what a replica has of its host, by what its neighbours do."""
    world, replica = cluster.world, cluster.replicas[number]
    if not world["step_by_step"] and replica["n_neighbours"] > 1 and world["stages"] == 1:
        _expect(cluster, number, replica["sharing"])


def publish(cluster: Cluster, prices: Prices, number: int, now_s: float) -> None:
    """Say how much of the host a replica uses from now on, and cut runs of others whose times depend on that."""
    world, replica = cluster.world, cluster.replicas[number]
    if world["step_by_step"] or replica["n_neighbours"] == 1:
        return
    first = replica["first_neighbour"]
    if world["stages"] > 1:
        _divide(cluster, prices, number, now_s)
        return
    if not _set_use(cluster, number, now_s):
        return
    for other in range(first, first + replica["n_neighbours"]):
        phase = NOBODY if other == number else cluster.replicas[other]["phase"]
        if phase == ITERATING and cluster.replicas[other]["wake_s"] > now_s:
            _expect(cluster, other, world["sharing"])
            _retime(world, cluster.replicas[other], now_s)
        elif phase == RUNNING and not cluster.replicas[other]["cut"] and _uses_host(cluster, prices, other):
            _expect(cluster, other, world["sharing"])
            if _moved(world, cluster.replicas[other]):
                cut_run(cluster, other, now_s)


def _divide(cluster: Cluster, prices: Prices, number: int, now_s: float) -> None:
    """A host of pipelines is divided by those that have something to do, which loads have, too."""
    world, replica, first = cluster.world, cluster.replicas[number], int(cluster.replicas[number]["first_neighbour"])
    busy = int(replica["phase"] != IDLE or replica["wake_s"] < math.inf)
    if busy == replica["busy_now"]:
        return
    replica["busy_now"] = busy
    own, per_switch = int(world["gpus_on_host"]), int(world["gpus_per_switch"])
    for one in range(first, first + replica["n_neighbours"]):
        position, on_host, on_switch = (one - first) * own, 0, 0
        for switch in range(position // per_switch, (position + own - 1) // per_switch + 1):
            there, on_host = 0, 0
            for other in range(first, first + replica["n_neighbours"]):
                if other == one or cluster.replicas[other]["busy_now"]:
                    on_host += own
                    there += _ranks_on(other - first, own, switch, per_switch)
            on_switch = max(on_switch, there)
        cluster.replicas[one]["on_host"], cluster.replicas[one]["on_switch"] = on_host, on_switch
        running = one != number and cluster.replicas[one]["phase"] == RUNNING and not cluster.replicas[one]["cut"]
        if running and _uses_host(cluster, prices, one):
            cut_run(cluster, one, now_s)


def _set_use(cluster: Cluster, number: int, now_s: float) -> bool:
    """Set the share of time in which a replica uses each lane of the host, where it has changed; whether it has."""
    world, replica = cluster.world, cluster.replicas[number]
    phase, changed = replica["phase"], False
    end_s = replica["end_s"] if phase == RUNNING else replica["wake_s"]
    for i in range(len(HOST_LANES)):
        lane, use = HOST_LANES[i], 0.0
        if phase == RUNNING:
            part = cluster.parts[number, 0]
            use = part["busy_s"][lane] / part["first_s"]
        elif phase == ITERATING:
            pcie_s = world["busy_s"][H2D] + world["busy_s"][D2H]
            bound_s = world["busy_s"][BY_CPU]
            if i != WORK:
                bound_s = world["busy_s"][BY_PCIE] * (world["busy_s"][lane] / pcie_s) if pcie_s > 0 else 0.0
            replica["bound"][i] = bound_s / max(end_s - now_s, 1e-300)
            use = world["busy_s"][lane] / max(end_s - now_s, 1e-300)
        elif phase == STALLED and i != WORK:
            use = 0.5
        if i == UP and replica["loader_free_s"] > now_s:
            use += min(1.0, (replica["loader_free_s"] - now_s) / max(end_s - now_s, 1e-300))
        use = min(1.0, use)
        if abs(replica["use"][i] - use) > MOVED / 2 or (use == 0 and replica["use"][i] != 0):
            replica["use"][i], changed = use, True
    return changed


def _moved(world: Record, replica: Record) -> bool:
    """Whether what a replica would have of the host now lets its run take another time than what it had."""
    for i in range(len(HOST_LANES)):
        if replica["use"][i] * abs(_ratio(world, replica, i) - 1) > MOVED:
            return True
    return False


def _ratio(world: Record, replica: Record, i: int) -> float:
    """How much longer a lane's work takes with `world`'s sharing than with the replica's."""
    lane = HOST_LANES[i]
    if i == WORK:
        return float(world["sharing"][SLOWDOWN, lane] / replica["sharing"][SLOWDOWN, lane])
    link_s = world["pcie_up_s"] if i == UP else world["pcie_down_s"]
    return byte_s(link_s, world["sharing"], lane) / byte_s(link_s, replica["sharing"], lane)


def _retime(world: Record, replica: Record, now_s: float) -> None:
    """Let what is left of an iteration take as much longer or shorter as what bounds it does."""
    left_s = replica["wake_s"] - now_s
    for i in range(len(HOST_LANES)):
        late_s = left_s * replica["bound"][i] * (_ratio(world, replica, i) - 1)
        replica["wake_s"] += late_s
        replica["busy_s"][HOST_LANES[i]] += late_s
        replica["busy_s"][BY_CPU if i == WORK else BY_PCIE] += late_s
    for i in range(len(SHARING)):
        for lane in HOST_LANES:
            replica["sharing"][i, lane] = world["sharing"][i, lane]


def _expect(cluster: Cluster, number: int, sharing: Floats) -> None:
    """What a replica's ranks have of the host, which are on it at the same time, by the use of all others."""
    world, replica, chances = cluster.world, cluster.replicas[number], cluster.world["chances"]
    own, per_switch, first = int(world["gpus_on_host"]), int(world["gpus_per_switch"]), int(replica["first_neighbour"])
    end, position = int(first + replica["n_neighbours"]), (number - first) * own
    share_evenly(sharing, own, min(own, per_switch), world["ddr_Bps"], world["switch_Bps"])
    for way in (UP, DOWN):
        most_Bps = _of_ddr(cluster, number)
        for switch in range(position // per_switch, (position + own - 1) // per_switch + 1):
            most = begin(chances)
            for other in range(max(first, first + switch * per_switch // own), end):
                if other != number:
                    there = _ranks_on(other - first, own, switch, per_switch)
                    if there == 0:
                        break  # nor are those after it
                    most = add(chances, most, there, cluster.replicas[other]["use"][way])
            mine = _ranks_on(number - first, own, switch, per_switch)
            crowd(sharing, HOST_LANES[way], chances, most, mine, world["switch_Bps"], most_Bps)
    most = begin(chances)
    for other in range(first, end):
        if other != number:
            most = add(chances, most, own, cluster.replicas[other]["use"][WORK])
    sharing[SLOWDOWN, CPU] = 1 / mean_share(chances, most, own)


def _of_ddr(cluster: Cluster, number: int) -> float:
    """The rate that the host's DDR leaves a replica's ranks, each way; any where it has enough for all links."""
    world, replica, chances = cluster.world, cluster.replicas[number], cluster.world["chances"]
    own, first, n = int(world["gpus_on_host"]), int(replica["first_neighbour"]), int(replica["n_neighbours"])
    if world["ddr_Bps"] * min(world["pcie_up_s"], world["pcie_down_s"]) >= 2 * own * n:
        return math.inf
    most = begin(chances)
    for other in range(first, first + n):
        if other != number:
            use = cluster.replicas[other]["use"]
            most = add(chances, most, own, min(1.0, use[UP] + use[DOWN]))
    return float(world["ddr_Bps"] * mean_share(chances, most, own))


def _ranks_on(place: int, own: int, switch: int, per_switch: int) -> int:
    low, high = place * own, (place + 1) * own
    return max(0, min(high, (switch + 1) * per_switch) - max(low, switch * per_switch))


def _uses_host(cluster: Cluster, prices: Prices, number: int) -> bool:
    for structure in range(cluster.sums.shape[1]):
        if cluster.sums[number, structure, 0, COUNT] and prices.structures[structure]["uses_host"]:
            return True
    return False
