"""What an iteration keeps busy, and what its time is bound by: one account for all who ask.

Lanes come first, then what the SM lane spends on arithmetic and on transfers of the HBM, then what the iteration's time
is attributed to; what is left of that are launches and waits of the host, `overhead`.

PCIe carries both directions at once, so as a resource it is two lanes, up to HBM and down from it, of which either can
be the busiest. As a cause it is one, `pcie`: what a copy makes others wait for is the same whichever way it goes.
"""

from kvsim.hardware.machine import CPU, D2H, H2D, HOST, LANES, NVLINK, SM
from kvsim.iteration.arrays import Floats
from kvsim.plans.guessing import ARITHMETIC, COLLECTIVES, EACH, LAUNCH, ONCE, WEIGHTS

BOUNDS = ("compute", "hbm", "pcie", "nvlink", "cpu", "swap", "handoff")
OVERHEAD = "overhead"
BUSY = (*LANES, "work", "hbm", *(f"{name} bound" for name in BOUNDS))
WORK, HBM_BUSY = len(LANES), len(LANES) + 1
BOUND = len(LANES) + 2  # where they begin
BY_COMPUTE, BY_HBM, BY_PCIE, BY_NVLINK, BY_CPU, BY_SWAP, BY_HANDOFF = range(BOUND, len(BUSY))


def expose(busy: Floats, total_s: float) -> None:
    """Attribute the time of an iteration in which the SMs wait to the other lanes, in proportion to their work."""
    pcie_s = busy[H2D] + busy[D2H]
    others_s = pcie_s + busy[NVLINK] + busy[CPU] + busy[HOST]
    exposed_s = total_s - busy[SM]
    if others_s > 0 and exposed_s > 0:
        busy[BY_PCIE] = exposed_s * (pcie_s / others_s)
        busy[BY_NVLINK] = exposed_s * (busy[NVLINK] / others_s)
        busy[BY_CPU] = exposed_s * (busy[CPU] / others_s)


def add_guesses(parts: Floats, busy: Floats, sequences: int, prompt_tokens: int) -> float:
    """Seconds by which guessing lengthens an iteration, after all else; adds to what it keeps busy.

    `parts` are those of `kvsim.plans.guessing.Guesser`.
    """
    total_s = 0.0
    for i in range(2):
        n = prompt_tokens if i else sequences
        if n:
            total_s += _add_part(parts[i], busy, n)
    return total_s


def _add_part(parts: Floats, busy: Floats, n: int) -> float:
    launch_s = parts[ONCE, LAUNCH] + n * parts[EACH, LAUNCH]
    weights_s = parts[ONCE, WEIGHTS] + n * parts[EACH, WEIGHTS]
    arithmetic_s = parts[ONCE, ARITHMETIC] + n * parts[EACH, ARITHMETIC]
    collectives_s = parts[ONCE, COLLECTIVES] + n * parts[EACH, COLLECTIVES]
    busy[SM] += launch_s + weights_s + arithmetic_s
    busy[NVLINK] += collectives_s
    busy[HBM_BUSY] += weights_s
    busy[WORK] += arithmetic_s
    busy[BY_HBM] += weights_s
    busy[BY_COMPUTE] += arithmetic_s
    busy[BY_NVLINK] += collectives_s
    return float(launch_s + weights_s + arithmetic_s + collectives_s)
