"""Which entry of a cache tier goes first when it is full: LRU, LFU, FIFO, Belady's bound, and by the queue.

An order knows the keys of one tier. Keys of a prompt come as a chain, head first, and none may go before those that
continue it: every order ranks an entry at least as high as its continuation, and orders equals from tail to head.
"""

from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heappush
from typing import Protocol

EVICTIONS = ("lru", "lfu", "fifo", "belady", "scheduler-aware")


class Order(Protocol):
    """The entries of one tier in the order in which they are evicted."""

    def add(self, key: int) -> None:
        """Take in a new entry."""

    def use(self, keys: Sequence[int]) -> None:
        """A request used these entries."""

    def renew(self, keys: Sequence[int]) -> None:
        """Rank these entries above what continues them: something has been added to their chain."""

    def evict(self, newcomer: int) -> int | None:
        """Take out the first entry; None when all are worth more than the newcomer, which should stay out then."""


class Lru:
    """Least recently used first. It needs no look at the newcomer: it is the most recent."""

    def __init__(self) -> None:
        self._keys: OrderedDict[int, None] = OrderedDict()

    def add(self, key: int) -> None:
        self._keys[key] = None

    def use(self, keys: Sequence[int]) -> None:
        move = self._keys.move_to_end
        for key in reversed(keys):
            move(key)

    def renew(self, keys: Sequence[int]) -> None:
        self.use(keys)

    def evict(self, newcomer: int) -> int | None:
        return self._keys.popitem(last=False)[0]


class Fifo(Lru):
    """Oldest first; an entry is as old as the youngest that continues it."""

    def use(self, keys: Sequence[int]) -> None:
        pass

    def renew(self, keys: Sequence[int]) -> None:
        super().use(keys)


class _Levels:
    """Lowest level first, within a level the least recently used; levels are looked up when an entry is touched."""

    def __init__(self, levels: Mapping[int, int]) -> None:
        self._levels = levels
        self._level_of: dict[int, int] = {}
        self._keys: dict[int, OrderedDict[int, None]] = {}  # by level; each level stands in the heap once
        self._heap: list[int] = []

    def add(self, key: int) -> None:
        level = self._levels.get(key, 0)
        self._level_of[key] = level
        keys = self._keys.get(level)
        if keys is None:
            keys = self._keys[level] = OrderedDict()
            heappush(self._heap, level)
        keys[key] = None

    def use(self, keys: Sequence[int]) -> None:
        for key in reversed(keys):
            level = self._level_of[key]
            if self._levels.get(key, 0) == level:
                self._keys[level].move_to_end(key)
            else:
                del self._keys[level][key]
                self.add(key)

    def renew(self, keys: Sequence[int]) -> None:
        self.use(keys)

    def lowest(self) -> int:
        """The level of what goes first."""
        while not self._keys[self._heap[0]]:
            del self._keys[heappop(self._heap)]
        return self._heap[0]

    def evict(self, newcomer: int) -> int | None:
        key = self._keys[self.lowest()].popitem(last=False)[0]
        del self._level_of[key]
        return key


class Lfu(_Levels):
    """Least frequently used first, of these the least recently used; `uses` counts the requests for each block.

    (Counts outlive an eviction, so a head is counted at least as often as what continues it.)
    """

    def __init__(self, uses: Mapping[int, int]) -> None:
        super().__init__(uses)


class Belady:
    """The one used again last of all first (Belady 1966), where requests are served in the order of `next_use`.

    An offline bound: it knows the future. `next_use` says when a key is used next, differently for each; a key never
    used again comes after all others. What would go at once stays out.
    """

    def __init__(self, next_use: Mapping[int, int]) -> None:
        self._next_use = next_use
        self._due: dict[int, int] = {}
        self._heap: list[tuple[int, int]] = []  # latest first; out of date where `_due` says otherwise

    def add(self, key: int) -> None:
        due = self._due[key] = self._next_use[key]
        heappush(self._heap, (-due, key))

    def use(self, keys: Sequence[int]) -> None:
        for key in keys:
            if self._due[key] != self._next_use[key]:
                self.add(key)
        if len(self._heap) > 2 * len(self._due) + 64:
            self._heap = [(-due, key) for key, due in self._due.items()]
            heapify(self._heap)

    def renew(self, keys: Sequence[int]) -> None:
        self.use(keys)

    def evict(self, newcomer: int) -> int | None:
        heap = self._heap
        while self._due.get(heap[0][1]) != -heap[0][0]:
            heappop(heap)
        if self._next_use[newcomer] >= -heap[0][0]:
            return None
        key = heappop(heap)[1]
        del self._due[key]
        return key


class SchedulerAware(_Levels):
    """What no waiting request needs first, the least recently used of it (CachedAttention, arXiv:2403.19708, 3.3).

    The look-ahead window is the longest head of the queue, in order of arrival, whose blocks the tier can hold; nothing
    else displaces them.
    """

    def __init__(self, capacity_blocks: int) -> None:
        self._needs: dict[int, int] = {}  # by requests in the window
        super().__init__(self._needs)
        self._capacity_blocks = capacity_blocks
        self._window: dict[int, Sequence[int]] = {}
        self._beyond: deque[tuple[int, Sequence[int]]] = deque()
        self._gone: set[int] = set()  # of those beyond the window

    def wait(self, request: int, keys: Sequence[int]) -> None:
        """A request joins the queue."""
        self._beyond.append((request, keys))
        self._extend()

    def leave(self, request: int) -> None:
        """A request leaves the queue."""
        keys = self._window.pop(request, None)
        if keys is None:
            self._gone.add(request)
            return
        for key in keys:
            if self._needs[key] == 1:
                del self._needs[key]
            else:
                self._needs[key] -= 1
        self._look(keys)
        self._extend()

    def evict(self, newcomer: int) -> int | None:
        if self.lowest() and newcomer not in self._needs:
            return None
        return super().evict(newcomer)

    def _extend(self) -> None:
        while self._beyond:
            request, keys = self._beyond[0]
            if request in self._gone:
                self._gone.remove(request)
            elif len(self._needs) + sum(key not in self._needs for key in keys) > self._capacity_blocks:
                return
            else:
                self._window[request] = keys
                for key in keys:
                    self._needs[key] = self._needs.get(key, 0) + 1
                self._look(keys)
            self._beyond.popleft()

    def _look(self, keys: Sequence[int]) -> None:
        self.use([key for key in keys if key in self._level_of])
