"""The stages of a pipeline: which layers each has, where it lies, and how activations come to it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

from kvsim.hardware.machine import Machine
from policies import ModelShape, Policy, Step, resolve
from policies.dtypes import row_bytes
from policies.model import LayerShape
from policies.plan import Tier, stored_bytes
from policies.shown import shown

MOST_STAGES = 128
_CONTEXTS = [1 << power for power in range(4, 21, 2)]  # at which the parts that stages hold are compared


@dataclass(frozen=True, slots=True)
class Stages:
    """`pp` stages of `tp` GPUs each, which fill one host after the other.

    `layers` are those of each stage, `ranks` what one of its GPUs has of the model, `hosts` where it is, from 0 on;
    `row_bytes` are a token's activations.
    """

    machine: Machine
    layers: tuple[range, ...]
    ranks: tuple[ModelShape, ...]
    hosts: tuple[int, ...]
    row_bytes: int

    def hops(self) -> list[tuple[float, float]]:
        """Latency and rate of the way to each stage but the first."""
        ways = pairwise(self.hosts)
        return [self.machine.peer if before == here else self.machine.nic for before, here in ways]

    def sent_bytes(self, tokens: int) -> int:
        """What one rank sends to the next stage: its part of the activations of so many tokens."""
        return -(-tokens * self.row_bytes // self.machine.tp)

    def send_s(self, tokens: int) -> list[float]:
        """How long the activations of so many tokens take to each stage."""
        nbytes = self.sent_bytes(tokens)
        return [0.0] + [latency_s + nbytes / rate_Bps for latency_s, rate_Bps in self.hops()]


@lru_cache(maxsize=64)
def stages_of(model: ModelShape, machine: Machine, pp: int) -> Stages:
    """The stages of `pp` x `tp` GPUs.

    Raises ValueError as `stage_layers` does, for a `tp` that does not fit the model, and for stages on several hosts
    that have no network.
    """
    layers, host = stage_layers(model, pp), machine.host
    hosts = tuple(stage // (host.gpus_max // machine.tp) for stage in range(pp))
    if hosts[-1] and not host.nic_Bps:
        raise ValueError(
            f"pp={pp} x tp={machine.tp} GPUs are more than one host {shown(host.name)}, which has no network"
        )
    ranks = tuple(stage_shape(model, own).shard(machine.tp) for own in layers)
    return Stages(machine, tuple(layers), ranks, hosts, row_bytes((model.hidden_dim,), model.dtype))


def stage_layers(model: ModelShape, stages: int) -> list[range]:
    """Consecutive layers of each stage, so that the largest stage has as few weights as can be.

    Of equal splits the one whose earlier stages are the smaller, since the last also has the head. Raises ValueError
    for more stages than layers, and where a layer reads the cache of one of another stage.
    """
    most = min(model.n_layers, MOST_STAGES)
    if not 1 <= stages <= most:
        raise ValueError(f"pp={stages} must be from 1 to the {most} layers of {model.name}")
    params = [_params(layer) for layer in model.layers]
    n = len(params)
    # best[i]: the least largest stage of the layers from i on, in so many stages, and where the first of these ends.
    best = [(sum(params[i:]), n) for i in range(n + 1)]
    chosen = [best]
    for left in range(2, stages + 1):
        best = [
            min((max(sum(params[i:end]), best[end][0]), end) for end in range(i + 1, n - left + 2))
            if i <= n - left
            else (0, n)
            for i in range(n + 1)
        ]
        chosen.append(best)
    ranges, first = [], 0
    for table in reversed(chosen):
        ranges.append(range(first, table[first][1]))
        first = table[first][1]
    for own in ranges:
        for i in own:
            source = model.layers[i].share_kv_with
            if source is not None and source < own.start:
                raise ValueError(f"pp={stages}: layer {i} reads the cache of layer {source}, which is on another stage")
    return ranges


def stage_shape(model: ModelShape, own: range) -> ModelShape:
    """The model of one stage: the first has the embedding, the last the head, a copy of its own where they are tied."""
    first, last = own.start == 0, own.stop == model.n_layers
    layers = tuple(
        layer if layer.share_kv_with is None else replace(layer, share_kv_with=layer.share_kv_with - own.start)
        for layer in model.layers[own.start : own.stop]
    )
    outside = model.params - sum(_params(layer) for layer in model.layers)
    params = sum(_params(layer) for layer in layers)
    if first and last:
        params = model.params
    elif first:
        params += model.embedding_params
    elif last:
        tied = outside < model.embedding_params + model.head_params
        params += outside - model.embedding_params + (model.head_params if tied else 0)
    return replace(
        model,
        layers=layers,
        params=params,
        embedding_params=model.embedding_params if first else 0,
        head_params=model.head_params if last else 0,
        head_stored=model.head_stored if last else None,
    )


@lru_cache(maxsize=64)
def held_shares(policy: Policy, rank: ModelShape, layers: tuple[range, ...], tier: Tier) -> tuple[float, ...]:
    """Which part of a sequence's bytes in a tier each stage holds: the most at any of a row of lengths.

    Exact where layers store alike; staging that layers share is counted on every stage.
    """
    shares = [0.0] * len(layers)
    for tokens in _CONTEXTS:
        for step in (Step(prompt_tokens=tokens, past_tokens=0, new_tokens=tokens), Step.decoding(tokens, 1)):
            every = range(rank.n_layers)
            buffers = [resolve(policy, rank, step, layer).buffers(rank, step, layer) for layer in every]
            whole = stored_bytes(buffers)[tier]
            for stage, own in enumerate(layers):
                if whole:
                    part = stored_bytes(buffers[own.start : own.stop])[tier]
                    shares[stage] = max(shares[stage], part / whole)
    return tuple(shares)


def fitting_bytes(rooms: Sequence[int], shares: Sequence[float]) -> int:
    """Bytes of whole sequences that fit where stages have so much room and hold these parts of them."""
    return min((int(room / share) for room, share in zip(rooms, shares, strict=True) if share), default=min(rooms))


def _params(layer: LayerShape) -> int:
    return layer.qkv_params + layer.out_params + layer.mlp_params
