"""The four costs of a long context: prefill, decode, how many sequences fit, and switching between them.

Priced from a policy's plan on one GPU, or on `tp` that share every layer; and by the closed form of 'Challenges in
Deploying Long-Context Transformers' (arXiv:2405.08944), as that paper counts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from kvsim.hardware.catalogue import Gpu, Host
from kvsim.hardware.machine import CPU, D2H, H2D, NVLINK, SM, Machine
from kvsim.iteration.arrays import Floats
from kvsim.iteration.busy import HBM_BUSY, OVERHEAD, WORK, add_guesses
from kvsim.iteration.clock import Clock, Load
from kvsim.plans.derive import TIERS, PlanTable
from kvsim.plans.guessing import Guesser
from kvsim.scenario.setup import Setup
from kvsim.scenario.speculation import Speculation
from policies import ModelShape, Policy
from policies.shown import shown

PAPER_PCIE_Bps = 20e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What one sequence of `context_tokens` costs, all ranks together; `batch` such sequences decode at a time.

    Where guesses are verified, `tokens_per_step` are emitted at a time, and every figure is of all that decodes.
    """

    context_tokens: int
    kv_bytes: int
    hbm_bytes: int
    ddr_bytes: int
    concurrency: int  # such sequences that fit at a time, in HBM beside the weights and in DDR
    prefill_s: float
    decode_s_per_token: float
    context_switch_s: float
    bound_by: str
    batch: int
    output_tokens_per_s: float | None  # None where the batch does not fit
    tokens_per_step: float = 1.0


