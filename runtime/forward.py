"""Whether a forward of the decoder goes as it must: every layer takes its tokens once, and attends right after."""

from collections.abc import Iterable


class Forward:
    """The forwards that one cache is used in, one after the other; what goes wrong in one ends the cache's use."""

    def __init__(self) -> None:
        self._awaited: set[int] = set()  # layers that are still to take their tokens
        self._pending: int | None = None  # the layer whose attention must come next
        self._under_way = False  # one has begun and not come to its end
        self._ended = ""  # why the cache cannot be used any more

    def begin(self, layers: Iterable[int]) -> None:
        """A forward begins, in which these layers take tokens."""
        self._under_way, self._awaited, self._pending = True, set(layers), None

    def expect(self, layer: int) -> None:
        """A layer has been given its tokens, and its attention comes next.

        Raises ValueError when it was not to be given any, or the layer before has not attended.
        """
        self.check_not_ended()
        if self._pending is not None:
            self._missed(self._pending)
        if layer not in self._awaited:
            raise ValueError(
                "a kvsim cache was given to a model that is not under its offload(): use it inside the context, and in "
                "a forward of its model alone"
            )
        self._awaited.remove(layer)
        self._pending = layer

    def attends(self) -> None:
        """The layer that has taken its tokens attends now."""
        self._pending = None

    def finish(self) -> None:
        """The forward has come to its end; ValueError when a layer has not attended."""
        self.check_not_ended()
        if self._pending is not None or self._awaited:
            self._missed(self._pending if self._pending is not None else min(self._awaited))
        self._under_way = False

    def forget(self) -> None:
        """Whatever was under way does not count any more."""
        self._awaited, self._pending, self._under_way = set(), None, False

    def end(self, why: str) -> None:
        """Nothing comes after this; whoever tries is told the first `why`."""
        self._ended = self._ended or why

    def check_usable(self) -> None:
        """Raise ValueError when the cache has ended, or was left in the middle of a forward."""
        self.check_not_ended()
        if self._under_way:
            raise ValueError(
                "a forward with this cache has not come to its end (it was interrupted, or another thread is at it), "
                "so that layers hold different tokens; begin again with a new kv.cache()"
            )

    def check_not_ended(self) -> None:
        """Raise ValueError when the cache has ended."""
        if self._ended:
            raise ValueError(self._ended)

    def _missed(self, layer: int) -> None:
        raise ValueError(
            f"the attention of layer {layer} did not come through the runtime: its implementation was changed inside "
            "the context, or this architecture computes attention in a way of its own; what came out is worth nothing"
        )
