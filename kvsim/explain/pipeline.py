"""Pipeline parallelism in closed form: layers split into stages, micro-batches that follow one another through them.

The dense cache, on `pp` stages of `tp` GPUs. As in GPipe (arXiv:1811.06965), m equal micro-batches through p equal
stages take m + p - 1 times one of them: a share of (p - 1) / (m + p - 1) of all stages' time is idle.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from kvsim.hardware.catalogue import Gpu, Host
from kvsim.hardware.machine import Machine
from kvsim.iteration.clock import Clock, Load
from kvsim.plans.derive import TIERS, PlanTable
from kvsim.scenario.setup import Setup
from kvsim.scenario.stages import stages_of
from policies import Full, ModelShape
from policies.shown import shown


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

    An engine may use `utilization` of the HBM, and sets aside what `engine` does. Raises ValueError as `stages_of`
    does, and for a `tp` that does not fit the host.
    """

    def __init__(
        self,
        model: ModelShape,
        gpu: Gpu,
        host: Host,
        *,
        pp: int,
        tp: int = 1,
        utilization: float = 0.9,
        engine: str = "vllm",
    ) -> None:
        if not 1 <= tp <= host.gpus_max:
            raise ValueError(f"tp={tp} does not fit host {shown(host.name)}; it takes 1 to {host.gpus_max} GPUs")
        self.pp, self.tp = pp, tp
        self.machine = Machine(gpu=gpu, host=host, tp=tp)
        self._stages = stages_of(model, self.machine, pp)
        self._tables = [PlanTable(Full(), rank, self.machine, {}) for rank in self._stages.ranks]
        self._clocks = [Clock(rank, self.machine) for rank in self._stages.ranks]
        setup = Setup(
            model=model,
            policy=Full(),
            gpu=gpu,
            host=host,
            gpus=pp * tp,
            tp=tp,
            pp=pp,
            engine=engine,
            gpu_memory_utilization=utilization,
        )
        memory = setup.gpu_memory
        self._room_bytes = memory.room_bytes
        self.misfit = memory.misfit  # in words; None where the model fits

    def send_s(self, tokens: int) -> list[float]:
        """How long the activations of so many tokens take to each stage; each rank sends its part of them."""
        return self._stages.send_s(tokens)

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
            layers=[len(own) for own in self._stages.layers],
            weight_bytes=[self.tp * rank.weight_bytes for rank in self._stages.ranks],
            kv_bytes=[self.tp * kv for kv in stored],
            concurrency=concurrency,
            micro_batches=micro_batches,
            prefill_s=prefill_s,
            prefill_idle_share=1 - sum(map(sum, chunks)) / (self.pp * prefill_s),
            decode_s_per_token=self.tpot_s(context_tokens, 1),
            batch=batch,
            tpot_s=tpot_s,
            output_tokens_per_s=batch / tpot_s if tpot_s else None,
            sent_bytes_per_token=(self.pp - 1) * self._stages.row_bytes,
        )

    def tpot_s(self, context_tokens: int, batch: int) -> float:
        """Time between two tokens of a sequence when a batch decodes in `pp` micro-batches, without end.

        A micro-batch comes round when all stages have had it, and not before the slowest has had all of them.
        """
        micro_batches = -(-batch // -(-batch // self.pp))
        small, larger = divmod(batch, micro_batches)
        sizes = [(small, micro_batches - larger), (small + 1, larger)]
        costs = [
            [self._decode_s(stage, context_tokens, size) for size, times in sizes if times] for stage in range(self.pp)
        ]
        counts = [times for _, times in sizes if times]
        slowest_s = max(sum(n * one for n, one in zip(counts, stage, strict=True)) for stage in costs)
        through_s = sum(stage[-1] for stage in costs) + sum(self.send_s(small + (larger > 0)))
        return max(slowest_s, through_s)

    def _chunk_s(self, stage: int, prompt: int, past: int, new: int) -> float:
        logits = int(stage == self.pp - 1 and past + new == prompt)
        load = Load(*self._tables[stage].prefill(prompt, past, new))
        return self._clocks[stage].iteration([load], new, logits)[0]

    def _decode_s(self, stage: int, tokens: int, size: int) -> float:
        segment = self._tables[stage].decode(tokens - 1, 1)
        load = Load(segment.piece.structure, segment.start * size)
        return self._clocks[stage].iteration([load], size, size if stage == self.pp - 1 else 0)[0]
