"""The price of an iteration against numpy and a schedule written out layer by layer, and what sharing does to it."""

import numpy as np
import pytest
from simulated import GPU, HOST, MODEL

from kvsim.hardware.machine import CPU, D2H, FLOOR, H2D, LANES, NVLINK, SLOWDOWN, SM, Machine
from kvsim.iteration.busy import BOUND, BUSY
from kvsim.iteration.clock import Clock, Load
from kvsim.iteration.timeline import schedule
from kvsim.plans.derive import AMOUNTS, TIERS, PlanTable
from policies import parse_policy

POLICIES = ["full", "shadowkv", "infllm", "offload-all", "retrieval-attention", "squeezed-attention", "quest"]


def loads(policy, machine, prompt, decoding):
    """Loads of sequences that decode, and of a chunk of a prompt."""
    table = PlanTable(parse_policy(policy), MODEL.shard(machine.tp), machine, {})
    segment = table.decode(prompt, 1)
    chunk = Load(*table.prefill(prompt, prompt // 2, prompt - prompt // 2))
    return [Load(segment.piece.structure, segment.start * decoding), chunk]


def op_seconds(load, sharing):
    """By the definition: fixed costs and the larger of work and bytes, under a floor and times a factor."""
    costs = [op.cost for op in load.structure.ops]
    lane = np.array([cost.lane for cost in costs])
    floor_s, factor = sharing[FLOOR][lane], sharing[SLOWDOWN][lane]
    work, contiguous, scattered = load.amounts[: -len(TIERS)].reshape(-1, AMOUNTS).T
    moved_s = contiguous * np.maximum([c.streamed_s for c in costs], floor_s)
    moved_s += scattered * np.maximum([c.scattered_s for c in costs], floor_s)
    longer_s = factor * np.maximum(work * np.array([c.work_s for c in costs]), moved_s)
    always = np.array([op.syncs for op in load.structure.ops])
    return longer_s + np.array([c.fixed_s for c in costs]) * (always | (longer_s > 0))


def makespan_s(program, times):
    """Every operation of every layer after all that it waits for and all before it on its lane."""
    free, layers = [0.0] * len(LANES), [{}] * program.depth
    for repeat, slots in program.runs:
        for _ in range(repeat):
            layers.append({})
            for slot in slots:
                ready = [layers[-1 - back].get(other, 0.0) for back, other in slot.waits]
                end = max([free[slot.lane], *ready]) + times[slot.time]
                layers[-1][slot.slot] = end
                if times[slot.time]:
                    free[slot.lane] = end
                    free[SM] += slot.sm_share * times[slot.time]
    for slot in program.end:
        free[slot.lane] = max(free) + times[slot.time]
    return max(free)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
def test_an_iteration_takes_as_long_as_its_operations_in_order(policy, tp):
    machine = Machine(gpu=GPU, host=HOST, tp=tp)
    model = MODEL.shard(tp)
    clock = Clock(model, machine)
    for prompt, decoding, on_host in ((3000, 1, 1), (40_000, 7, 3), (20_001, 30, 8)):
        batch = loads(policy, machine, prompt, decoding)
        tokens, logits = decoding + prompt - prompt // 2, decoding + 1
        sharing = machine.sharing(on_host, min(on_host, 4))
        seconds, busy = clock.iteration(batch, tokens, logits, sharing)
        times = np.concatenate([clock.own_layers(tokens).times_s, *(op_seconds(load, sharing) for load in batch)])
        program = clock.program([load.structure for load in batch])
        head_s = machine.head_s(model, logits)
        assert seconds == pytest.approx(makespan_s(program, times.tolist()) + head_s, rel=1e-7)
        lanes_s = np.zeros(len(LANES))
        for slot in [slot for repeat, slots in program.runs for slot in slots * repeat] + list(program.end):
            lanes_s[slot.lane] += times[slot.time]
        lanes_s[SM] += head_s
        assert busy[: len(LANES)] == pytest.approx(lanes_s, rel=1e-9)
        assert (busy[BOUND:] >= 0).all()
        assert busy[BOUND:].sum() <= seconds * (1 + 1e-9)  # what is left are launches and waits of the host


@pytest.mark.parametrize("policy", POLICIES)
def test_a_timeline_shows_what_was_priced(policy):
    """No layer is skipped, none charged at once: the last operation ends when the price says."""
    machine = Machine(gpu=GPU, host=HOST)
    clock = Clock(MODEL, machine)
    batch = loads(policy, machine, 30_000, 4)
    sharing = machine.sharing(2, 2)
    seconds, busy = clock.iteration(batch, 4 + 15_000, 0, sharing)
    rows = schedule(clock.work(batch, 4 + 15_000, sharing).prices)
    assert max(row.end_s for row in rows) == pytest.approx(seconds, rel=1e-7)
    for lane in (H2D, D2H, CPU):
        assert sum(row.end_s - row.begin_s for row in rows if row.lane == lane) == pytest.approx(busy[lane], rel=1e-9)


@pytest.mark.parametrize(
    ("lane", "policy", "tp"), [(H2D, "offload-all", 1), (CPU, "retrieval-attention", 1), (NVLINK, "full", 2)]
)
def test_a_slower_lane_takes_longer_by_its_factor(lane, policy, tp):
    """And nothing else does; fixed costs aside, which nobody shares."""
    machine = Machine(gpu=GPU, host=HOST, tp=tp)
    clock = Clock(MODEL.shard(tp), machine)
    batch = loads(policy, machine, 50_000, 4)
    alone, slow = machine.sharing(1, 1), machine.sharing(1, 1)
    slow[SLOWDOWN, lane] = 3.0
    fast_s, busy = clock.iteration(batch, 4 + 25_000, 5, alone)
    slow_s, slowed = clock.iteration(batch, 4 + 25_000, 5, slow)
    assert slowed[lane] == pytest.approx(3 * busy[lane], rel=0.01)
    others = [i for i in range(len(LANES)) if i != lane]
    assert slowed[others].tolist() == busy[others].tolist()
    assert fast_s < slow_s <= fast_s + (slowed[lane] - busy[lane]) * (1 + 1e-9)


def test_a_crowded_host_divides_links_and_processor_evenly():
    machine = Machine(gpu=GPU, host=HOST)
    for on_host, on_switch in ((1, 1), (4, 2), (8, 4)):
        sharing = machine.sharing(on_host, on_switch)
        assert sharing[FLOOR, H2D] == sharing[FLOOR, D2H] == max(on_host / HOST.ddr_Bps, on_switch / HOST.switch_Bps)
        assert sharing[SLOWDOWN, CPU] == on_host
        assert sharing[SLOWDOWN, [SM, H2D, D2H, NVLINK]].tolist() == [1.0] * 4
    assert BUSY[: len(LANES)] == LANES
