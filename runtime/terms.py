"""What all caches of one `offload` share, and what its policy makes of a layer: its own policy, and what that keeps."""

import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from policies import ModelShape, Policy, Step, plan_layer, settle
from policies.plan import Buffer, Tier, stored_bytes
from runtime.call import Method
from runtime.dense import hand_back
from runtime.derived import Plans
from runtime.footprint import Footprint
from runtime.methods import method_of
from runtime.mover import Mover
from runtime.probe import SeenLayer
from runtime.recorder import Recorder

if TYPE_CHECKING:
    from runtime.cache import TieredCache
    from runtime.captured import Replays

LONG_PROMPT = 1 << 16  # tokens: no policy leaves such a prompt dense for being short


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What all caches of one `offload` share; `caches` refers to those that are in use.

    `decoder` is the module that the model hands its cache to: they are used in its forward alone. `replays` counts
    captured decode steps, and is None where none are to be.
    """

    shape: ModelShape
    seen: tuple[SeenLayer, ...]
    policy: Policy
    plans: Plans
    max_new_tokens: int
    mover: Mover
    recorder: Recorder
    footprint: Footprint
    decoder: "weakref.ref[torch.nn.Module]"
    caches: "list[weakref.ref[TieredCache]]"
    replays: "Replays | None" = None

    def leaf(self, prompt: int, layer: int) -> tuple[Policy, Method]:
        """The policy of a layer for a first prompt, and its torch code."""
        leaf = settle(self.policy, self.shape, prompt, layer)
        method = method_of(leaf)
        if self.seen[layer].by_itself:
            method = replace(method, kernels={**method.kernels, "attend": hand_back})
        return leaf, method

    def buffers(self, leaf: Policy, layer: int, prompt: int, first: int) -> tuple[list[Buffer], list[Buffer]]:
        """What a layer keeps, at its largest, and what only its prompt needs; `first` tokens come in the first call."""
        at_once = method_of(leaf).execution_tokens or prompt
        done = 0 if first == prompt <= at_once else prompt - 1
        whole = Step(prompt_tokens=prompt, past_tokens=done, new_tokens=prompt - done)
        kept = plan_layer(leaf, self.shape, Step.decoding(prompt, self.max_new_tokens), layer).buffers
        names = {buffer.name for buffer in kept}
        passing = [b for b in plan_layer(leaf, self.shape, whole, layer).buffers if b.name not in names or b.ring]
        return list(kept), passing

    def needed_bytes(self, batch: int, prompt: int, first: int) -> Counter[Tier]:
        """What a cache of so many sequences takes per tier, from its first prompt on."""
        layers = []
        for index in own_layers(self.seen):
            kept, passing = self.buffers(self.leaf(prompt, index)[0], index, prompt, first)
            layers.append(kept + passing)
        return Counter({tier: batch * nbytes for tier, nbytes in stored_bytes(layers).items()})


def own_layers(seen: Sequence[SeenLayer]) -> list[int]:
    """The layers that follow a policy: those that hold all tokens, for themselves alone."""
    return [index for index, layer in enumerate(seen) if layer.kind == "full" and not layer.shared]
