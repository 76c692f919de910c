"""How long one iteration of a batch takes, and what it keeps busy: its operations priced, then put in order.

The one statement of that, for the inner loop, which is compiled with it, and as it stands for all others. A batch is
some loads, rows whose first column is a structure and whose others are the summed amounts of the sequences that share
it. Every layer of the model runs its own projections and MLP and the operations of all loads.

Lanes are what CUDA streams are: each runs its operations in the order in which the plan lists them, and an operation
starts when its lane is free and what it waits for is done. Over equal layers such a schedule settles into a constant
increment, so the layers that remain are charged at once.
"""

from typing import NamedTuple

import numpy as np

from kvsim.hardware.machine import LANES, NVLINK, SLOWDOWN, SM, byte_s
from kvsim.iteration.arrays import Floats, Ints, Record, Records
from kvsim.iteration.busy import BUSY, BY_COMPUTE, BY_HBM, HBM_BUSY, WORK, expose
from kvsim.plans.derive import AMOUNTS, TIERS

SETTLED = 1e-9  # relative change of the increment per layer below which it counts as constant
OPS = 1 + len(TIERS)  # the first column of a load's amounts: its structure and what it stores come before
PARTS = 4  # times of a layer's own operations: QKV, output projection, MLP, all-reduce

OP = np.dtype(
    [(name, np.int64) for name in ("lane", "link", "always", "layers")]
    + [(name, np.float64) for name in ("fixed_s", "work_s", "streamed_s", "scattered_s", "walked_s")]
)
STRUCTURE = np.dtype([(name, np.int64) for name in ("ops", "n_ops", "uses_host")])
PROGRAM = np.dtype(
    [(name, np.int64) for name in ("layers", "n_layers", "end", "n_end", "depth", "times", "n_times", "apart")]
)
LAYERS = np.dtype([(name, np.int64) for name in ("repeat", "slots", "n_slots")])
SLOT = np.dtype(
    [(name, np.int64) for name in ("time", "lane", "waits", "n_waits", "slot")] + [("sm_share", np.float64)]
)
WAIT = np.dtype([(name, np.int64) for name in ("back", "slot")])
TIME = np.dtype([("layers", np.float64), ("elsewhere", np.int64)])  # that run an operation; whether not on the SMs
OWN = np.dtype(  # what the model's own layers read and send, and their seconds; unknown while not `known`
    [(name, np.int64) for name in ("known", "weight_bytes", "collective_bytes")]
    + [("busy_s", np.float64, (len(BUSY),))]
)
HEAD = np.dtype(  # what the output head takes for so many positions, and what that is due to; unknown while not `known`
    [("known", np.int64)] + [(name, np.float64) for name in ("seconds", "hbm_s", "by_hbm_s", "by_compute_s")]
)


class Prices(NamedTuple):
    """Costs of structures, programs of their combinations, and times of the model's own layers."""

    structures: Records
    ops: Records
    combinations: Ints  # (programs, 1 + loads): how many structures, and which
    programs: Records
    layers: Records  # of programs: runs of equal layers
    slots: Records
    waits: Records
    times: Records  # of programs: their operations
    head: Records  # by the rows of logits
    own: Records  # by the tokens of an iteration
    own_s: Floats  # (tokens, times): nothing, then PARTS of each layer shape
    seconds: Floats  # of each operation of the batch priced last
    done_s: Floats  # (layers back, slots): when operations were done
    free_s: Floats  # when each lane is free, and was one layer earlier
    before_s: Floats
    used: Ints  # whether a lane has work in these layers


class Batch(NamedTuple):
    """What one iteration, or one stage's part of it, runs."""

    program: Record
    own: Record  # of the model's own layers at the batch's tokens
    own_s: Floats
    loads: Ints  # (loads, columns)
    share: float  # of the loads
    stage: int
    head: Record  # of the batch's logits
    logits: int  # 0 where a stage has no head


