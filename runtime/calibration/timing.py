"""Times of work on a GPU, in CUDA graphs or on a stream, and of work on the CPU: medians with their spreads."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

REPEATS = 9
TRIES = 3
STEADY = 0.1  # spread beyond which a time is taken again
WINDOW_S = 6e-4  # of one repeat, far above an event's half microsecond
MOST_CALLS = 400

Launch = Callable[[], Any]


class Timing(NamedTuple):
    """Seconds of one call: the median of the repeats, and their interquartile range as a share of it."""

    seconds: float
    spread: float


class Measurement(NamedTuple):
    """A kernel's time for the arguments of its price (`load_gpu(name).kernels`); dtype is empty where it has none."""

    kernel: str
    dtype: str
    arguments: dict[str, int]
    seconds: float
    spread: float


def timed(repeat: Callable[[], float], repeats: int = REPEATS) -> Timing:
    """The steadiest of up to three rounds of `repeats` times, each what `repeat` returns in seconds."""
    rounds: list[Timing] = []
    while len(rounds) < TRIES and (not rounds or rounds[-1].spread > STEADY):
        times = sorted(repeat() for _ in range(repeats))
        low, median, high = statistics.quantiles(times, n=4)
        rounds.append(Timing(median, (high - low) / median))
    return min(rounds, key=lambda timing: timing.spread)


def cpu_timing(work: Launch, repeats: int = REPEATS) -> Timing:
    """Time of `work` on the CPU, after one call that is not counted."""
    work()

    def repeat() -> float:
        start_s = time.perf_counter()
        work()
        return time.perf_counter() - start_s

    return timed(repeat, repeats)


class Clock:
    """Times launches on one GPU's stream."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def graph_timing(self, launches: Sequence[Launch]) -> Timing:
        """Time of one call where `launches`, over and over, make one CUDA graph, as an engine's step does.

        Each of `launches` should read data of its own, more in all than the GPU's L2 holds.
        """
        with torch.cuda.stream(self.stream):
            for launch in launches:  # compiles, and lets libraries choose their kernels
                launch()
        calls = len(launches)
        graph = self._captured(launches, calls)
        self._window_s(graph.replay, 1)
        graph_s = self._window_s(graph.replay, 1)
        wanted = min(MOST_CALLS, int(calls * WINDOW_S / graph_s) + 1)
        if wanted > calls:  # else what lies between two graphs would count
            calls = wanted
            graph = self._captured(launches, calls)
            self._window_s(graph.replay, 1)
            graph_s = self._window_s(graph.replay, 1)
        replays = int(WINDOW_S / graph_s) + 1
        timing = timed(lambda: self._window_s(graph.replay, replays) / (replays * calls))
        graph.reset()
        return timing

    def fresh_timing(self, launches: Sequence[Launch], prepare: Launch) -> Timing:
        """Time of one call of a graph of `launches`, before each replay of which `prepare` changes what they read."""
        prepare()
        with torch.cuda.stream(self.stream):
            for launch in launches[:1]:
                launch()
        graph = self._captured(launches, len(launches))

        def repeat() -> float:
            prepare()
            return self._window_s(graph.replay, 1) / len(launches)

        repeat()
        timing = timed(repeat)
        graph.reset()
        return timing

    def stream_timing(self, launch: Launch) -> Timing:
        """Time of one call on the stream, without a graph: for copies, which take far longer than their launch."""
        self._window_s(launch, 1)
        return timed(lambda: self._window_s(launch, 1))

    def _captured(self, launches: Sequence[Launch], calls: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            graph.capture_begin()
            try:
                for number in range(calls):
                    launches[number % len(launches)]()
            finally:
                graph.capture_end()
        return graph

    def _window_s(self, launch: Launch, times: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            start.record()
            for _ in range(times):
                launch()
            end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
