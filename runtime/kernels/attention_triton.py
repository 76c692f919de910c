"""Triton kernels of `attention`: split-KV partial attention, dense or at given rows, and the merge of parts."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.attention import Segment

TILE_BYTES = 16 * 1024  # of K, and as much of V, in a stage of the pipeline
PIPELINE_STAGES = 3  # tiles of K and V in flight, where shared memory has room
WAVES = 2  # programs per multiprocessor that the splits aim at
MIN_SPLIT_TOKENS = 256  # below it the merge costs more than the split gains
MERGED_AT_ONCE = 16  # parts that the merge holds in registers


@triton.jit(do_not_specialize=["tokens", "split_tokens"])
def _attend_kernel(  # noqa: PLR0915  # a kernel cannot be cut up without passing its tiles around
    q_ptr, k_ptr, v_ptr, mask_ptr, ids_ptr, held_ptr, out_ptr, lse_ptr,
    q_stride_b, q_stride_h, q_stride_n,
    k_stride_b, k_stride_h, k_stride_t,
    v_stride_b, v_stride_h, v_stride_t,
    mask_stride_b, mask_stride_h, mask_stride_g, mask_stride_n, mask_stride_t,
    ids_stride_b, ids_stride_h, ids_stride_t,
    kv_heads, new_tokens, tokens, split_tokens, rows, scale, softcap,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    HAS_MASK: tl.constexpr, MASK_PER_ROW: tl.constexpr, HAS_IDS: tl.constexpr, HAS_HELD: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    LOG2E: tl.constexpr = 1.4426950408889634
    LN2: tl.constexpr = 0.6931471805599453
    tile, split = tl.program_id(1), tl.program_id(2)
    b = (tl.program_id(0) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)

    # A row of the tile is one query of one head of the group: row = query * GROUP + head.
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query, member = row // GROUP, row % GROUP
    head = kv_head * GROUP + member
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    q_rows = q_ptr + b * q_stride_b + head * q_stride_h + query * q_stride_n
    q = tl.load(q_rows[:, None] + d[None, :], mask=(row < rows)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    if HAS_HELD:
        tokens = tl.minimum(tokens, tl.load(held_ptr).to(tl.int32))
    first = split * split_tokens
    last = tl.minimum(first + split_tokens, tokens)
    if CAUSAL:
        last_query = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, new_tokens - 1)
        last = tl.minimum(last, tokens - new_tokens + last_query + 1)
    for start in range(first, last, BLOCK_N):
        t = start + tl.arange(0, BLOCK_N)
        present = t < last
        at = t.to(tl.int64)
        if HAS_IDS:
            ids = ids_ptr + b * ids_stride_b + kv_head * ids_stride_h
            at = tl.load(ids + at * ids_stride_t, mask=present, other=-1).to(tl.int64)
            present = at >= 0
        attend = present[None, :]
        if HAS_MASK:
            mask_cols = mask_ptr + b * mask_stride_b + kv_head * mask_stride_h + at * mask_stride_t
            if MASK_PER_ROW:
                mask_rows = member * mask_stride_g + query.to(tl.int64) * mask_stride_n
                inside = (row < rows)[:, None] & present[None, :]
                attend = tl.load(mask_cols[None, :] + mask_rows[:, None], mask=inside, other=0) != 0
                present = tl.max(attend.to(tl.int32), axis=0) != 0
            else:
                present = tl.load(mask_cols, mask=present, other=0) != 0
                attend = present[None, :]
        # Rows that nobody attends to are not read.
        k_rows = k_ptr + b * k_stride_b + kv_head * k_stride_h + at * k_stride_t
        k = tl.load(k_rows[:, None] + d[None, :], mask=present[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if HAS_SOFTCAP:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)  # tanh
        if CAUSAL:
            attend = attend & (t[None, :] <= tokens - new_tokens + query[:, None])
        scores = tl.where(attend, scores * LOG2E, float("-inf"))

        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp2(scores - reference[:, None])
        shrink = tl.exp2(largest - reference)
        total = total * shrink + tl.sum(weights, axis=1)
        v_rows = v_ptr + b * v_stride_b + kv_head * v_stride_h + at * v_stride_t
        v = tl.load(v_rows[:, None] + dv[None, :], mask=present[:, None] & (dv < V_DIM)[None, :], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        largest = new_largest

    some = total > 0
    out = acc / tl.where(some, total, 1.0)[:, None]
    lse = tl.where(some, largest * LN2 + tl.log(tl.where(some, total, 1.0)), float("-inf"))
    batch = tl.num_programs(0) // kv_heads
    position = ((split * batch + b) * kv_heads * GROUP + head) * new_tokens + query
    tl.store(lse_ptr + position, lse, mask=row < rows)
    out_rows = out_ptr + position * V_DIM
    tl.store(out_rows[:, None] + dv[None, :], out, mask=(row < rows)[:, None] & (dv < V_DIM)[None, :])


@triton.jit
def _merge_kernel(
    outs_ptr, lses_ptr, sinks_ptr, out_ptr, lse_ptr, parts, rows, heads, new_tokens,
    HAS_SINKS: tl.constexpr, V_DIM: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_V: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part, dv = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_V)
    lses = tl.load(lses_ptr + part * rows + row, mask=part < parts, other=float("-inf"))
    largest = tl.max(lses, axis=0)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + (row // new_tokens) % heads).to(tl.float32)
        largest = tl.maximum(largest, sink)
    reference = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp(lses - reference), axis=0)
    if HAS_SINKS:
        total += tl.exp(sink - reference)
    acc = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, parts, STEP):
        some = start + tl.arange(0, STEP)
        weights = tl.exp(tl.load(lses_ptr + some * rows + row, mask=some < parts, other=float("-inf")) - reference)
        out_rows = outs_ptr + (some * rows + row) * V_DIM
        inside = (some < parts)[:, None] & (dv < V_DIM)[None, :]
        acc += tl.sum(weights[:, None] * tl.load(out_rows[:, None] + dv[None, :], mask=inside, other=0.0), axis=0)
    tl.store(out_ptr + row * V_DIM + dv, acc / tl.where(total > 0, total, 1.0), mask=dv < V_DIM)
    tl.store(lse_ptr + row, reference + tl.log(total))  # log(0) = -inf


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    ids: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`partial_attention` with a mask `(batch, kv_heads, group, new_tokens, tokens)`, or at the rows `ids`."""
    launch = _Launch(q, k, v, mask=mask, ids=ids, held=None, causal=causal)
    outs, lses = _parts(q, launch.splits, v.shape[3])
    launch.run(outs, lses, scale, softcap)
    return (outs[0], lses[0]) if launch.splits == 1 else merge_stacked(outs, lses)


