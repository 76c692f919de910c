"""How many replicas of a family hold the SLO and, of those, how many for prompts: tasks that ask for simulations."""

from kvsim.planning.findings import Findings
from kvsim.planning.measured import Measured
from kvsim.planning.search import Search
from kvsim.planning.simulations import Failed, Key, Task

_MOST_SPLITS = 5  # of a number of replicas into pools


class Sizes(Findings):
    """Brackets the replicas of families; what comes of a task is kept in `found`."""

    def sized(self, index: int, search: Search, seed: int = 0) -> Task[None]:
        """A bracket of replicas on the trace of a seed."""
        size = next(search)
        while True:
            ratio = yield from self.served_best(index, size, seed)
            try:
                size = search.send(ratio)
            except StopIteration as end:
                self.found.brackets[index] = end.value
                return

    def served_best(self, index: int, size: int, seed: int = 0) -> Task[float]:
        """How far so many replicas are from the SLO: with pools, in the split that comes nearest.

        From the share of work on, a replica at a time goes to the pool that lags: to decoding where tokens are late,
        else to prompts, until the SLO holds or the other one lags.
        """
        if self.families[index].prefill_share is None:
            return self.how_far((yield Key(index, size, seed=seed)))
        ratios: dict[int, float] = {}
        prompts = self.families[index].prefill_replicas(size)
        while prompts not in ratios and 1 <= prompts < size and len(ratios) < _MOST_SPLITS:
            measured = yield Key(index, size, prompts, seed=seed)
            ratios[prompts] = self.how_far(measured)
            if ratios[prompts] <= 1:
                break
            prompts += -1 if self._tokens_lag(measured) else 1
        best = min(ratios, key=lambda one: (ratios[one], one))
        self.found.prompts[index, size] = best
        return ratios[best]

    def _tokens_lag(self, measured: Measured | Failed) -> bool:
        """Whether output tokens come later than an objective allows."""
        if isinstance(measured, Failed):
            return False
        late = (one for one in self.objectives if one.latency == "tpot_s")
        return any(measured.values_s[one.name] > one.limit_s for one in late)
