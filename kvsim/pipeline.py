"""Pipeline parallelism in closed form: layers split into stages, micro-batches that follow one another through them.

The dense cache, on `pp` stages of `tp` GPUs. As in GPipe (arXiv:1811.06965), m equal micro-batches through p equal
stages take m + p - 1 times one of them: a share of (p - 1) / (m + p - 1) of all stages' time is idle.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from kvsim.derive import TIERS, PlanTable
from kvsim.hardware import Gpu, Host
from kvsim.machine import Machine
from kvsim.makespan import Clock, Load
from policies import Full, ModelShape
from policies.dtypes import row_bytes
from policies.model import LayerShape


def stage_layers(model: ModelShape, stages: int) -> list[range]:
    """Consecutive layers of each stage, so that the largest stage has as few weights as can be.

    Of equal splits the one whose earlier stages are the smaller, since the last also has the head. Raises ValueError
    for more stages than layers, and where a layer reads the cache of one of another stage.
    """
    if not 1 <= stages <= model.n_layers:
        raise ValueError(f"pp={stages} must be from 1 to the {model.n_layers} layers of {model.name}")
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
    )


def pipeline_s(chunks: Sequence[Sequence[float]], send_s: Sequence[float]) -> float:
    """When the last of some micro-batches leaves the last stage: `chunks[i][j]` is the time of the i-th on stage j.

    `send_s[j]` is how long its activations take to stage j, which works on others meanwhile.
    """
    ends = [0.0] * len(send_s)
    for times in chunks:
        at_s = 0.0
        for j, (seconds, sent_s) in enumerate(zip(times, send_s, strict=True)):
            at_s = max(at_s + sent_s, ends[j]) + seconds
            ends[j] = at_s
    return ends[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """What one context costs; bytes of all `tp` ranks of a stage, one entry for each stage."""

    context_tokens: int
    layers: list[int]
    weight_bytes: list[int]
    kv_bytes: list[int]  # of one sequence
    concurrency: int  # such sequences that fit at a time on every stage
    micro_batches: int  # chunks of the prompt
    prefill_s: float
    prefill_idle_share: float  # of the stages' time until then
    decode_s_per_token: float  # one sequence alone
    batch: int
    tpot_s: float | None  # of the batch in `pp` micro-batches; None where none fits
    output_tokens_per_s: float | None
    sent_bytes_per_token: int  # of activations, between all stages


class Pipelined:
    """Prices the dense cache of a model on a pipeline of `pp` stages.

    An engine may use `utilization` of the HBM. Raises ValueError as `stage_layers` does, for a `tp` that does not fit
    the host or the model, and where stages are on hosts without a network.
    """

    def __init__(
        self, model: ModelShape, gpu: Gpu, host: Host, *, pp: int, tp: int = 1, utilization: float = 0.9
    ) -> None:
        if not 1 <= tp <= host.gpus_max:
            raise ValueError(f"tp={tp} does not fit host {host.name!r}; it takes 1 to {host.gpus_max} GPUs")
        self.pp, self.tp, self.model = pp, tp, model
        self.machine = Machine(gpu=gpu, host=host, tp=tp)
        self.ranges = stage_layers(model, pp)
        self.ranks = [stage_shape(model, own).shard(tp) for own in self.ranges]
        self._hosts = [stage // (host.gpus_max // tp) for stage in range(pp)]
        if self._hosts[-1] and not host.nic_Bps:
            raise ValueError(f"pp={pp} x tp={tp} GPUs are more than one host {host.name!r}, which has no network")
        self._tables = [PlanTable(Full(), rank, self.machine, {}) for rank in self.ranks]
        self._clocks = [Clock(rank, self.machine) for rank in self.ranks]
        usable = int(gpu.memory_bytes * utilization)
        self._room_bytes = [usable - rank.weight_bytes for rank in self.ranks]

    def send_s(self, tokens: int) -> list[float]:
        """How long the activations of so many tokens take to each stage; each rank sends its part of them."""
        nbytes = -(-tokens * self._row_bytes // self.tp)
        seconds = [0.0]
        for before, here in pairwise(self._hosts):
            latency_s, rate_Bps = self.machine.peer if before == here else self.machine.nic
            seconds.append(latency_s + nbytes / rate_Bps)
        return seconds

    def costs(self, context_tokens: int, micro_batches: int, batch: int | None = None) -> Pipeline:
        """The costs at `context_tokens`, the last of which a decode step feeds in; `batch` default: what fits.

        Raises ValueError for contexts below two tokens, and for more micro-batches than the context has tokens.
        """
        if context_tokens < 2:
            raise ValueError(f"context_tokens={context_tokens} leaves nothing to decode after; use at least 2")
        if not 1 <= micro_batches <= context_tokens:
            raise ValueError(f"micro_batches={micro_batches} must be from 1 to the context's {context_tokens} tokens")
        stored = [int(table.decode(context_tokens - 1, 1).start[-len(TIERS)]) for table in self._tables]
        fitting = [max(0, room) // kv for room, kv in zip(self._room_bytes, stored, strict=True) if kv]
        concurrency = min(fitting) if fitting else 0
        edges = [context_tokens * i // micro_batches for i in range(micro_batches + 1)]
        chunks = [
            [self._chunk_s(stage, context_tokens, past, end - past) for stage in range(self.pp)]
            for past, end in pairwise(edges)
        ]
        prefill_s = pipeline_s(chunks, self.send_s(-(-context_tokens // micro_batches)))
        batch = concurrency if batch is None else batch
        tpot_s = self.tpot_s(context_tokens, batch) if 0 < batch <= concurrency else None
        return Pipeline(
            context_tokens=context_tokens,
            layers=[len(own) for own in self.ranges],
            weight_bytes=[self.tp * rank.weight_bytes for rank in self.ranks],
            kv_bytes=[self.tp * kv for kv in stored],
            concurrency=concurrency,
            micro_batches=micro_batches,
            prefill_s=prefill_s,
            prefill_idle_share=1 - sum(map(sum, chunks)) / (self.pp * prefill_s),
            decode_s_per_token=self.tpot_s(context_tokens, 1),
            batch=batch,
            tpot_s=tpot_s,
            output_tokens_per_s=batch / tpot_s if tpot_s else None,
            sent_bytes_per_token=(self.pp - 1) * self._row_bytes,
        )

    def tpot_s(self, context_tokens: int, batch: int) -> float:
        """Time between two tokens of a sequence when a batch decodes in `pp` micro-batches, without end.

        A micro-batch comes round when all stages have had it, and not before the slowest has had all of them.
        """
        size = -(-batch // self.pp)
        stages = [self._decode_s(stage, context_tokens, size) for stage in range(self.pp)]
        micro_batches = -(-batch // size)
        return max(micro_batches * max(stages), sum(stages) + sum(self.send_s(size)))

    @property
    def _row_bytes(self) -> int:
        return row_bytes((self.model.hidden_dim,), self.model.dtype)

    def _chunk_s(self, stage: int, prompt: int, past: int, new: int) -> float:
        logits = int(stage == self.pp - 1 and past + new == prompt)
        load = Load(*self._tables[stage].prefill(prompt, past, new))
        return self._clocks[stage].iteration([load], new, logits)[0]

    def _decode_s(self, stage: int, tokens: int, size: int) -> float:
        segment = self._tables[stage].decode(tokens - 1, 1)
        load = Load(segment.piece.structure, segment.start * size)
        return self._clocks[stage].iteration([load], size, size if stage == self.pp - 1 else 0)[0]


def _params(layer: LayerShape) -> int:
    return layer.qkv_params + layer.out_params + layer.mlp_params
