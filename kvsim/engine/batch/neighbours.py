"""What a replica has of its host while others use it too: each says how much of its time it keeps which lane busy.

What that leaves is in `crowd.py`. A run of a neighbour is cut, and priced anew, where it has moved by more than it can
be told apart from noise.
"""

from kvsim.engine.batch.crowd import SMALL, WORK, expect
from kvsim.engine.batch.meeting import meet_all
from kvsim.engine.batch.runs import cut_run
from kvsim.engine.pipeline import delay_round
from kvsim.engine.state.cluster import COUNT, ITERATING, NOBODY, RUNNING, STALLED, Cluster, Prices, Record
from kvsim.hardware.machine import D2H, H2D, HOST_LANES, LANES, SHARING, SLOWDOWN, UP, byte_s
from kvsim.iteration.busy import BY_CPU, BY_PCIE

MOVED = 0.02  # of an iteration's time: less is no reason to cut a run


def set_sharing(cluster: Cluster, number: int) -> None:
    """Set what a replica has of its host, by what its neighbours do."""
    world, replica = cluster.world, cluster.replicas[number]
    if world["step_by_step"] or (replica["n_neighbours"] == 1 and world["stages"] == 1):
        return
    if world["stages"] > 1:
        meet_all(cluster, number, 1.0)
    expect(cluster, number, 0, SMALL, cluster.stages[number, 0]["sharing"])
    for i in range(len(SHARING)):
        for lane in range(len(LANES)):
            replica["sharing"][i, lane] = cluster.stages[number, 0]["sharing"][i, lane]


def publish(cluster: Cluster, prices: Prices, number: int, now_s: float) -> None:
    """Say how much of the host a replica uses from now on, and cut runs of others whose times depend on that."""
    world, replica = cluster.world, cluster.replicas[number]
    if world["step_by_step"] or replica["n_neighbours"] == 1:
        return
    first = replica["first_neighbour"]
    changed = False
    for stage in range(world["stages"]):
        changed = _set_use(cluster, number, stage, now_s) or changed
    if not changed:
        return
    for other in range(first, first + replica["n_neighbours"]):
        phase = NOBODY if other == number else cluster.replicas[other]["phase"]
        if phase == ITERATING and cluster.replicas[other]["wake_s"] > now_s:
            _retime(cluster, other, now_s)
        elif phase == RUNNING and not cluster.replicas[other]["cut"] and _uses_host(cluster, prices, other):
            moved = False
            for stage in range(world["stages"]):
                if not moved:
                    expect(cluster, other, stage, SMALL, world["sharing"])
                    moved = _moved(world, cluster.stages[other, stage])
            if moved:
                cut_run(cluster, other, now_s)


def _set_use(cluster: Cluster, number: int, stage: int, now_s: float) -> bool:
    """Set the share of time in which a stage uses each lane of the host, where it has changed; whether it has."""
    world, replica, own = cluster.world, cluster.replicas[number], cluster.stages[number, stage]
    phase, changed = replica["phase"], False
    end_s = replica["end_s"] if phase == RUNNING else replica["wake_s"]
    for i in range(len(HOST_LANES)):
        lane, use = HOST_LANES[i], 0.0
        if phase == RUNNING:
            part = cluster.parts[number, 0]
            lane_s = own["lane_s"][i] if world["stages"] > 1 else part["busy_s"][lane]
            use = lane_s / part["first_s"]
        elif phase == ITERATING and world["stages"] > 1:
            own["bound"][i] = own["bound_s"][i] / max(end_s - now_s, 1e-300)
            use = own["lane_s"][i] / max(end_s - now_s, 1e-300)
        elif phase == ITERATING:
            pcie_s = world["busy_s"][H2D] + world["busy_s"][D2H]
            bound_s = world["busy_s"][BY_CPU]
            if i != WORK:
                bound_s = world["busy_s"][BY_PCIE] * (world["busy_s"][lane] / pcie_s) if pcie_s > 0 else 0.0
            own["bound"][i] = bound_s / max(end_s - now_s, 1e-300)
            use = world["busy_s"][lane] / max(end_s - now_s, 1e-300)
        elif phase == STALLED and i != WORK:
            use = 0.5
        if i == UP and replica["loader_free_s"] > now_s:
            use += min(1.0, (replica["loader_free_s"] - now_s) / max(end_s - now_s, 1e-300))
        use = min(1.0, use)
        if abs(own["use"][i] - use) > MOVED / 2 or (use == 0 and own["use"][i] != 0):
            own["use"][i], changed = use, True
    return changed


def _moved(world: Record, own: Record) -> bool:
    """Whether what a stage would have of the host now lets its run take another time than what it had."""
    for i in range(len(HOST_LANES)):
        if own["use"][i] * abs(_ratio(world, own, i) - 1) > MOVED:
            return True
    return False


def _ratio(world: Record, own: Record, i: int) -> float:
    """How much longer a lane's work takes with `world`'s sharing than with the stage's."""
    lane = HOST_LANES[i]
    if i == WORK:
        return float(world["sharing"][SLOWDOWN, lane] / own["sharing"][SLOWDOWN, lane])
    link_s = world["pcie_up_s"] if i == UP else world["pcie_down_s"]
    return byte_s(link_s, world["sharing"], lane) / byte_s(link_s, own["sharing"], lane)


def _retime(cluster: Cluster, number: int, now_s: float) -> None:
    """Let what is left of an iteration take as much longer or shorter as what bounds it does."""
    world, replica = cluster.world, cluster.replicas[number]
    left_s = replica["wake_s"] - now_s
    for stage in range(world["stages"]):
        own = cluster.stages[number, stage]
        expect(cluster, number, stage, SMALL, world["sharing"])
        for i in range(len(HOST_LANES)):
            late_s = left_s * own["bound"][i] * (_ratio(world, own, i) - 1)
            replica["wake_s"] += late_s
            replica["busy_s"][HOST_LANES[i]] += late_s
            replica["busy_s"][BY_CPU if i == WORK else BY_PCIE] += late_s
        for i in range(len(SHARING)):
            for lane in HOST_LANES:
                own["sharing"][i, lane] = replica["sharing"][i, lane] = world["sharing"][i, lane]
    if world["stages"] > 1:
        delay_round(cluster, number, now_s, left_s)


def _uses_host(cluster: Cluster, prices: Prices, number: int) -> bool:
    for structure in range(cluster.sums.shape[1]):
        if cluster.sums[number, structure, 0, COUNT] and prices.structures[structure]["uses_host"]:
            return True
    return False