def attend_all(
    q: Tensor,
    segments: Sequence[Segment],
    masks: Sequence[Tensor | None],
    *,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """`attend_segments` with their masks as in `attend`: the splits of all segments are merged at once."""
    launches = [
        _Launch(q, segment.k, segment.v, mask=mask, ids=segment.ids, held=segment.held, causal=False)
        for segment, mask in zip(segments, masks, strict=True)
    ]
    outs, lses = _parts(q, sum(launch.splits for launch in launches), segments[0].v.shape[3])
    first = 0
    for launch in launches:
        launch.run(outs[first:], lses[first:], scale, softcap)
        first += launch.splits
    return merge_stacked(outs, lses, sink_logits, q.dtype)[0]


def _parts(q: Tensor, splits: int, v_dim: int) -> tuple[Tensor, Tensor]:
    """Room for the outputs and the log-sum-exps of splits."""
    shape = (splits, *q.shape[:3])
    outs = torch.empty((*shape, v_dim), dtype=torch.float32, device=q.device)
    return outs, torch.empty(shape, dtype=torch.float32, device=q.device)


class _Launch:
    """One launch of the attention kernel: how its keys are split over programs."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None,
        ids: Tensor | None,
        held: Tensor | None,
        causal: bool,
    ) -> None:
        self.q, self.k, self.v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        self.mask, self.ids, self.held, self.causal = mask, ids, held, causal
        self.tokens = k.shape[2] if ids is None else ids.shape[2]
        self.rows = q.shape[1] // k.shape[1] * q.shape[2]
        self.block_d, self.block_v = (max(16, triton.next_power_of_2(x.shape[3])) for x in (q, v))
        self.block_m = min(64, max(16, triton.next_power_of_2(self.rows)))
        self.block_n = min(128, max(16, TILE_BYTES // (max(self.block_d, self.block_v) * k.element_size())))
        self.tiles = triton.cdiv(self.rows, self.block_m)
        programs = q.shape[0] * k.shape[1] * self.tiles
        self.split_tokens = _split_tokens(q.device, programs, self.tokens, self.block_n)
        self.splits: int = max(1, triton.cdiv(self.tokens, self.split_tokens))

    def run(self, outs: Tensor, lses: Tensor, scale: float, softcap: float | None) -> None:
        """Attend, into the first `splits` of `outs` and `lses`."""
        q, k, v, mask, ids = self.q, self.k, self.v, self.mask, self.ids
        batch, heads, new_tokens, head_dim = q.shape
        kv_heads = k.shape[1]
        mask_strides = (0,) * 5 if mask is None else mask.stride()
        with torch.cuda.device_of(q):
            _attend_kernel[(batch * kv_heads, self.tiles, self.splits)](
                q, k, v, mask, ids, self.held, outs, lses,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *mask_strides,
                *((0,) * 3 if ids is None else ids.stride()),
                kv_heads, new_tokens, self.tokens, self.split_tokens, self.rows, scale,
                0.0 if softcap is None else softcap,
                GROUP=heads // kv_heads, HEAD_DIM=head_dim, V_DIM=v.shape[3],
                HAS_MASK=mask is not None, MASK_PER_ROW=any(mask_strides[2:4]), HAS_IDS=ids is not None,
                HAS_HELD=self.held is not None, CAUSAL=self.causal, HAS_SOFTCAP=softcap is not None,
                PRECISION="ieee" if q.dtype == torch.float32 else "tf32",  # without effect on 16 bits
                BLOCK_M=self.block_m, BLOCK_N=self.block_n, BLOCK_D=self.block_d, BLOCK_V=self.block_v,
                num_warps=4, num_stages=_stages(q.device),
            )  # fmt: skip


def merge_stacked(
    outs: Tensor, lses: Tensor, sink_logits: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Merge `(parts, batch, heads, new_tokens, head_dim)` and `(parts, batch, heads, new_tokens)`, contiguous fp32.

    The output is of `dtype`, its log-sum-exp fp32.
    """
    parts, _, heads, new_tokens, v_dim = outs.shape
    out, lse = torch.empty_like(outs[0], dtype=dtype), torch.empty_like(lses[0])
    with torch.cuda.device_of(outs):
        _merge_kernel[(lse.numel(),)](
            outs, lses, sink_logits, out, lse, parts, lse.numel(), heads, new_tokens,
            HAS_SINKS=sink_logits is not None, V_DIM=v_dim, BLOCK_P=triton.next_power_of_2(parts),
            BLOCK_V=triton.next_power_of_2(v_dim), STEP=MERGED_AT_ONCE,
        )  # fmt: skip
    return out, lse


def _split_tokens(device: torch.device, programs: int, tokens: int, block_n: int) -> int:
    """Keys per split, a multiple of the tile, so that the splits of all heads fill the GPU (FlashDecoding)."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    splits = max(1, WAVES * processors // programs)
    wanted = max(MIN_SPLIT_TOKENS, triton.cdiv(tokens, splits))
    tiles: int = triton.cdiv(wanted, block_n)
    return tiles * block_n


def _stages(device: torch.device) -> int:
    if device.type != "cuda":
        return PIPELINE_STAGES
    properties: Any = torch.cuda.get_device_properties(device)  # the stub does not have all of them
    room: int = properties.shared_memory_per_block_optin // (2 * TILE_BYTES)
    return max(1, min(PIPELINE_STAGES, room - 1))  # one tile's worth is left for the queries and the weights