def price(prices: Prices, batch: Batch, sharing: Floats, busy: Floats) -> float:
    """Seconds of an iteration; sets the seconds of each of BUSY, and of each operation (`prices.seconds`).

    `sharing` is what there is of each lane (`kvsim.hardware.machine.SHARING`).
    """
    seconds, n = prices.seconds, len(batch.own_s)
    for i in range(len(BUSY)):
        busy[i] = batch.own["busy_s"][i]
    busy[NVLINK] *= sharing[SLOWDOWN, NVLINK]
    for i in range(n):
        seconds[i] = batch.own_s[i]
    for i in range(PARTS, n, PARTS):  # all-reduces
        seconds[i] *= sharing[SLOWDOWN, NVLINK]
    for row in range(len(batch.loads)):
        load = batch.loads[row]
        structure = prices.structures[load[0]]
        first = structure["ops"] + batch.stage * structure["n_ops"]
        for i in range(structure["n_ops"]):
            column = OPS + AMOUNTS * i
            work, contiguous_bytes, scattered_bytes = load[column], load[column + 1], load[column + 2]
            seconds[n] = _op_s(
                prices.ops[first + i],
                batch.share * work,
                batch.share * contiguous_bytes,
                batch.share * scattered_bytes,
                sharing,
                busy,
            )
            n += 1
    total_s = _makespan_s(prices, batch.program)
    if batch.logits:
        busy[SM] += batch.head["seconds"]
        busy[HBM_BUSY] += batch.head["hbm_s"]
        busy[BY_HBM] += batch.head["by_hbm_s"]
        busy[BY_COMPUTE] += batch.head["by_compute_s"]
        total_s += batch.head["seconds"]
    expose(busy, total_s)
    return float(total_s)


def _op_s(
    op: Record, work: float, contiguous_bytes: float, scattered_bytes: float, sharing: Floats, busy: Floats
) -> float:
    """Seconds of one operation: the larger of its work and its bytes, and what comes with any."""
    lane, work_s, streamed_s, scattered_s = op["lane"], op["work_s"], op["streamed_s"], op["scattered_s"]
    if lane != SM:  # the SMs are the GPU's own
        work_s *= sharing[SLOWDOWN, lane]
        streamed_s, scattered_s = byte_s(streamed_s, sharing, lane), byte_s(scattered_s, sharing, lane)
    arithmetic = work * work_s + (contiguous_bytes + scattered_bytes) * op["walked_s"]
    transfers = contiguous_bytes * streamed_s + scattered_bytes * scattered_s
    seconds = max(arithmetic, transfers)
    if seconds > 0 or op["always"]:
        seconds += op["fixed_s"]
    busy[lane] += op["layers"] * seconds
    if lane == SM:
        busy[WORK] += op["layers"] * arithmetic
        busy[HBM_BUSY] += op["layers"] * transfers
        busy[BY_COMPUTE if arithmetic > transfers else BY_HBM] += op["layers"] * max(arithmetic, transfers)
    return float(seconds)


def _makespan_s(prices: Prices, program: Record) -> float:
    """When the last operation ends, given each one's `seconds`."""
    overlaps = False
    for i in range(program["n_times"]):
        overlaps = overlaps or (prices.times[program["times"] + i]["elsewhere"] != 0 and prices.seconds[i] > 0)
    if not overlaps:  # one queue
        total_s = 0.0
        for i in range(program["n_times"]):
            total_s += prices.times[program["times"] + i]["layers"] * prices.seconds[i]
        return total_s
    if program["apart"]:  # layers follow one another
        total_s = 0.0
        for i in range(program["n_layers"]):
            run = prices.layers[program["layers"] + i]
            _clear(prices.free_s)
            _clear_row(prices.done_s, 0)
            _advance(prices, run, 0, 1)
            total_s += run["repeat"] * latest_s(prices.free_s)
        for i in range(program["n_end"]):
            total_s += prices.seconds[prices.slots[program["end"] + i]["time"]]
        return total_s
    return _pipelined_s(prices, program)


