"""How long one iteration of a batch takes, and what it keeps busy: its operations priced, then put in order.

A batch is a list of loads, rows whose first column is a structure and whose others are the summed amounts of the
sequences that share it. Every layer of the model runs its own projections and MLP and the operations of all loads, in
the order that `kvsim.iteration.program` has compiled.
"""

import numpy as np

from kvsim.engine.books.causes import expose
from kvsim.engine.state.cluster import (
    AMOUNTS,
    BUSY,
    BY_COMPUTE,
    BY_HBM,
    HBM_BUSY,
    OPS,
    WANT_PROGRAM,
    WANT_TIMES,
    WORK,
    Detour,
    Floats,
    Ints,
    Prices,
    Record,
)
from kvsim.hardware.machine import CPU, D2H, H2D, LANES, SM

SETTLED = 1e-9  # relative change of the increment per layer below which it counts as constant

OP = np.dtype(
    [(name, np.int64) for name in ("lane", "link", "always", "layers")]
    + [(name, np.float64) for name in ("fixed_s", "work_s", "streamed_s", "scattered_s")]
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
MODEL = np.dtype(  # what the model's own layers read and send, and their seconds; unknown while not `known`
    [(name, np.int64) for name in ("known", "weight_bytes", "collective_bytes")]
    + [("busy_s", np.float64, (len(BUSY),))]
)


def price(
    world: Record,
    prices: Prices,
    rows: Ints,
    first: int,
    stage: int,
    share: float,
    tokens: int,
    logits: int,
    on_host: int,
    on_switch: int,
) -> float:
    """Seconds of an iteration of `tokens` new tokens and `logits` rows of the head on a stage; sets `busy_s`.

    The batch are a share of the `loads` rows from the first on; `on_host` and `on_switch` say how many GPUs use the
    host and the switch. May make detours.
    """
    model, busy, seconds = prices.model[tokens * world["stages"] + stage], world["busy_s"], prices.seconds
    if not model["known"]:
        world["wanted"][0], world["wanted"][1] = WANT_TIMES, tokens
        raise Detour
    program = prices.programs[_program_of(world, prices, rows, first) * world["stages"] + stage]
    for i in range(len(BUSY)):
        busy[i] = model["busy_s"][i]
    n = prices.model_s.shape[1]
    for i in range(n):
        seconds[i] = prices.model_s[tokens, i]
    floor_s = max(on_host / world["ddr_Bps"], on_switch / world["switch_Bps"])
    for row in range(first, first + world["loads"]):
        structure = prices.structures[rows[row, 0]]
        ops = structure["ops"] + stage * structure["n_ops"]
        for i in range(structure["n_ops"]):
            column = OPS + AMOUNTS * i
            work, contiguous, scattered = rows[row, column], rows[row, column + 1], rows[row, column + 2]
            seconds[n] = _op_s(
                prices.ops[ops + i], share * work, share * contiguous, share * scattered, on_host, floor_s, busy
            )
            n += 1
    total_s = _makespan_s(world, prices, program)
    if logits and stage == world["stages"] - 1:
        head_s = world["head_s"] + logits * world["logit_s"]
        busy[SM] += head_s
        busy[HBM_BUSY] += world["head_s"]
        busy[BY_HBM] += world["head_s"] - world["head_launch_s"]
        busy[BY_COMPUTE] += logits * world["logit_s"]
        total_s += head_s
    expose(busy, total_s)
    return float(total_s)


def _op_s(
    op: Record,
    work: float,
    contiguous_bytes: float,
    scattered_bytes: float,
    on_host: int,
    floor_s: float,
    busy: Floats,
) -> float:
    """Seconds of one operation: copies go no faster than a fair share of the host, the CPU is divided evenly."""
    work_s, streamed_s, scattered_s = op["work_s"], op["streamed_s"], op["scattered_s"]
    lane = op["lane"]
    if lane in (H2D, D2H):
        streamed_s, scattered_s = max(streamed_s, floor_s), max(scattered_s, floor_s)
    elif lane == CPU:
        work_s, streamed_s, scattered_s = on_host * work_s, on_host * streamed_s, on_host * scattered_s
    arithmetic, transfers = work * work_s, contiguous_bytes * streamed_s + scattered_bytes * scattered_s
    seconds = max(arithmetic, transfers)
    if seconds > 0 or op["always"]:
        seconds += op["fixed_s"]
    busy[lane] += op["layers"] * seconds
    if lane == SM:
        busy[WORK] += op["layers"] * arithmetic
        busy[HBM_BUSY] += op["layers"] * transfers
        busy[BY_COMPUTE if arithmetic > transfers else BY_HBM] += op["layers"] * max(arithmetic, transfers)
    return float(seconds)


def _program_of(world: Record, prices: Prices, rows: Ints, first: int) -> int:
    n = world["loads"]
    for index in range(len(prices.combinations)):
        if prices.combinations[index, 0] == n:
            same = True
            for i in range(n):
                same = same and prices.combinations[index, 1 + i] == rows[first + i, 0]
            if same:
                return index
    world["wanted"][0] = WANT_PROGRAM
    raise Detour


def _makespan_s(world: Record, prices: Prices, program: Record) -> float:
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
            _clear(world["free_s"])
            _clear_row(prices.done_s, 0)
            _advance(world, prices, run, 0, 1)
            total_s += run["repeat"] * _latest(world["free_s"])
        for i in range(program["n_end"]):
            total_s += prices.seconds[prices.slots[program["end"] + i]["time"]]
        return total_s
    return _pipelined_s(world, prices, program)


def _pipelined_s(world: Record, prices: Prices, program: Record) -> float:
    """When layers overlap: over equal ones the increment settles, and the layers that remain are charged at once."""
    free, done, before, ring = world["free_s"], prices.done_s, world["before_s"], program["depth"] + 1
    _clear(free)
    for row in range(ring):
        _clear_row(done, row)
    newest = 0
    for r in range(program["n_layers"]):
        run = prices.layers[program["layers"] + r]
        _note_use(world, prices, run)
        increment = -1.0
        for layer in range(run["repeat"]):
            newest = (newest - 1) % ring
            _clear_row(done, newest)
            _advance(world, prices, run, newest, ring)
            if layer:
                step_s = _step_s(world)
                if abs(step_s - increment) <= SETTLED * step_s and _in_step(world, step_s):
                    _skip(world, prices, (run["repeat"] - layer - 1) * step_s)
                    break
                increment = step_s
            for lane in range(len(LANES)):
                before[lane] = free[lane]
    for i in range(program["n_end"]):
        slot = prices.slots[program["end"] + i]
        free[slot["lane"]] = _latest(free) + prices.seconds[slot["time"]]
    return _latest(free)


def _latest(free: Floats) -> float:
    latest = free[0]
    for lane in range(1, len(LANES)):
        latest = max(latest, free[lane])
    return float(latest)


def _clear(free: Floats) -> None:
    for lane in range(len(LANES)):
        free[lane] = 0.0


def _clear_row(done: Floats, row: int) -> None:
    for slot in range(done.shape[1]):
        done[row, slot] = 0.0


def _note_use(world: Record, prices: Prices, run: Record) -> None:
    """Mark the lanes on which operations of these layers take time."""
    for lane in range(len(LANES)):
        world["used"][lane] = 0
    for i in range(run["n_slots"]):
        slot = prices.slots[run["slots"] + i]
        if prices.seconds[slot["time"]] > 0:
            world["used"][slot["lane"]] = 1


def _step_s(world: Record) -> float:
    """How much later than one layer earlier the first lane in use is free."""
    for lane in range(len(LANES)):
        if world["used"][lane]:
            return float(world["free_s"][lane] - world["before_s"][lane])
    return 0.0


def _in_step(world: Record, step_s: float) -> bool:
    """Whether all lanes in use are free later by the same time."""
    for lane in range(len(LANES)):
        if world["used"][lane] and abs(world["free_s"][lane] - world["before_s"][lane] - step_s) > SETTLED * step_s:
            return False
    return True


def _skip(world: Record, prices: Prices, seconds: float) -> None:
    for lane in range(len(LANES)):
        if world["used"][lane]:
            world["free_s"][lane] += seconds
    for row in range(prices.done_s.shape[0]):
        for slot in range(prices.done_s.shape[1]):
            if prices.done_s[row, slot] > 0:
                prices.done_s[row, slot] += seconds


def _advance(world: Record, prices: Prices, run: Record, newest: int, ring: int) -> None:
    """Run one layer's operations: each starts when its lane is free and what it waits for is done."""
    for i in range(run["n_slots"]):
        slot = prices.slots[run["slots"] + i]
        lane = slot["lane"]
        start = world["free_s"][lane]
        for j in range(slot["n_waits"]):
            wait = prices.waits[slot["waits"] + j]
            start = max(start, prices.done_s[(newest + wait["back"]) % ring, wait["slot"]])
        seconds = prices.seconds[slot["time"]]
        if seconds > 0:
            world["free_s"][lane] = start + seconds
            world["free_s"][SM] += slot["sm_share"] * seconds
        prices.done_s[newest, slot["slot"]] = start + seconds
