"""A layer with full attention and a state of constant size beside it (Falcon-H1, Zamba2)."""

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from policies import Policy
from runtime.call import Method
from runtime.layer import TieredLayer

if TYPE_CHECKING:
    from runtime.cache import TieredCache


class TieredHybridLayer(TieredLayer, LinearAttentionAndFullAttentionLayer):
    """Keys and values follow the policy, the state stays as Hugging Face has it."""

    dtype: Any  # which the base classes declare each in its way
    device: Any

    def __init__(
        self, cache: "TieredCache", index: int, leaf: Policy, method: Method, *, number_of_states: int = 1
    ) -> None:
        TieredLayer.__init__(self, cache, index, leaf, method)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def of(self, cache: "TieredCache") -> "TieredHybridLayer":
        """The same layer of a cache's copy, with a copy of the state."""
        copy = TieredHybridLayer(cache, self.index, self.leaf, self.method)
        vars(copy).update(
            {k: deepcopy(v) for k, v in vars(self).items() if k not in ("_cache", "_new", "leaf", "method")}
        )
        return copy

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether the newest tokens can be taken back: by the policy and from the state."""
        return self.method.crops and bool(LinearAttentionLayer.is_croppable.__get__(self))

    def lazy_initialization(self, *args: torch.Tensor, **kwargs: Any) -> None:  # type: ignore[override]
        """With keys and values, allocate their buffers; by name, a state."""
        if args:
            TieredLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def reset(self) -> None:
        """Forget everything."""
        LinearAttentionLayer.reset(self)
        TieredLayer.reset(self)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Beams change places: the state here, keys and values once for all layers."""
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        TieredLayer.reorder_cache(self, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Raises ValueError: Transformers has no such change for a state."""
        raise ValueError(f"the state of layer {self.index} cannot be repeated; process the prompt once a sequence")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Raises ValueError: Transformers has no such change for a state."""
        raise ValueError(
            f"sequences of the state of layer {self.index} cannot be selected; begin with a new kv.cache()"
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens, as `TieredLayer.crop`; raises what it and the state raise."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        TieredLayer.crop(self, tokens_to_remove)
