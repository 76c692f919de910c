"""One layer of a cache: it takes new tokens, and the model's attention function then runs the plan over them."""

import weakref
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import CacheLayerMixin

from policies import Policy
from runtime.call import Handed, Method

if TYPE_CHECKING:
    from runtime.cache import TieredCache

HANDLE = "_kvsim_layer"  # attribute of the keys that `update` returns: a weak reference to their layer


class TieredLayer(CacheLayerMixin):
    """One layer: `update` takes the new tokens, and the attention function then runs the plan over them."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: "TieredCache", index: int, leaf: Policy, method: Method) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache, self.index = weakref.ref(cache), index
        self.tokens = self.prompt_tokens = 0
        self.first_prompt_tokens = 0  # of the first turn, which has settled the policy
        self.leaf, self.method = leaf, method
        self._new: tuple[torch.Tensor, torch.Tensor] | None = None

    def __deepcopy__(self, _memo: dict[int, Any]) -> "TieredLayer":
        raise ValueError("a layer of a kvsim cache has no memory of its own; copy the cache")

    def of(self, cache: "TieredCache") -> "TieredLayer":
        """The same layer of a cache's copy."""
        copy = TieredLayer(cache, self.index, self.leaf, self.method)
        vars(copy).update({name: value for name, value in vars(self).items() if name not in ("_cache", "_new")})
        return copy

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]  # an attribute of most layers, a property of some
        """Whether the newest tokens can be taken back, as assisted and lookup decoding do."""
        return self.method.crops

    @property
    def cache(self) -> "TieredCache":
        """The cache that the layer belongs to."""
        cache = self._cache()
        if cache is None:
            raise RuntimeError("the cache of this layer no longer exists; keep `kv.cache()` while generating")
        return cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the layer's buffers for the whole generation."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.cache.open(self, key_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the new tokens, (batch, kv_heads, new_tokens, head_dim) each, and hand them on with a handle.

        Raises ValueError where the attention that must follow cannot come, or has not come for the layer before.
        """
        cache = self.cache
        with cache.at_work():
            cache.expect(self, key_states)
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            if cache.terms.seen[self.index].by_itself:
                return self._hand_back(key_states, value_states)
            self._new = (key_states, value_states)
        handed = key_states.view_as(key_states)
        setattr(handed, HANDLE, weakref.ref(self))
        return handed, value_states

    def attend(
        self,
        query: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Run the layer's plan for the tokens of the last `update`; (batch, heads, new_tokens, head_dim).

        Raises ValueError when `value` is not what `update` was given: then the model's attention is of its own kind.
        """
        cache = self.cache
        with cache.at_work():
            if self._new is None or value is not self._new[1]:
                raise ValueError(
                    f"layer {self.index} of {cache.terms.shape.name} attends to other keys or values than it caches; "
                    "the runtime has no method for such attention"
                )
            (new_k, new_v), self._new = self._new, None
            q, new_k, new_v = (cache.stored(part) for part in (query, new_k, new_v))
            out = cache.run(self, Handed(q, new_k, new_v, mask, scale, softcap, sinks)).to(query.dtype)
            if cache.walk is None:  # a captured step counts when it is replayed
                self.tokens += new_k.shape[2]
        if torch.is_grad_enabled() and query.requires_grad:
            out = _NoGradient.apply(out, query)  # type: ignore[no-untyped-call]
        return out

    def _hand_back(self, new_k: torch.Tensor, new_v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the layer's plan for a model that attends by itself: all keys and values, as a stock cache gives them."""
        k, v = (self.cache.stored(part) for part in (new_k, new_v))
        both = self.cache.run(self, Handed(k, k, v, None, 1.0))
        self.tokens += new_k.shape[2]
        found = []
        for part, new in zip(both.split([k.shape[3], v.shape[3]], dim=3), (new_k, new_v), strict=True):
            held = part.contiguous().to(new.dtype)
            found.append(_NoGradient.apply(held, new) if new.requires_grad else held)  # type: ignore[no-untyped-call]
        return found[0], found[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All tokens, resident or not, so that padding columns line up with positions."""
        return self.tokens + int(query_length), 0

    def get_seq_length(self) -> int:
        """Tokens taken so far."""
        return self.tokens

    def get_max_length(self) -> int:
        """No maximum of its own; the cache raises when its `max_tokens` are used up."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.tokens, self._new, self.is_initialized = 0, None, False
        self.cache.release()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Beams change places; done once for all layers, when the first is asked."""
        if self.index == self.cache.own[0]:
            self.cache.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times, one after the other; done once for all layers."""
        if self.index == self.cache.own[0]:
            self.cache.take(torch.arange(self.cache.arena.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these sequences, given by numbers or as bool; done once for all layers."""
        if self.index == self.cache.own[0]:
            self.cache.take(torch.arange(self.cache.arena.batch)[torch.as_tensor(indices).cpu()])

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens: -n of them, or, as older versions of Transformers ask, all but n.

        Raises ValueError where the policy cannot.
        """
        gone = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.tokens - tokens_to_remove)
        if not gone:
            return
        if not self.method.crops:
            raise ValueError(
                f"a cache under {self.leaf.name} cannot take tokens back; generate without assisted or lookup decoding"
            )
        self.tokens -= gone
        self.prompt_tokens = min(self.prompt_tokens, self.tokens)
        self.cache.cropped(self, gone)


class _NoGradient(torch.autograd.Function):
    """Passes attention's output on, and refuses to go back through it."""

    @staticmethod
    def forward(_context: Any, out: torch.Tensor, _query: torch.Tensor) -> torch.Tensor:
        """The output, as it is."""
        return out.view_as(out)

    @staticmethod
    def backward(_context: Any, *_gradients: torch.Tensor) -> Any:
        """Raises ValueError: keys and values in a cache have no gradients."""
        raise ValueError("no gradient passes through a kvsim cache; train without kv.cache()")
