"""What the caches of one `offload` hold together: now, at last, and at most."""

import threading
from collections import Counter
from collections.abc import Mapping

from policies.plan import Tier


class Footprint:
    """Bytes per tier of all arenas that report to it; threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # an arena may be collected, and say so, while another one reports
        self._now: Counter[Tier] = Counter()
        self._last: Counter[Tier] = Counter()
        self._peak: Counter[Tier] = Counter()

    def add(self, tier: Tier, nbytes: int) -> None:
        """A tensor was allocated."""
        with self._lock:
            self._now[tier] += nbytes
            self._peak[tier] = max(self._peak[tier], self._now[tier])

    def drop(self, held: Mapping[Tier, int]) -> None:
        """What an arena held is free again."""
        with self._lock:
            before = +self._now
            self._now.subtract(held)
            if before and not +self._now:
                self._last = before

    def keep(self, last: Counter[Tier]) -> None:
        """Say that `last` is what was held before everything went, one arena after the other."""
        with self._lock:
            self._last = last or self._last

    @property
    def now_bytes(self) -> Counter[Tier]:
        """What is held."""
        with self._lock:
            return +self._now

    @property
    def last_bytes(self) -> Counter[Tier]:
        """What is held or, when nothing is, what was held last."""
        with self._lock:
            return +self._now or Counter(self._last)

    @property
    def peak_bytes(self) -> Counter[Tier]:
        """The most that was held, of each tier by itself."""
        with self._lock:
            return +self._peak
