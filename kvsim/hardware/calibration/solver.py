"""Bounded, robust least squares in the logarithms of positive constants, by Levenberg and Marquardt's method."""

from collections.abc import Callable, Mapping

import numpy as np

Bounds = Mapping[str, tuple[float, float, float]]
"""By a constant's name its first guess, the least and the most that it may be."""

_STEP = 1e-4
_ROBUST = 0.08  # errors beyond this share count less and less
_ROUNDS = 150
_SETTLED = 1e-7


def solve(errors: Callable[[Mapping[str, float]], np.ndarray], bounds: Bounds) -> dict[str, float]:
    """The constants within `bounds` that make `errors` (relative ones, one a sample) least, to four digits.

    Deterministic. ValueError where there are fewer samples than constants.
    """
    names = list(bounds)
    first, low, high = np.log(np.array([bounds[name] for name in names])).T

    def weighted(x: np.ndarray) -> np.ndarray:
        error = errors(dict(zip(names, np.exp(x).tolist(), strict=True)))
        return np.asarray(np.sign(error) * _ROBUST * np.sqrt(2 * (np.sqrt(1 + (error / _ROBUST) ** 2) - 1)))

    x, residual, damping = first, weighted(first), 1e-2
    if len(residual) < len(names):
        raise ValueError(f"{len(residual)} measured times cannot give {len(names)} constants; measure more shapes")
    for _ in range(_ROUNDS):
        slopes = np.empty((len(residual), len(names)))
        for i in range(len(names)):
            step = _STEP if x[i] + _STEP <= high[i] else -_STEP
            moved = x.copy()
            moved[i] += step
            slopes[:, i] = (weighted(moved) - residual) / step
        normal, gradient = slopes.T @ slopes, slopes.T @ residual
        # A constant at a bound that it is pushed against stays there, so that the others may move freely.
        free = ~(((x <= low) & (gradient > 0)) | ((x >= high) & (gradient < 0)))
        before = float(residual @ residual)
        while damping < 1e8:
            part = normal[np.ix_(free, free)]
            scaled = part + damping * np.diag(np.diag(part) + 1e-9)
            moved = x.copy()
            moved[free] = np.clip(x[free] - np.linalg.solve(scaled, gradient[free]), low[free], high[free])
            found = weighted(moved)
            if float(found @ found) < before:
                break
            damping *= 4
        else:
            break
        x, residual, damping = moved, found, max(damping / 6, 1e-9)
        if before - float(found @ found) < _SETTLED * before:
            break
    rounded = {name: float(f"{value:.4g}") for name, value in zip(names, np.exp(x), strict=True)}
    return {name: min(max(value, bounds[name][1]), bounds[name][2]) for name, value in rounded.items()}
