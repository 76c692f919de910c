"""What the ranks of a stage have of their host, by the share of time in which all others use each of its lanes.

Whether somebody else uses a lane at some moment is taken as chance, by itself for each of them: a transfer's rate is
the mean over who else moves, for as long as it lasts. Other replicas are independent of this one. How the stages of its
own pipeline meet is in `meeting.py`.
"""

import math

from kvsim.engine.state.cluster import Cluster, Floats, Record
from kvsim.hardware.machine import CPU, DOWN, HOST_LANES, SLOWDOWN, UP, share_evenly
from kvsim.hardware.sharing import add, begin, crowd, mean_share

WORK = HOST_LANES.index(CPU)  # beside UP and DOWN
MET, IN_STEP = range(2)  # rows of `meets`: for which share of a stage's time another is at work, how much of it in step
SMALL, LARGE = range(2)  # micro-batches of a decode iteration: those with a sequence more than others are large


def expect(cluster: Cluster, number: int, stage: int, kind: int, sharing: Floats) -> None:
    """Set what a stage's ranks, which do the same, have of the host for a kind of micro-batch, by what others use."""
    world, chances = cluster.world, cluster.world["chances"]
    tp, per_switch = int(world["tp"]), int(world["gpus_per_switch"])
    mine, end = _place(cluster, number, stage), _places(cluster, number)
    share_evenly(sharing, tp, min(tp, per_switch), world["ddr_Bps"], world["switch_Bps"])
    for way in (UP, DOWN):
        most_Bps = _of_ddr(cluster, number, stage, kind)
        for switch in range(mine * tp // per_switch, (mine * tp + tp - 1) // per_switch + 1):
            most = begin(chances)
            for other in range(switch * per_switch // tp, end):
                if other != mine:
                    there = _ranks_on(other, tp, switch, per_switch)
                    if there == 0:
                        break  # nor are those after it
                    most = add(chances, most, there, _use(cluster, number, stage, kind, other, way))
            own = _ranks_on(mine, tp, switch, per_switch)
            crowd(sharing, HOST_LANES[way], chances, most, own, world["switch_Bps"], most_Bps)
    most = begin(chances)
    for other in range(end):
        if other != mine:
            most = add(chances, most, tp, _use(cluster, number, stage, kind, other, WORK))
    sharing[SLOWDOWN, CPU] = 1 / mean_share(chances, most, tp)


def _of_ddr(cluster: Cluster, number: int, stage: int, kind: int) -> float:
    """The rate that the host's DDR leaves a stage's ranks, each way; any where it has enough for all links."""
    world, chances, tp = cluster.world, cluster.world["chances"], int(cluster.world["tp"])
    mine, end = _place(cluster, number, stage), _places(cluster, number)
    if world["ddr_Bps"] * min(world["pcie_up_s"], world["pcie_down_s"]) >= 2 * tp * end:
        return math.inf
    most = begin(chances)
    for other in range(end):
        if other != mine:
            use = _use(cluster, number, stage, kind, other, UP) + _use(cluster, number, stage, kind, other, DOWN)
            most = add(chances, most, tp, min(1.0, use))
    return float(world["ddr_Bps"] * mean_share(chances, most, tp))


def _stages_on_host(world: Record) -> int:
    return int(world["gpus_on_host"] // world["tp"])


def _place(cluster: Cluster, number: int, stage: int) -> int:
    """Where on its host a stage is, counted in stages of all its replicas."""
    per_host = _stages_on_host(cluster.world)
    return int((number - cluster.replicas[number]["first_neighbour"]) * per_host + stage % per_host)


def _places(cluster: Cluster, number: int) -> int:
    """How many stages a replica's host has, at the most."""
    return int(cluster.replicas[number]["n_neighbours"]) * _stages_on_host(cluster.world)


def _use(cluster: Cluster, number: int, stage: int, kind: int, place: int, lane: int) -> float:
    """The share of time in which the stage at a place of the host uses a lane while this one is at work."""
    per_host = _stages_on_host(cluster.world)
    replica, other = int(cluster.replicas[number]["first_neighbour"]) + place // per_host, place % per_host
    other += stage // per_host * per_host
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
