"""How the stages of one pipeline meet on their host: which of them are at work at the same time, and with what.

Stages are not independent of each other: where a micro-batch is, no other one is, and what moves on one stage decides
when the next begins. So the times of an iteration's micro-batches on all stages are laid beside each other: a stage
meets another for the part of its own time that both are at work. It finds it on a lane as often as that is there while
it works; always, where both began at the same time, since they do the same then. (In runs of decode steps, where
micro-batches differ in size alone, where they end at the same time as well.)
"""

from kvsim.engine.batch.crowd import IN_STEP, LARGE, MET, SMALL, expect
from kvsim.engine.batch.load import share_of
from kvsim.engine.features import needs
from kvsim.engine.state.cluster import Cluster
from kvsim.hardware.machine import HOST_LANES

REFINED = 3  # how often at most what stages leave one another of their host is priced anew
SAME = 0.05  # of the shorter time on a stage: two events so near each other are one
NEVER_S = 1e300  # between iterations of no time
BEGIN, END = range(2)


@needs("pipeline")
def meet_all(cluster: Cluster, number: int, share: float) -> None:
    """While a stage is at work each other one is for such a share of the time, and uses every lane."""
    for stage in range(cluster.world["stages"]):
        own = cluster.stages[number, stage]
        own["window_s"] = 1.0
        for i in range(len(HOST_LANES)):
            own["lane_s"][i] = 1.0
        for kind in (SMALL, LARGE):
            for other in range(cluster.meets.shape[4]):
                cluster.meets[MET, kind, number, stage, other] = share
                cluster.meets[IN_STEP, kind, number, stage, other] = 1.0


@needs("pipeline", otherwise=0)
def begin_to_meet(cluster: Cluster, number: int, parts: int) -> int:
    """At first as many stages are at work as there are micro-batches; how often that may be refined."""
    world = cluster.world
    if world["step_by_step"]:
        return 0
    meet_all(cluster, number, min(1.0, (parts - 1) / (world["stages"] - 1)))
    _expect_all(cluster, number)
    return REFINED


@needs("pipeline")
def clear_stages(cluster: Cluster, number: int) -> None:
    """Nothing has been priced."""
    for stage in range(cluster.world["stages"]):
        own = cluster.stages[number, stage]
        own["window_s"] = 0.0
        for i in range(len(HOST_LANES)):
            own["lane_s"][i] = own["bound_s"][i] = 0.0


@needs("pipeline", otherwise=False)
def uses_host(cluster: Cluster, number: int) -> bool:
    """Whether what has been priced uses any of the host's lanes."""
    for stage in range(cluster.world["stages"]):
        for i in range(len(HOST_LANES)):
            if cluster.stages[number, stage]["lane_s"][i] > 0:
                return True
    return False


@needs("pipeline")
def meet(cluster: Cluster, number: int, period_s: float, parts: int, divided: int) -> None:
    """Set what stages have of the host by when so many micro-batches are on them (`spans`), again and again.

    They have equal parts of so many `divided` sequences, or any if that is 0.
    """
    world, meets, per_host = cluster.world, cluster.meets, cluster.meets.shape[4]
    if period_s <= 0:
        period_s = NEVER_S
    for stage in range(world["stages"]):
        for place in range(min(per_host, world["stages"] - stage // per_host * per_host)):
            other = stage // per_host * per_host + place
            if other == stage:
                continue
            for kind in (SMALL, LARGE):
                window_s = met_s = in_step_s = 0.0
                for part in range(parts):
                    if _kind(divided, part, parts) == kind:
                        window_s += cluster.spans[END, stage, part] - cluster.spans[BEGIN, stage, part]
                        for beside in range(parts):
                            both_s = _both_s(cluster, stage, part, other, beside, period_s)
                            met_s += both_s
                            if both_s > 0 and _in_step(cluster, stage, part, other, beside, period_s, divided > 0):
                                in_step_s += both_s
                meets[MET, kind, number, stage, place] = min(1.0, met_s / max(window_s, 1e-300))
                meets[IN_STEP, kind, number, stage, place] = in_step_s / max(met_s, 1e-300)
    _expect_all(cluster, number)


def _kind(divided: int, part: int, parts: int) -> int:
    return LARGE if share_of(divided, part + 1, parts) - share_of(divided, part, parts) > divided // parts else SMALL


def _expect_all(cluster: Cluster, number: int) -> None:
    for stage in range(cluster.world["stages"]):
        own = cluster.stages[number, stage]
        expect(cluster, number, stage, SMALL, own["sharing"])
        expect(cluster, number, stage, LARGE, own["of_large"])


def _both_s(cluster: Cluster, stage: int, part: int, other: int, beside: int, period_s: float) -> float:
    """How long a micro-batch is on a stage while another is on another one, in whichever round."""
    spans, both_s = cluster.spans, 0.0
    begin_s, end_s = spans[BEGIN, stage, part], spans[END, stage, part]
    rounds = (begin_s - spans[BEGIN, other, beside]) // period_s
    for i in range(2):
        later_s = (rounds + i) * period_s
        first_s, last_s = spans[BEGIN, other, beside] + later_s, spans[END, other, beside] + later_s
        both_s += max(0.0, min(end_s, last_s) - max(begin_s, first_s))
    return float(both_s)


def _in_step(
    cluster: Cluster, stage: int, part: int, other: int, beside: int, period_s: float, to_the_end: bool
) -> bool:
    """Whether two begin at the same time, and where that is asked for end at the same time as well."""
    spans = cluster.spans
    shorter_s = min(
        spans[END, stage, part] - spans[BEGIN, stage, part], spans[END, other, beside] - spans[BEGIN, other, beside]
    )
    for end in range(BEGIN, END + to_the_end):
        apart_s = (spans[end, stage, part] - spans[end, other, beside]) % period_s
        if min(apart_s, period_s - apart_s) > SAME * shorter_s:
            return False
    return True
