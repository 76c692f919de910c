"""What the ranks of a stage have of their host, by the share of time in which all others use each of its lanes.

Whether somebody else uses a lane at some moment is taken as chance, by itself for each of them: a transfer's rate is
the mean over who else moves, for as long as it lasts. Other replicas are independent of this one. How the stages of its
own pipeline meet is in `meeting.py`.
"""

import math

from kvsim.engine.state.cluster import Cluster, Floats
from kvsim.hardware.machine import CPU, DOWN, HOST_LANES, SLOWDOWN, UP, share_evenly
from kvsim.hardware.sharing import add, begin, crowd, mean_share

WORK = HOST_LANES.index(CPU)  # beside UP and DOWN
MET, IN_STEP = range(2)  # rows of `meets`: for which share of a stage's time another is at work, how much of it in step
SMALL, LARGE = range(2)  # micro-batches of a decode iteration: those with a sequence more than others are large


def expect(cluster: Cluster, number: int, stage: int, kind: int, sharing: Floats) -> None:
    """Set what a stage's ranks, which do the same, have of the host for a kind of micro-batch, by what others use."""
    world, chances = cluster.world, cluster.world["chances"]
    tp, per_switch, stages = int(world["tp"]), int(world["gpus_per_switch"]), int(world["stages"])
    per_host = 1 if stages == 1 else int(world["gpus_on_host"]) // tp  # stages of a replica
    first = int(cluster.replicas[number]["first_neighbour"])
    # Places on the host are counted in stages of all its replicas.
    mine, end = (number - first) * per_host + stage % per_host, int(cluster.replicas[number]["n_neighbours"]) * per_host
    share_evenly(sharing, tp, min(tp, per_switch), world["ddr_Bps"], world["switch_Bps"])
    most_Bps = math.inf
    if world["ddr_Bps"] * min(world["pcie_up_s"], world["pcie_down_s"]) < 2 * tp * end:  # not enough for all links
        most = begin(chances)
        for other in range(end):
            if other != mine:
                use = _use(cluster, first, per_host, number, stage, kind, other, UP)
                use += _use(cluster, first, per_host, number, stage, kind, other, DOWN)
                most = add(chances, most, tp, min(1.0, use))
        most_Bps = float(world["ddr_Bps"] * mean_share(chances, most, tp))
    for way in (UP, DOWN):
        for switch in range(mine * tp // per_switch, (mine * tp + tp - 1) // per_switch + 1):
            most = begin(chances)
            for other in range(switch * per_switch // tp, end):
                if other != mine:
                    there = _ranks_on(other, tp, switch, per_switch)
                    if there == 0:
                        break  # nor are those after it
                    use = _use(cluster, first, per_host, number, stage, kind, other, way)
                    most = add(chances, most, there, use)
            own = _ranks_on(mine, tp, switch, per_switch)
            crowd(sharing, HOST_LANES[way], chances, most, own, world["switch_Bps"], most_Bps)
    most = begin(chances)
    for other in range(end):
        if other != mine:
            most = add(chances, most, tp, _use(cluster, first, per_host, number, stage, kind, other, WORK))
    sharing[SLOWDOWN, CPU] = 1 / mean_share(chances, most, tp)


def _use(
    cluster: Cluster, first: int, per_host: int, number: int, stage: int, kind: int, place: int, lane: int
) -> float:
    """The share of time in which the stage at a place of the host uses a lane while this one is at work.

    `first` is the first replica of the host, on which each has `per_host` stages.
    """
    if per_host == 1:
        return float(cluster.stages[first + place, stage]["use"][lane])
    replica, other = first + place // per_host, place % per_host + stage // per_host * per_host
    if other >= cluster.world["stages"]:
        return 0.0
    if replica != number:
        return float(cluster.stages[replica, other]["use"][lane])
    own, lane_s = cluster.stages[number, other], cluster.stages[number, other]["lane_s"][lane]
    if lane_s == 0:
        return 0.0
    in_step = cluster.meets[IN_STEP, kind, number, stage, place % per_host]
    density = min(1.0, lane_s / max(own["window_s"], 1e-300))
    return float(cluster.meets[MET, kind, number, stage, place % per_host] * (in_step + (1 - in_step) * density))


def _ranks_on(place: int, own: int, switch: int, per_switch: int) -> int:
    low, high = place * own, (place + 1) * own
    return max(0, min(high, (switch + 1) * per_switch) - max(low, switch * per_switch))
