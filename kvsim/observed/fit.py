"""Serving constants that make simulated latencies those of recorded requests, and how well the records tell them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kvsim.observed.replayed import CONSTANTS, Latencies, Replayed, held_out
from kvsim.scenario.setup import MOST_OVERHEAD_S
from traces.schema import Floats

LEAST_REQUESTS = 24
_SLOWDOWNS = (0.1, 20.0)
_ROBUST = 0.1  # errors beyond this share count less and less: stalls of a network are no constants
_ROUNDS = 20
_SETTLED = 1e-4  # of what is left, by which a round must lessen it
_HALVINGS = 4
_STEP = 0.05  # of a latency, by which a constant is moved: much, since which iteration a prompt waits for is chance
_UNLIKE = 0.05  # least sine between what a constant does to latencies and what all others could do in its place
_CERTAIN = 0.15  # of a latency, the most that a constant's standard error may move it by


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Constants by name, their standard errors (0: stated by the user), and the simulated latencies under them."""

    constants: dict[str, float]
    errors: dict[str, float]
    found: Latencies
    plain: Latencies  # with no overheads, and kernels as they are priced


def fitted(replayed: Replayed) -> Fit:
    """The constants that the requests which are not held out tell; deterministic.

    ValueError, in words, where there are too few requests, or where they are so much alike that constants cannot be
    told apart.
    """
    records = replayed.records
    if len(records) < LEAST_REQUESTS:
        raise ValueError(
            f"{records.source}: {len(records)} requests finished, too few to fit constants and to hold some out; "
            f"record at least {LEAST_REQUESTS}"
        )
    names = [name for name in CONSTANTS if name not in replayed.stated]
    if not names:
        raise ValueError(
            f"{', '.join(CONSTANTS)} are all stated, so {records.source} has nothing to fit; leave one of them out"
        )
    problem = _Problem(replayed, names)
    x = problem.searched(problem.solved())
    errors = problem.certain(x)
    constants = {name: float(f"{value:.4g}") for name, value in zip(names, x.tolist(), strict=True)}
    return Fit(
        constants={**constants, **replayed.stated},
        errors={**dict(zip(names, errors.tolist(), strict=True)), **dict.fromkeys(replayed.stated, 0.0)},
        found=replayed.under(constants),
        plain=replayed.under({"kernel_slowdown": 1.0, "iteration_overhead_s": 0.0, "request_overhead_s": 0.0}),
    )