def _pipelined_s(prices: Prices, program: Record) -> float:
    """When layers overlap: over equal ones the increment settles, and the layers that remain are charged at once."""
    free, done, before, ring = prices.free_s, prices.done_s, prices.before_s, program["depth"] + 1
    clear(prices, ring)
    newest = 0
    for r in range(program["n_layers"]):
        run = prices.layers[program["layers"] + r]
        _note_use(prices, run)
        increment = -1.0
        for layer in range(run["repeat"]):
            newest = (newest - 1) % ring
            _clear_row(done, newest)
            _advance(prices, run, newest, ring)
            if layer:
                step_s = _step_s(prices)
                if abs(step_s - increment) <= SETTLED * step_s and _in_step(prices, step_s):
                    _skip(prices, (run["repeat"] - layer - 1) * step_s)
                    break
                increment = step_s
            for lane in range(len(LANES)):
                before[lane] = free[lane]
    for i in range(program["n_end"]):
        run_last(prices, prices.slots[program["end"] + i])
    return latest_s(free)


def clear(prices: Prices, ring: int) -> None:
    """Before an iteration all lanes are free, and nothing has been done."""
    _clear(prices.free_s)
    for row in range(ring):
        _clear_row(prices.done_s, row)


def begin_layer(prices: Prices, newest: int, ring: int) -> int:
    """The row of `done_s` for one more layer, given that of the one before."""
    newest = (newest - 1) % ring
    _clear_row(prices.done_s, newest)
    return int(newest)


def run_op(prices: Prices, slot: Record, newest: int, ring: int) -> float:
    """Run an operation when its lane is free and what it waits for is done; when it starts."""
    lane = slot["lane"]
    start_s = prices.free_s[lane]
    for j in range(slot["n_waits"]):
        wait = prices.waits[slot["waits"] + j]
        start_s = max(start_s, prices.done_s[(newest + wait["back"]) % ring, wait["slot"]])
    seconds = prices.seconds[slot["time"]]
    if seconds > 0:
        prices.free_s[lane] = start_s + seconds
        prices.free_s[SM] += slot["sm_share"] * seconds
    prices.done_s[newest, slot["slot"]] = start_s + seconds
    return float(start_s)


def run_last(prices: Prices, slot: Record) -> float:
    """Run an operation after all that came before it, on whatever lane; when it starts."""
    start_s = latest_s(prices.free_s)
    prices.free_s[slot["lane"]] = start_s + prices.seconds[slot["time"]]
    return start_s


def latest_s(free_s: Floats) -> float:
    """When the last lane is free."""
    latest = free_s[0]
    for lane in range(1, len(LANES)):
        latest = max(latest, free_s[lane])
    return float(latest)


def _clear(free_s: Floats) -> None:
    for lane in range(len(LANES)):
        free_s[lane] = 0.0


def _clear_row(done_s: Floats, row: int) -> None:
    for slot in range(done_s.shape[1]):
        done_s[row, slot] = 0.0


def _note_use(prices: Prices, run: Record) -> None:
    """Mark the lanes on which operations of these layers take time."""
    for lane in range(len(LANES)):
        prices.used[lane] = 0
    for i in range(run["n_slots"]):
        slot = prices.slots[run["slots"] + i]
        if prices.seconds[slot["time"]] > 0:
            prices.used[slot["lane"]] = 1


def _step_s(prices: Prices) -> float:
    """How much later than one layer earlier the first lane in use is free."""
    for lane in range(len(LANES)):
        if prices.used[lane]:
            return float(prices.free_s[lane] - prices.before_s[lane])
    return 0.0


def _in_step(prices: Prices, step_s: float) -> bool:
    """Whether all lanes in use are free later by the same time."""
    for lane in range(len(LANES)):
        later_s = prices.free_s[lane] - prices.before_s[lane]
        if prices.used[lane] and abs(later_s - step_s) > SETTLED * step_s:
            return False
    return True


def _skip(prices: Prices, seconds: float) -> None:
    for lane in range(len(LANES)):
        if prices.used[lane]:
            prices.free_s[lane] += seconds
    for row in range(prices.done_s.shape[0]):
        for slot in range(prices.done_s.shape[1]):
            if prices.done_s[row, slot] > 0:
                prices.done_s[row, slot] += seconds


def _advance(prices: Prices, run: Record, newest: int, ring: int) -> None:
    """Run one layer's operations."""
    for i in range(run["n_slots"]):
        run_op(prices, prices.slots[run["slots"] + i], newest, ring)
