"""Kernels of a decode step, timed one by one on a GPU, beside what PyTorch has for the same and the bytes they move.

Launches are captured in a CUDA graph and replayed, over several sets of inputs in turn, so that neither launches nor
the L2 cache make them look faster or slower than in a step.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from runtime.kernels.attention import Segment, attend_segments
from runtime.kernels.gather import gather_rows
from runtime.kernels.lowrank import rebuild_chunks
from runtime.kernels.scores import landmark_scores
from runtime.kernels.select import replace_ascending, top_ids

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128  # of Llama-3.1-8B
CHUNK_TOKENS, RANK, SLOTS = 8, 160, 256  # of ShadowKV's defaults
CHUNKS = 16384
REPLAYS = 20

Launch = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedKernel:
    """Seconds of one launch; `nbytes` that it must move, over HBM or (`link`) from host memory; PyTorch's own time."""

    kernel: str
    shape: str
    seconds: float
    nbytes: int
    link: str
    torch_s: float | None = None


def time_kernels() -> Iterator[TimedKernel]:
    """All of them; ValueError where there is no GPU."""
    if not torch.cuda.is_available():
        raise ValueError("these are kernels of a GPU, and torch sees none; run this where there is one")
    with torch.inference_mode():
        for tokens in (2048, 4096, 32768, 131072):
            yield _attention(tokens)
        for rows, n, k in ((8, 8192, 256), (8, 16384, 256), (64, 16384, 256), (8, 131072, 2048)):
            yield _selection(rows, n, k)
        yield _landmarks()
        yield _slots()
        for missed in (26, 102, 256):
            yield _rebuild(missed)
        for row_bytes in (256, 512, 1024, 2048, 4096):
            yield _gather(row_bytes, 2**30 // row_bytes)


def _attention(tokens: int) -> TimedKernel:
    q = _normal(1, HEADS, 1, HEAD_DIM)
    caches = [_normal(1, tokens, 2, KV_HEADS, HEAD_DIM) for _ in range(max(4, 2**17 // tokens // 4))]
    held = torch.tensor([tokens], device="cuda")
    pairs = [(cache[:, :, 0].transpose(1, 2), cache[:, :, 1].transpose(1, 2)) for cache in caches]
    own = [_attend(q, Segment(k, v, held=held)) for k, v in pairs]
    other = [_attend_torch(q, k, v) for k, v in pairs]
    nbytes = tokens * 2 * KV_HEADS * HEAD_DIM * 2
    return TimedKernel(
        kernel="attention of one token", shape=f"{tokens:,} tokens", seconds=_seconds(own), nbytes=nbytes, link="hbm",
        torch_s=_seconds(other),
    )  # fmt: skip


def _attend(q: Tensor, segment: Segment) -> Launch:
    return lambda: attend_segments(q, [segment], scale=HEAD_DIM**-0.5)


def _attend_torch(q: Tensor, k: Tensor, v: Tensor) -> Launch:
    return lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True)


def _selection(rows: int, n: int, k: int) -> TimedKernel:
    scores = [torch.randn(1, rows, n, device="cuda") for _ in range(4)]
    own: list[Launch] = [lambda each=each: top_ids(each, k) for each in scores]  # type: ignore[misc]
    other: list[Launch] = [lambda each=each: torch.topk(each, k) for each in scores]  # type: ignore[misc]
    return TimedKernel(
        kernel="top-k, in the order of ids", shape=f"{k:,} of {n:,}, {rows} rows", seconds=_seconds(own),
        nbytes=rows * n * 4, link="hbm", torch_s=_seconds(other),
    )  # fmt: skip


def _landmarks() -> TimedKernel:
    q = _normal(1, HEADS, 1, HEAD_DIM)
    marks = [_normal(1, KV_HEADS, CHUNKS, HEAD_DIM) for _ in range(4)]
    own: list[Launch] = [lambda each=each: landmark_scores(q, each, scale=0.09) for each in marks]  # type: ignore[misc]
    nbytes = marks[0].nbytes
    return TimedKernel(
        kernel="landmark scores", shape=f"{CHUNKS:,} chunks", seconds=_seconds(own), nbytes=nbytes, link="hbm"
    )


def _slots() -> TimedKernel:
    resident, wanted = _ids(CHUNKS, SLOTS, SLOTS), _ids(CHUNKS, SLOTS, SLOTS).sort(dim=-1).values
    own: list[Launch] = [lambda: replace_ascending(resident, wanted)] * 4
    nbytes = 4 * resident.nbytes
    return TimedKernel(
        kernel="slots looked up", shape=f"{SLOTS} a head", seconds=_seconds(own), nbytes=nbytes, link="hbm"
    )


def _rebuild(missed: int) -> TimedKernel:
    tokens = CHUNKS * CHUNK_TOKENS
    u, sv, angles = _normal(1, tokens, RANK), _normal(1, KV_HEADS, RANK, HEAD_DIM), _normal(1, tokens, HEAD_DIM)
    ids, slots = _ids(CHUNKS, missed, SLOTS), _ids(SLOTS, missed, SLOTS)
    dst = torch.empty(1, KV_HEADS, SLOTS, CHUNK_TOKENS * HEAD_DIM, dtype=torch.bfloat16, device="cuda")

    def launch() -> None:
        rebuild_chunks(u, sv, (angles, angles), ids, dst, slots, chunk_tokens=CHUNK_TOKENS, pairs=False)

    nbytes = KV_HEADS * missed * CHUNK_TOKENS * 2 * (RANK + 3 * HEAD_DIM)
    shape = f"{missed} chunks of {CHUNK_TOKENS} a head, rank {RANK}"
    return TimedKernel(kernel="keys rebuilt", shape=shape, seconds=_seconds([launch] * 4), nbytes=nbytes, link="hbm")


def _gather(row_bytes: int, rows: int) -> TimedKernel:
    width, wanted = row_bytes // 2, 2048
    per_head = rows // KV_HEADS
    src = torch.empty(1, KV_HEADS, per_head, width, dtype=torch.bfloat16, pin_memory=True)
    dst = torch.empty(1, KV_HEADS, wanted, width, dtype=torch.bfloat16, device="cuda")
    counter, slots = torch.zeros(1, dtype=torch.int64, device="cuda"), _ids(wanted, wanted, wanted)
    sets = [_ids(per_head, wanted, wanted) for _ in range(4)]
    own: list[Launch] = [lambda ids=ids: gather_rows(src, ids, dst, slots, counter) for ids in sets]  # type: ignore[misc]
    return TimedKernel(
        kernel="gather from pinned memory", shape=f"{KV_HEADS * wanted:,} rows of {row_bytes:,} B over 1 GiB",
        seconds=_seconds(own), nbytes=KV_HEADS * wanted * row_bytes, link="pcie",
    )  # fmt: skip


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def _ids(of: int, some: int, n: int) -> Tensor:
    """For each KV head `some` different ids below `of`, and -1 up to n: (1, kv_heads, n)."""
    ids = torch.full((1, KV_HEADS, n), -1, dtype=torch.int64, device="cuda")
    for head in range(KV_HEADS):
        ids[0, head, :some] = torch.randperm(of, device="cuda")[:some]
    return ids


def _seconds(launches: Sequence[Launch]) -> float:
    """Of one launch, in a graph of all of them."""
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / REPLAYS / len(launches)