class _Problem:
    """Least squares of relative errors in the constants `names`: errors of a TTFT and a TPOT weigh the same."""

    def __init__(self, replayed: Replayed, names: list[str]) -> None:
        self._replayed, self._names = replayed, names
        records = replayed.records
        self._seen = ~held_out(len(records))
        self._ttft_s, self._tpot_s = (_positive(values[self._seen]) for values in (records.ttft_s, records.tpot_s))
        if not np.isfinite(self._tpot_s).any():
            raise ValueError(
                f"{records.source}: no request has two output tokens, so nothing is known of the time between them; "
                "record longer answers"
            )
        self._ttft, self._tpot = float(np.nanmedian(self._ttft_s)), float(np.nanmedian(self._tpot_s))
        # What moves the latency that a constant is seen in by a share of itself.
        scales = {"kernel_slowdown": 1.0, "iteration_overhead_s": self._tpot, "request_overhead_s": self._ttft}
        bounds = {
            "kernel_slowdown": _SLOWDOWNS,
            "iteration_overhead_s": (0.0, min(MOST_OVERHEAD_S, 2 * float(np.nanmax(self._tpot_s)))),
            "request_overhead_s": (0.0, min(MOST_OVERHEAD_S, float(np.nanmax(self._ttft_s)))),
        }
        self._scales = np.array([scales[name] for name in names])
        self._low, self._high = np.array([bounds[name] for name in names]).T

    def solved(self) -> Floats:
        """The constants, by Levenberg and Marquardt's method from the best of a few first guesses."""
        x = min(self._guesses(), key=lambda guess: float(np.sum(self._weighted(guess) ** 2)))
        left, damping = self._weighted(x), 1e-2
        for _ in range(_ROUNDS):
            slopes = self._slopes(x)
            normal, gradient = slopes.T @ slopes, slopes.T @ left
            free = ~(((x <= self._low) & (gradient > 0)) | ((x >= self._high) & (gradient < 0)))
            before = float(left @ left)
            while damping < 1e4:
                part = normal[np.ix_(free, free)]
                moved = x.copy()
                step = np.linalg.solve(part + damping * np.diag(np.diag(part) + 1e-9), gradient[free])
                moved[free] = np.clip(x[free] - self._scales[free] * step, self._low[free], self._high[free])
                tried = self._weighted(moved)
                if float(tried @ tried) < before:
                    break
                damping *= 8
            else:
                break
            x, left, damping = moved, tried, max(damping / 8, 1e-9)
            if before - float(left @ left) < _SETTLED * before:
                break
        return x

    def searched(self, x: Floats) -> Floats:
        """The same or better, by steps along the axes of the errors' ellipsoid, halved where none helps.

        The errors are not smooth, and slopes end where a step is lost in that.
        """
        _, singular, ways = np.linalg.svd(self._slopes(x), full_matrices=False)
        left = float(np.sum(self._weighted(x) ** 2))
        sizes = np.sqrt(max(left, 1e-9) / max(1, 2 * self._seen.sum() - len(x))) / np.maximum(singular, 1e-9)
        steps = [way * min(size, _STEP) for way, size in zip(ways, (3 * sizes).tolist(), strict=True)]
        for halved in range(_HALVINGS):
            helped = True
            while helped:
                helped = False
                for step in [sign * step / 2**halved for step in steps for sign in (1, -1)]:
                    moved = np.clip(x + self._scales * step, self._low, self._high)
                    tried = float(np.sum(self._weighted(moved) ** 2))
                    if tried < (1 - _SETTLED) * left:
                        x, left, helped = moved, tried, True
        return x

    def certain(self, x: Floats) -> Floats:
        """The standard error of each constant at a solution; ValueError where the records do not tell it.

        A constant is not told where it does to the latencies what the others together could do as well, and where its
        error moves the latency that it is seen in by more than it may.
        """
        left = self._weighted(x)
        slopes = self._slopes(x)
        lengths = np.linalg.norm(slopes, axis=0)
        if (lengths < 1e-6 * np.sqrt(len(left))).any():
            self._refuse([name for name, length in zip(self._names, lengths, strict=True) if length < 1e-6])
        _, singular, ways = np.linalg.svd(slopes / lengths, full_matrices=False)
        if singular[-1] < _UNLIKE:
            self._refuse([name for name, part in zip(self._names, ways[-1], strict=True) if abs(part) > 0.2])
        spread = float(left @ left) / max(1, len(left) - len(x))
        relative = np.sqrt(spread * np.diag(np.linalg.inv(slopes.T @ slopes)))
        if (relative > _CERTAIN).any():
            self._refuse([name for name, error in zip(self._names, relative, strict=True) if error > _CERTAIN])
        return np.asarray(relative * self._scales)

    def _refuse(self, names: list[str]) -> None:
        trace, seen = self._replayed.records.trace, self._seen
        told = " and ".join(name.removesuffix("_s") for name in names or self._names)
        apart = f"tell {told} apart" if len(names) > 1 else f"tell {told}"
        prompts, outputs = trace.prompt_tokens[seen], trace.output_tokens[seen]
        low, high = (int(np.quantile(prompts, share, method="nearest")) for share in (0.1, 0.9))
        if high < 2 * low:
            why = f"their prompts are alike, most of {low:,} to {high:,} tokens"
        elif (outputs > 1).sum() < LEAST_REQUESTS // 2:
            why = "few of them have more than one output token"
        else:
            why = f"their latencies scatter too much for {len(prompts):,} requests, or depend on nothing else alike"
        raise ValueError(
            f"{self._replayed.records.source}: the records cannot {apart}: {why}. Record requests whose lengths differ "
            f"by ten times, more of them and some alone, or state one, as {_flag((names or self._names)[0])}"
        )

    def _guesses(self) -> list[Floats]:
        """Kernels as priced and twice as slow, each with the overheads that its medians leave."""
        found = []
        for slowdown in (1.0, 2.0):
            first = {"kernel_slowdown": slowdown, "iteration_overhead_s": 0.0, "request_overhead_s": 0.0}
            for _ in range(2):
                ttft_s, tpot_s = self._latencies(first)
                between_s = max(0.0, float(np.nanmedian(self._tpot_s - tpot_s)))
                first["iteration_overhead_s"] += between_s
                first["request_overhead_s"] += max(0.0, float(np.nanmedian(self._ttft_s - ttft_s)) - between_s)
            guess = np.array([first[name] for name in self._names])
            found.append(np.clip(guess, self._low, self._high))
        return found

    def _slopes(self, x: Floats) -> Floats:
        """How the errors change with each constant, by its scale."""
        columns = []
        for i, scale in enumerate(self._scales.tolist()):
            step = _STEP * (x[i] if self._names[i] == "kernel_slowdown" else scale)
            ends = [x.copy(), x.copy()]
            ends[0][i], ends[1][i] = max(self._low[i], x[i] - step), x[i] + step
            low, high = (self._weighted(end) for end in ends)
            columns.append((high - low) * (scale / (ends[1][i] - ends[0][i])))
        return np.stack(columns, axis=1)

    def _weighted(self, x: Floats) -> Floats:
        """Relative errors of the requests that are seen, large ones lessened (a pseudo-Huber loss is their square)."""
        found = self._latencies(dict(zip(self._names, x.tolist(), strict=True)))
        pairs = zip(found, (self._ttft_s, self._tpot_s), strict=True)
        error = np.concatenate([np.log(values / own).mean(axis=0) for values, own in pairs])
        error = error[np.isfinite(error)]
        size = _ROBUST * np.sqrt(2 * (np.sqrt(1 + (error / _ROBUST) ** 2) - 1))
        return np.asarray(np.sign(error) * size)

    def _latencies(self, constants: Mapping[str, float]) -> tuple[Floats, Floats]:
        found = self._replayed.under(constants)
        return found.ttft_s[:, self._seen], found.tpot_s[:, self._seen]


def _positive(values: Floats) -> Floats:
    return np.where(values > 0, values, np.nan)


def _flag(name: str) -> str:
    value = "1" if name == "kernel_slowdown" else "0"
    return f"--{name.removesuffix('_s').replace('_', '-')} {value}"
