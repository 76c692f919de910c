"""One GPU's place in its node: what each operation of a plan costs there before batches and overlap."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvsim.hardware.catalogue import Gpu, Host
from kvsim.hardware.served import ServedModel
from kvsim.hardware.served_ops import ServedOperations
from policies.model import LayerShape, ModelShape
from policies.plan import Access, Buffer, Copy, Engine, Op, Processor, Sync, Tier, Work

LANES = ("sm", "h2d", "d2h", "cpu", "nvlink", "host")  # the last: the host thread that waits and launches
SM, H2D, D2H, CPU, NVLINK, HOST = range(len(LANES))
HOST_LANES = (H2D, D2H, CPU)  # that GPUs of a host have in common
QKV_KERNELS, OUT_KERNELS, MLP_KERNELS, HEAD_KERNELS = 3, 1, 4, 2
# Rows of what a GPU has of a host that others use, by lane: the seconds per byte below which no transfer goes, the same
# while others use the lane, the share of time in which nobody else does, and a factor of the lane's work.
SHARING = FLOOR, CROWDED, ALONE, SLOWDOWN = 0, 1, 2, 3
UP, DOWN = range(2)  # which way bytes go: towards the GPU, or away from it
Floats = NDArray[np.float64]


class Cost(NamedTuple):
    """How an operation turns amounts into time: `fixed_s` + the larger of its work and its bytes, on one lane.

    Rates are those of a GPU alone on its host. `walked_s` is added to the work's time for each byte.
    """

    lane: int
    fixed_s: float
    work_s: float  # seconds per FLOP (or per element searched)
    streamed_s: float  # seconds per byte of contiguous rows
    scattered_s: float  # seconds per byte of rows at indices that data decide
    sm_share: float  # share of the SMs taken meanwhile
    walked_s: float = 0.0


def copy_floor_s(on_host: int, on_switch: int, ddr_Bps: float, switch_Bps: float) -> float:
    """Seconds per byte below which no copy goes: a fair share of the DDR, which so many GPUs use, and of the switch."""
    return max(on_host / ddr_Bps, on_switch / switch_Bps)


def share_evenly(sharing: Floats, on_host: int, on_switch: int, ddr_Bps: float, switch_Bps: float) -> None:
    """Set what a GPU has of a host that so many use, and its PCIe switch, all the time: itself among them.

    `sharing` is (SHARING, lanes).
    """
    for lane in range(len(LANES)):
        sharing[FLOOR, lane], sharing[CROWDED, lane], sharing[ALONE, lane] = 0.0, 0.0, 1.0
        sharing[SLOWDOWN, lane] = 1.0
    sharing[FLOOR, H2D] = sharing[FLOOR, D2H] = copy_floor_s(on_host, on_switch, ddr_Bps, switch_Bps)
    sharing[SLOWDOWN, CPU] = on_host


def byte_s(own_s: float, sharing: Floats, lane: int) -> float:
    """Seconds per byte of a transfer that takes `own_s` by itself: its mean rate, now alone and now beside others."""
    alone_s = max(own_s, sharing[FLOOR, lane])
    crowded_s = max(own_s, sharing[CROWDED, lane])
    if alone_s == 0 or sharing[ALONE, lane] == 1 or crowded_s <= alone_s:
        return float(sharing[SLOWDOWN, lane] * alone_s)
    rate = sharing[ALONE, lane] / alone_s + (1 - sharing[ALONE, lane]) / crowded_s
    return float(sharing[SLOWDOWN, lane] / rate)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A GPU, its host, and the number of tensor-parallel ranks that it works with.

    Where the GPU's parameter set has constants for each kernel, `served` prices the model's layers and `operations`
    the policies'; else the set's rates do. Kernels take `kernel_slowdown` times as long as either says, and the host
    adds `layer_overhead_s` to each layer: its part of what an iteration takes beside its kernels.
    """

    gpu: Gpu
    host: Host
    tp: int = 1
    layer_overhead_s: float = 0.0
    kernel_slowdown: float = 1.0

    @cached_property
    def served(self) -> ServedModel | None:
        """Prices of the model's layers by kernels; None where the parameter set has rates alone."""
        return ServedModel(self.gpu.kernels, self.tp) if self.gpu.kernels.fitted else None

    @cached_property
    def operations(self) -> ServedOperations | None:
        """Prices of policies' operations by kernels; None where the parameter set has rates alone."""
        return ServedOperations(self.served, self.gpu.rates) if self.served else None

    @property
    def on_switch(self) -> int:
        """How many ranks are on one PCIe switch."""
        return min(self.tp, self.host.gpus_per_switch)

    def sharing(self, on_host: int, on_switch: int) -> Floats:
        """What a GPU has of the host (`share_evenly`)."""
        sharing = np.empty((len(SHARING), len(LANES)))
        share_evenly(sharing, on_host, on_switch, self.host.ddr_Bps, self.host.switch_Bps)
        return sharing

    def _copy_s(self, op: Copy, src: Buffer, dst: Buffer) -> tuple[float, float]:
        """Seconds before a copy's first byte, and of each, by its engine, alone on the host."""
        rates, to_hbm = self.gpu.rates, dst.tier is Tier.HBM
        link_Bps = rates.pcie_h2d_Bps if to_hbm else rates.pcie_d2h_Bps
        if self.operations is not None and op.engine is Engine.GATHER:
            return self.operations.gather(src.row_bytes)
        if self.operations is not None and op.engine is Engine.DMA:
            return self.operations.copy(src.row_bytes, rows_apart=bool(op.ids), to_hbm=to_hbm)
        if op.engine is Engine.GATHER:
            return rates.launch_s, 1 / min(link_Bps, rates.gather_Bps(src.row_bytes))
        if op.engine is Engine.CPU:
            link_Bps = 1 / (1 / link_Bps + 1 / self.host.random_Bps(src.row_bytes))
        byte_s = 1 / link_Bps
        if op.ids:  # one descriptor for each row
            byte_s += rates.pcie_latency_s / src.row_bytes
        return rates.pcie_latency_s, byte_s

    @property
    def copy_floor_s(self) -> float:
        """Seconds per byte below which no copy goes, alone on the host."""
        return copy_floor_s(1, 1, self.host.ddr_Bps, self.host.switch_Bps)

    def cost(self, op: Op, buffers: Mapping[str, Buffer], layer: LayerShape, kv_dtype: str, *, prefill: bool) -> Cost:
        """What one operation costs on this machine, in a step of a prompt or in one that decodes.

        Raises ValueError for a copy that does not run between HBM and DDR.
        """
        cost = self._priced(op, buffers, layer, kv_dtype, prefill=prefill)
        return slowed(cost, self.kernel_slowdown) if cost.lane == SM else cost

    def _priced(
        self, op: Op, buffers: Mapping[str, Buffer], layer: LayerShape, kv_dtype: str, *, prefill: bool
    ) -> Cost:
        rates = self.gpu.rates
        if isinstance(op, Sync):
            return Cost(HOST, rates.sync_s, 0.0, 0.0, 0.0, 0.0)
        if isinstance(op, Copy):
            src, dst = buffers[op.src], buffers[op.dst]
            if {src.tier, dst.tier} != {Tier.HBM, Tier.DDR}:
                raise ValueError(f"{op.name}: copies run between hbm and ddr, not from {src.tier} to {dst.tier}")
            fixed_s, byte_s = self._copy_s(op, src, dst)
            lane = H2D if dst.tier is Tier.HBM else D2H
            sm_share = rates.gather_sm_share if op.engine is Engine.GATHER else 0.0
            return Cost(lane, fixed_s, 0.0, byte_s, byte_s, sm_share)
        if op.processor is Processor.CPU:
            scattered = max(
                (self._scattered_s(a, buffers) for a in (*op.reads, *op.writes) if a.scattered), default=0.0
            )
            return Cost(CPU, 0.0, 1 / self.host.cpu_flops, 1 / self.host.ddr_Bps, scattered, 0.0)
        if self.operations is not None:
            line = self.operations.line(op.work, layer, kv_dtype, prefill=prefill)
            fixed_s = op.launches * line.start_s
            return Cost(SM, fixed_s, line.work_s, line.byte_s, line.byte_s, 0.0, line.walked_s)
        byte_s = 1 / (rates.elementwise_Bps if op.work in (Work.ELEMENTWISE, Work.TOPK) else rates.hbm_Bps)
        return Cost(SM, op.launches * rates.launch_s, self._work_s(op.work), byte_s, byte_s, 0.0)

    def _scattered_s(self, access: Access, buffers: Mapping[str, Buffer]) -> float:
        return 1 / self.host.random_Bps(buffers[access.buffer].row_bytes)

    def _work_s(self, work: Work) -> float:
        rates = self.gpu.rates
        if work is Work.ATTENTION:
            return 1 / rates.attention_flops
        if work is Work.MATMUL:
            return 1 / rates.product_flops("bf16")
        if work is Work.TOPK:
            return 1 / rates.topk_elements_per_s
        return 1 / rates.product_flops("fp32")

    def linear_s(self, weight_bytes: int, work: Sequence[tuple[str, int]], kernels: float) -> float:
        """Time of dense layers: weights stream in and then multiply; `work` are FLOPs by type of the products.

        The two are added, not overlapped: decode GEMMs of few rows run below either roofline, and the sum reproduces
        ShadowKV's measured FFN times at batches of 12, 24 and 48 within 10 % (arXiv:2410.21465, table of latencies).
        """
        rates = self.gpu.rates
        return kernels * rates.launch_s + weight_bytes / rates.hbm_Bps + self.products_s(work)

    def products_s(self, work: Sequence[tuple[str, int]]) -> float:
        """Time of products with weights, given FLOPs by their type."""
        return sum(flops / self.weight_flops(dtype) for dtype, flops in work if flops)

    def weight_flops(self, dtype: str) -> float:
        """FLOPs per second of products with weights of `dtype`; weight-only formats multiply in 16 bits."""
        return self.gpu.rates.product_flops(dtype)

    def layer_s(self, model: ModelShape, layer: LayerShape, tokens: int) -> tuple[float, float, float]:
        """Times of a layer's own parts for a batch of `tokens`: before the policy, output projection, MLP.

        A block layer's are means over where in its block each sequence is.
        """
        if self.served is not None:
            parts = self.served.layer(model, layer, np.array([tokens]))
            qkv_s, out_s, mlp_s = (float(part.seconds[0]) for part in parts)
            return qkv_s, out_s, mlp_s
        share, every = layer.share_run(tokens), layer.tokens_per_run

        def part(nbytes: int, products: Sequence[tuple[str, int]], kernels: int) -> float:
            work = [(dtype, 2 * params * tokens // every) for dtype, params in by_type(products).items()]
            return self.linear_s(round(share * nbytes), work, share * kernels)

        qkv_bytes, out_bytes = model.attention_bytes(layer)
        products = model.products(layer)
        qkv = part(qkv_bytes, products[:1], QKV_KERNELS)
        out = part(out_bytes, products[1:2], OUT_KERNELS)
        if not layer.mlp_params:
            return qkv, out, 0.0
        return qkv, out, part(model.mlp_bytes_touched(layer, tokens), products[2:], MLP_KERNELS)

    def head_s(self, model: ModelShape, logits: int) -> float:
        """Time of the output head for `logits` positions."""
        if self.served is not None:
            return float(self.served.head(model, np.array([logits])).seconds[0])
        work = [(model.head_product, 2 * model.head_params * logits)]
        return self.linear_s(model.head_bytes, work, HEAD_KERNELS)

    def allreduce_bytes(self, model: ModelShape, tokens: int) -> int:
        """Bytes that one rank sends in a ring all-reduce of a batch's hidden states."""
        return 2 * (self.tp - 1) * -(-tokens * model.hidden_dim * 2 // self.tp)

    def allreduce_s(self, model: ModelShape, tokens: int) -> float:
        """Time of an all-reduce of them over NVLink, or of a ring over PCIe where the GPU has none."""
        if self.tp == 1:
            return 0.0
        if self.served is not None and self.gpu.rates.nvlink_Bps:
            return self.gpu.kernels.all_reduce_s(nbytes=tokens * model.hidden_dim * 2, gpus=self.tp)
        latency_s, peer_Bps = self.peer
        return 2 * latency_s + self.allreduce_bytes(model, tokens) / peer_Bps

    def allreduce_fixed_s(self, seconds: float, nbytes: int) -> float:
        """The part of an all-reduce of so many seconds, and sent bytes of a rank, that is no transfer."""
        latency_s, peer_Bps = self.peer
        if self.served is not None and self.gpu.rates.nvlink_Bps and seconds:
            start_s = self.gpu.kernels.all_reduce_s(nbytes=1, gpus=self.tp)
            return max(0.0, min(start_s, seconds - nbytes / peer_Bps))
        return 2 * latency_s

    def peer_s(self, nbytes: int) -> float:
        """Time to send one piece to a peer, over NVLink or, where the GPU has none, over PCIe."""
        latency_s, peer_Bps = self.peer
        return latency_s + nbytes / peer_Bps if nbytes else 0.0

    @property
    def peer(self) -> tuple[float, float]:
        """Latency and rate of the way to a peer on the host."""
        rates = self.gpu.rates
        if rates.nvlink_Bps:
            return rates.nvlink_latency_s, rates.nvlink_Bps
        return rates.pcie_latency_s, min(rates.pcie_h2d_Bps, self.host.switch_Bps / self.on_switch)

    @property
    def nic(self) -> tuple[float, float]:
        """Latency and rate of the way to a GPU of another host: its share of the host's adapters, no more than PCIe."""
        rates = self.gpu.rates
        return self.host.nic_latency_s, min(self.host.nic_Bps / self.host.gpus_max, rates.pcie_d2h_Bps)

    def transfer_s(self, nbytes: int, *, to_hbm: bool) -> float:
        """Time to move one contiguous piece between HBM and DDR, alone on the host: a swap, or a cached prefix."""
        rates = self.gpu.rates
        link_s = 1 / (rates.pcie_h2d_Bps if to_hbm else rates.pcie_d2h_Bps)
        return rates.pcie_latency_s + nbytes * max(link_s, self.copy_floor_s) if nbytes else 0.0


def slowed(cost: Cost, slowdown: float) -> Cost:
    """A kernel that takes so many times as long."""
    fixed_s, work_s, streamed_s, scattered_s = (slowdown * seconds for seconds in cost[1:5])
    return Cost(cost.lane, fixed_s, work_s, streamed_s, scattered_s, cost.sm_share, slowdown * cost.walked_s)


def by_type(products: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Amounts summed by the type they belong to."""
    totals: dict[str, int] = {}
    for dtype, amount in products:
        totals[dtype] = totals.get(dtype, 0) + amount
    return totals


def access_bytes(accesses: tuple[Access, ...], buffers: Mapping[str, Buffer], totals: Mapping[str, int]) -> int:
    """Bytes of all rows that the accesses name, given the counts."""
    return sum(a.rows.at(totals) * buffers[a.buffer].row_bytes for a in accesses)
