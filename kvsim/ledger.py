"""What one replica did: bytes by link and cause, busy time, memory over time, gaps between tokens."""

from collections.abc import Iterable, Sequence

import numpy as np

from kvsim.decoding import Total
from kvsim.derive import LINKS, Vector
from kvsim.machine import Sharing
from kvsim.makespan import BUSY, Clock, Load
from kvsim.runs import Floats, Run

CAUSES = ("plans", "weights", "swaps", "prefix", "collectives")
PEER = "gpu->gpu"
DOWN, UP = "hbm->ddr", "ddr->hbm"


class Ledger:
    """Counts for one rank of a replica; bytes are exact integers."""

    def __init__(self, clock: Clock, baseline_hbm_bytes: int) -> None:
        self.clock = clock
        self.baseline_hbm_bytes = baseline_hbm_bytes  # weights
        self.plan_bytes = np.zeros(len(LINKS), dtype=np.int64)
        self.other_bytes = {link: dict.fromkeys(CAUSES, 0) for link in (*LINKS, PEER)}
        self.busy: Floats = np.zeros(len(BUSY))
        self.background_s = {UP: 0.0, DOWN: 0.0}  # swaps and cached prefixes, beside the iterations' own copies
        self.swaps = 0
        self.swapped_bytes = 0
        self.series: list[tuple[float, int, int, int, int]] = []
        self.runs: list[tuple[Run, int]] = []
        self.single_gaps: list[tuple[float, int]] = []
        self._loader_free_s = 0.0

    @property
    def traffic(self) -> dict[str, dict[str, int]]:
        """Bytes by link and cause."""
        plans = dict(zip(LINKS, self.plan_bytes.tolist(), strict=True))
        return {link: {**causes, "plans": plans.get(link, 0)} for link, causes in self.other_bytes.items()}

    def note(self, now_s: float, used: Sequence[int], running: int, waiting: int) -> None:
        """Record memory and queue lengths at an iteration boundary."""
        self.series.append((now_s, self.baseline_hbm_bytes + used[0], used[1], running, waiting))

    def charge(self, loads: Sequence[Load], tokens: int, logits: int, busy: Floats) -> None:
        """Book one iteration."""
        for load in loads:
            self.plan_bytes += self.clock.traffic(load)
        self._book_model(1, tokens, logits)
        self.busy += busy

    def charge_run(self, totals: Iterable[Total], decoding: int, run: Run) -> None:
        """Book a run of decode iterations of `decoding` sequences that starts at `totals`."""
        n = run.steps
        for total in totals:
            first, growth = (self.clock.traffic(Load(total.structure, v)) for v in (total.amounts, total.slopes))
            self.plan_bytes += n * first + (n * (n - 1) // 2) * growth
        self._book_model(n, decoding, decoding)
        self.busy += run.busy()

    def _book_model(self, iterations: int, tokens: int, logits: int) -> None:
        model, machine = self.clock.model, self.clock.machine
        self.other_bytes["hbm->sm"]["weights"] += iterations * self.clock.weight_bytes(tokens, logits)
        if machine.tp > 1:
            per_iteration = 2 * model.n_layers * machine.allreduce_bytes(model, tokens)
            self.other_bytes[PEER]["collectives"] += iterations * per_iteration

    def swap(self, nbytes: int, sharing: Sharing, *, to_hbm: bool) -> float:
        """Book a session's move between HBM and DDR and return its time."""
        link = UP if to_hbm else DOWN
        seconds = self.clock.machine.transfer_s(nbytes, to_hbm=to_hbm, sharing=sharing)
        self.swaps += 1
        self.swapped_bytes += nbytes
        self.other_bytes[link]["swaps"] += nbytes
        self.background_s[link] += seconds
        return seconds

    def load_prefix(self, now_s: float, nbytes: int, sharing: Sharing) -> float:
        """Book a cached prefix's way up; loads of a replica queue. Returns when it is there."""
        seconds = self.clock.machine.transfer_s(nbytes, to_hbm=True, sharing=sharing)
        self.other_bytes[UP]["prefix"] += nbytes
        self.background_s[UP] += seconds
        self._loader_free_s = max(now_s, self._loader_free_s) + seconds
        return self._loader_free_s

    def store_prefix(self, nbytes: int) -> None:
        """Book the write of a new prefix to DDR, which nobody waits for."""
        self.other_bytes[DOWN]["prefix"] += nbytes
        self.background_s[DOWN] += self.clock.machine.transfer_s(nbytes, to_hbm=False)

    def gaps(self, run: Run, tokens: int) -> None:
        """Each iteration of a run was the gap before `tokens` tokens."""
        if tokens:
            self.runs.append((run, tokens))

    def gap(self, seconds: float) -> None:
        """One token came after this gap."""
        self.single_gaps.append((seconds, 1))

    def replace_gap(self, booked_s: float, real_s: float) -> None:
        """A token that was booked with the others of its iteration came after a longer gap."""
        self.single_gaps += [(booked_s, -1), (real_s, 1)]

    def token_gaps(self) -> tuple[Floats, Vector]:
        """All gaps as (seconds, how many tokens)."""
        seconds = [np.array([s for s, _ in self.single_gaps])]
        weights = [np.array([n for _, n in self.single_gaps], dtype=np.int64)]
        for run, tokens in self.runs:
            stall = run.stall_s
            for part in run.parts:
                gaps = part.first_s + part.slope_s * np.arange(part.steps)
                gaps[0] += stall
                stall = 0.0
                seconds.append(gaps)
                weights.append(np.full(part.steps, tokens, dtype=np.int64))
        return np.concatenate(seconds), np.concatenate(weights)