class Explainer:
    """Prices one policy on one model, `tp` GPUs and their host.

    An engine may use `utilization` of the HBM, and sets aside what `engine` does. Raises ValueError where the host
    does not hold as many GPUs, the model does not divide by `tp`, the policy cannot verify guesses, or (when a context
    is priced) the policy cannot take the model.
    """

    def __init__(
        self,
        policy: Policy,
        model: ModelShape,
        gpu: Gpu,
        host: Host,
        *,
        tp: int = 1,
        utilization: float = 0.9,
        engine: str = "vllm",
        shares: Mapping[str, float] | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        if not 1 <= tp <= host.gpus_max:
            raise ValueError(f"tp={tp} does not fit host {shown(host.name)}; it takes 1 to {host.gpus_max} GPUs")
        if not 0 < utilization <= 1:
            raise ValueError(f"gpu_memory_utilization={utilization} must be above 0 and at most 1")
        rank = model.shard(tp)
        self.tp = tp
        self.machine = Machine(gpu=gpu, host=host, tp=tp)
        self._guesser = None
        if speculation is not None:
            speculation.check(policy)
            self._guesser = Guesser(speculation, rank, self.machine)
        self._tokens_per_step = speculation.tokens_per_step if speculation is not None else 1.0
        self._new_tokens = speculation.verified_tokens if speculation is not None else 1
        self.table = PlanTable(policy, rank, self.machine, shares or {}, self._guesser)
        self.clock = Clock(rank, self.machine, self._guesser)
        setup = Setup(
            model=model,
            policy=policy,
            gpu=gpu,
            host=host,
            gpus=tp,
            tp=tp,
            engine=engine,
            gpu_memory_utilization=utilization,
            speculation=speculation,
        )
        memory = setup.gpu_memory
        self.misfit = memory.misfit  # in words; None where the model fits
        # One rank's part of each tier, as a simulation of a lone replica has it.
        hbm_bytes, ddr_bytes, _ = (0, 0, 0) if self.misfit else setup.capacity()
        self.capacity_bytes = (hbm_bytes, ddr_bytes, host.nvme_bytes // tp)

    def costs(self, context_tokens: int, batch: int | None = None) -> Costs:
        """The costs at `context_tokens`, the last of which is the one that the decode step feeds in.

        Prefill takes the whole prompt in one step of batch 1; decoding is timed at batch 1, and its throughput at
        `batch` (default: as many as fit). Raises ValueError for contexts of fewer than two tokens.
        """
        if context_tokens < 2:
            raise ValueError(f"context_tokens={context_tokens} leaves nothing to decode after; use at least 2")
        dims = max(layer.heads * (layer.head_dim + layer.v_head_dim) for layer in self.clock.model.layers)
        most_tokens = math.isqrt(2**61 // dims)
        if context_tokens > most_tokens:
            raise ValueError(
                f"context_tokens={context_tokens} must be at most {most_tokens:,}: beyond, the FLOPs of a layer's "
                "attention exceed 64 bits"
            )
        amounts = self.table.decode(context_tokens - 1, 1).start
        hbm_bytes, ddr_bytes, nvme_bytes = (int(stored) for stored in amounts[-len(TIERS) :])
        held = zip(self.capacity_bytes, (hbm_bytes, ddr_bytes, nvme_bytes), strict=True)
        concurrency = min(capacity // stored for capacity, stored in held if stored)
        decode_s, busy = self._decode(context_tokens, 1)
        batch = concurrency if batch is None else batch
        rate: float | None = None
        if batch <= concurrency:
            emitted = batch * self._tokens_per_step
            rate = emitted / self._decode(context_tokens, batch)[0] if batch else 0.0
        machine = self.machine
        return Costs(
            context_tokens=context_tokens,
            kv_bytes=self.tp * (hbm_bytes + ddr_bytes + nvme_bytes),
            hbm_bytes=self.tp * hbm_bytes,
            ddr_bytes=self.tp * ddr_bytes,
            concurrency=concurrency,
            prefill_s=self._prefill_s(context_tokens),
            decode_s_per_token=decode_s / self._tokens_per_step,
            context_switch_s=machine.transfer_s(hbm_bytes, to_hbm=False) + machine.transfer_s(hbm_bytes, to_hbm=True),
            bound_by=bound_by(busy),
            batch=batch,
            output_tokens_per_s=rate,
            tokens_per_step=self._tokens_per_step,
        )

    def step_s(self, tokens: int, batch: int) -> float:
        """One decode step of `batch` sequences that hold `tokens` after it, whether or not they fit."""
        return self._decode(tokens, batch)[0]

    def prompts_s(self, tokens: int, batch: int) -> float:
        """The prompts of `batch` sequences, `tokens` each, in one step."""
        structure, amounts = self.table.prefill(tokens, 0, tokens)
        return self._iteration(Load(structure, amounts * batch), tokens=tokens * batch, logits=batch, sequences=0)[0]

    def _prefill_s(self, tokens: int) -> float:
        load = Load(*self.table.prefill(tokens, 0, tokens))
        return self._iteration(load, tokens=tokens, logits=1, sequences=0)[0]

    def _decode(self, tokens: int, batch: int) -> tuple[float, Floats]:
        segment = self.table.decode(tokens - 1, 1)
        load = Load(segment.piece.structure, segment.start * batch)
        new = batch * self._new_tokens
        return self._iteration(load, tokens=new, logits=new, sequences=batch)

    def _iteration(self, load: Load, tokens: int, logits: int, sequences: int) -> tuple[float, Floats]:
        """That of the clock, and what guessing adds to it."""
        seconds, busy = self.clock.iteration([load], tokens=tokens, logits=logits)
        if self._guesser is None:
            return seconds, busy
        seconds += add_guesses(self._guesser.parts, busy, sequences, 0 if sequences else tokens)
        return seconds, busy


def bound_by(busy: Floats) -> str:
    """What a step keeps busy longest: compute, hbm, pcie, nvlink, cpu or overhead, as `kvsim.results.causes` has them.

    `busy` is that of `Clock.iteration`. Of the two directions of PCIe the busier one counts; `overhead` is the time
    of the SMs that neither arithmetic nor HBM traffic explains, kernel launches.
    """
    seconds = {
        "hbm": float(busy[HBM_BUSY]),
        "compute": float(busy[WORK]),
        "pcie": float(max(busy[H2D], busy[D2H])),
        "cpu": float(busy[CPU]),
        "nvlink": float(busy[NVLINK]),
        OVERHEAD: float(busy[SM] - busy[HBM_BUSY] - busy[WORK]),
    }
    return max(seconds, key=lambda name: seconds[name])


def paper_costs(model: ModelShape, gpu: Gpu, context_tokens: int, *, tp: int = 1, batch: int | None = None) -> Costs:
    """The costs of the dense cache by the formulas of arXiv:2405.08944, with its roundings and mixed units.

    With P the parameters to two digits (34e9 for Yi-34B), n the context, KV = 2 L Hkv d bytes n, and B(x) = x / 2**30
    * 1e9, since the paper's GB are GiB for memories and caches:
    concurrency = floor((B(HBM) - W) / B(KV)), where W = the bytes of P parameters (68 GB);
    prefill = (2 P n + L H d n^2) / peak FLOP/s, which counts half of causal attention's FLOPs (c = 1);
    decode = (W' + B(KV)) / HBM bandwidth to two digits (2.0 TB/s), where W' = the layers' weights alone, without
    embeddings and head: 66.9 GB, the 67 that the published seconds imply;
    context switch = 2 B(KV) / 20 GB/s.
    Every kind of resource grows with `tp`. `kv_bytes` and `hbm_bytes` are plain bytes.

    Raises ValueError for a model with experts or layers other than full attention, for a GPU that is not under its
    datasheet rates, and for contexts below one token.
    """
    for index, layer in enumerate(model.layers):
        if layer.kind != "full" or layer.experts:
            what = "routes experts" if layer.experts else f"is of kind {shown(layer.kind)}"
            raise ValueError(
                f"the paper mode is for dense models of full attention; layer {index} of {model.name} {what}"
            )
    if gpu.parameter_set != "datasheet":
        raise ValueError(f"the paper mode takes datasheet rates, not {gpu.parameter_set}; use {gpu.name}@datasheet")
    if context_tokens < 1 or tp < 1:
        raise ValueError(f"context_tokens={context_tokens} and tp={tp} must be at least 1")
    kv_bytes = model.kv_bytes(context_tokens)
    paper_kv_bytes = _gib_as_gb(kv_bytes)
    nominal_params = int(_two_digits(model.params))
    layer_params = sum(x.qkv_params + x.out_params + x.mlp_params for x in model.layers)
    room_bytes = tp * _gib_as_gb(gpu.memory_bytes) - model.bytes_of(nominal_params)
    concurrency = max(0, int(room_bytes // paper_kv_bytes))
    prefill_flops = (
        2 * nominal_params * context_tokens + sum(x.heads * x.head_dim for x in model.layers) * context_tokens**2
    )
    hbm_Bps = tp * _two_digits(gpu.rates.hbm_Bps)
    weights_s = model.bytes_of(layer_params) / hbm_Bps
    batch = concurrency if batch is None else batch
    rate = batch / (weights_s + batch * paper_kv_bytes / hbm_Bps) if batch <= concurrency else None
    return Costs(
        context_tokens=context_tokens,
        kv_bytes=kv_bytes,
        hbm_bytes=kv_bytes,
        ddr_bytes=0,
        concurrency=concurrency,
        prefill_s=prefill_flops / (tp * gpu.rates.product_flops("bf16")),
        decode_s_per_token=weights_s + paper_kv_bytes / hbm_Bps,
        context_switch_s=2 * paper_kv_bytes / (tp * PAPER_PCIE_Bps),
        bound_by="hbm",
        batch=batch,
        output_tokens_per_s=rate,
    )


def _gib_as_gb(size_bytes: int) -> float:
    return size_bytes / 2**30 * 1e9


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")
