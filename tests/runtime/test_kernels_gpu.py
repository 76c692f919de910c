"""On a GPU the Triton kernels give what the eager references give on the CPU, wait for nothing and can be captured."""

import pytest

torch = pytest.importorskip("torch")

from runtime.kernels.attention import merge, partial_attention, partial_attention_at  # noqa: E402
from runtime.kernels.gather import gather_rows  # noqa: E402
from runtime.kernels.lowrank import decompose, rebuild  # noqa: E402
from runtime.kernels.scores import bound_scores, landmark_scores  # noqa: E402
from runtime.kernels.select import replace_ascending, top_ids  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # torch warns that its detection of synchronisation is a prototype.
    pytest.mark.filterwarnings("default"),
]
# Weights are rounded to the values' dtype before their product: 2^-9 of a value near 3 for bf16, 2^-12 for fp16.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def case(batch, kv_heads, group, new_tokens, tokens, head_dim, dtype=torch.float32):
    """CPU tensors in fp32 that hold values of `dtype`; q strided as transformers hands it over."""
    q = normal(batch, new_tokens, kv_heads * group, head_dim, dtype=dtype).transpose(1, 2)
    k, v = (normal(batch, kv_heads, tokens, head_dim, seed=seed, dtype=dtype) for seed in (1, 2))
    return q.float(), k.float(), v.float()


def on_gpu(tensors, dtype=None):
    """The same strides on the GPU; `dtype` for what is floating point."""
    return tuple(x.cuda().to(dtype if x.is_floating_point() else None) for x in tensors)


def assert_near(got, wanted, tolerance):
    for mine, reference in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.cpu(), reference, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_decode_attention_equals_the_reference(dtype, head_dim, group):
    tensors = case(2, 2, group, 1, 3001, head_dim, dtype)
    mask = torch.rand(2, 1, 1, 3001, generator=torch.Generator().manual_seed(3)) > 0.3
    for options in ({}, {"softcap": 5.0}):
        wanted = partial_attention(*tensors, scale=head_dim**-0.5, mask=mask, **options)
        got = partial_attention(*on_gpu(tensors, dtype), scale=head_dim**-0.5, mask=mask.cuda(), **options)
        assert_near(got, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("new_tokens", [1, 5, 130])
@pytest.mark.parametrize("rows", [None, (1, 1), (2, 1), (2, 8), (2, 2)])
@pytest.mark.parametrize("per_query", [False, True])
def test_masks_and_causality_equal_the_reference(new_tokens, rows, per_query):
    tensors = case(2, 2, 4, new_tokens, 700, 64)
    mask = None
    if rows is not None:
        shape = (*rows, new_tokens if per_query else 1, 700)
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.3
        mask[0, 0] = False  # queries that see nothing
    for causal in (False, True):
        wanted = partial_attention(*tensors, scale=0.2, mask=mask, causal=causal)
        got = partial_attention(*on_gpu(tensors), scale=0.2, mask=None if mask is None else mask.cuda(), causal=causal)
        assert_near(got, wanted, 2e-5)


def test_heads_too_wide_for_the_kernel_take_the_reference():
    tensors = case(1, 1, 4, 1, 50, 576)
    assert_near(partial_attention(*on_gpu(tensors), scale=0.05), partial_attention(*tensors, scale=0.05), 1e-4)


def test_unseen_rows_are_not_read():
    q, k, v = on_gpu(case(1, 2, 4, 1, 1000, 128))
    mask = torch.arange(1000, device="cuda") % 3 == 0
    k[:, :, ~mask], v[:, :, ~mask] = torch.nan, torch.nan
    out, lse = partial_attention(q, k, v, scale=0.1, mask=mask)
    assert out.isfinite().all()
    assert lse.isfinite().all()


@pytest.mark.parametrize("n", [1, 100, 2048])
def test_attention_at_ids_equals_the_reference(n):
    tensors = case(2, 2, 4, 1, 5000, 128)
    ids = torch.randint(-1, 5000, (2, 2, n), generator=torch.Generator().manual_seed(4))
    ids[0, 0] = -1
    wanted = partial_attention_at(*tensors, ids, scale=0.1)
    assert_near(partial_attention_at(*on_gpu(tensors), ids.cuda(), scale=0.1), wanted, 2e-5)
    assert_near(partial_attention_at(*on_gpu(tensors), ids.cuda().int(), scale=0.1), wanted, 2e-5)


def test_offsets_beyond_32_bits():
    """The last of 17 sequences of 128 Ki tokens starts 2^31 elements into the keys."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    k = torch.zeros(17, 8, 131072, 128, dtype=torch.bfloat16, device="cuda")
    k[16] = torch.randn_like(k[16])
    q = torch.randn(17, 8, 1, 128, dtype=torch.bfloat16, device="cuda")
    apart = partial_attention(q[16:], k[16:].clone(), k[16:], scale=0.1)
    together = partial_attention(q, k, k, scale=0.1)
    torch.testing.assert_close(together[0][16:], apart[0], atol=1e-3, rtol=1e-3)
    ids = torch.arange(131072 - 64, 131072, device="cuda").expand(17, 8, -1).contiguous()
    apart = partial_attention(q[16:], k[16:, :, -64:], k[16:, :, -64:], scale=0.1)
    torch.testing.assert_close(partial_attention_at(q, k, k, ids, scale=0.1)[0][16:], apart[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("sinks", [None, torch.linspace(-2, 2, 8)])
def test_merge_equals_the_reference(sinks):
    q, k, v = case(2, 2, 4, 3, 90, 64)
    parts = [partial_attention(q, k[:, :, i : i + 30], v[:, :, i : i + 30], scale=0.3) for i in (0, 30, 60)]
    parts.append(partial_attention(q, k[:, :, :0], v[:, :, :0], scale=0.3))
    got = merge([on_gpu(part) for part in parts], None if sinks is None else sinks.cuda())
    assert_near([got], [merge(parts, sinks)], 1e-6)


@pytest.mark.parametrize("width", [64, 128, 1000, 1024, 20000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_gathered_from_pinned_memory_and_from_the_gpu(width, dtype):
    src = normal(2, 3, 40, width, dtype=dtype)
    ids = torch.randint(-1, 40, (2, 3, 17), generator=torch.Generator().manual_seed(5))
    slots = torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(i))[:17] for i in range(6)])
    slots = slots.view(2, 3, 17)
    expected, counted = torch.zeros(2, 3, 20, width, dtype=dtype), torch.tensor([7])
    gather_rows(src, ids, expected, slots, counted)
    for source in (src.pin_memory(), src.cuda()):
        dst, counter = torch.zeros_like(expected, device="cuda"), torch.tensor([7], device="cuda")
        gather_rows(source, ids.cuda(), dst, slots.cuda(), counter)
        assert torch.equal(dst.cpu(), expected)
        assert torch.equal(counter.cpu(), counted)


def test_pageable_memory_is_refused():
    ids = torch.zeros(1, 1, 1, dtype=torch.int64, device="cuda")
    dst = torch.zeros(1, 1, 1, 8, device="cuda")
    with pytest.raises(ValueError, match="pageable host memory"):
        gather_rows(torch.zeros(1, 1, 4, 8), ids, dst, ids, ids[0, 0])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("group", [1, 8])
def test_scores_equal_the_reference(dtype, group):
    q, rows, high = case(2, 2, group, 1, 3000, 128, dtype)
    valid = torch.rand(2, 2, 3000, generator=torch.Generator().manual_seed(6)) > 0.1
    low, high = torch.minimum(rows, high), torch.maximum(rows, high)
    wanted = landmark_scores(q, rows, scale=0.1, valid=valid)
    gpu_q, gpu_rows, gpu_low, gpu_high = on_gpu((q, rows, low, high), dtype)
    assert_near([landmark_scores(gpu_q, gpu_rows, scale=0.1, valid=valid.cuda())], [wanted], 1e-5)
    # Products of 16-bit inputs are exact in fp32, so only the order of the sum differs.
    assert_near([bound_scores(gpu_q, gpu_low, gpu_high)], [bound_scores(q, low, high)], 1e-4)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (300, 40), (16384, 256), (40000, 256)])
def test_top_ids_equal_the_reference_ties_included(n, k):
    generator = torch.Generator().manual_seed(7)
    scores = torch.randn(3, 4, n, generator=generator)
    scores[0] = torch.randint(-3, 3, (4, n), generator=generator).float()
    scores[1, 0], scores[1, 1], scores[1, 2, 1:] = 0.0, -0.0, -torch.inf
    assert torch.equal(top_ids(scores.cuda(), k).cpu(), top_ids(scores, k))


@pytest.mark.parametrize(("slots", "n"), [(1, 1), (256, 256), (300, 77), (5000, 2000)])
def test_replacement_equals_the_reference(slots, n):
    generator = torch.Generator().manual_seed(8)
    resident = torch.stack([torch.randperm(3 * slots, generator=generator)[:slots] for _ in range(6)]).view(2, 3, -1)
    resident[torch.rand(resident.shape, generator=generator) < 0.1] = -1
    for seed in range(3):
        wanted = top_ids(normal(2, 3, 3 * slots, seed=seed), n)
        wanted[0, 0, n // 2 :] = -1
        gpu = resident.cuda()
        got = replace_ascending(gpu, wanted.cuda())
        for mine, reference in zip(got, replace_ascending(resident, wanted), strict=True):
            assert torch.equal(mine.cpu(), reference)
        assert torch.equal(gpu.cpu(), resident)


def test_low_rank_keys_equal_the_reference():
    keys, ids = normal(1, 2, 500, 64), torch.tensor([[[0, 499, -1], [3, 4, 5]]])
    wanted = rebuild(*decompose(keys, 40), ids)
    assert_near([rebuild(*decompose(keys.cuda(), 40), ids.cuda())], [wanted], 1e-4)


class Step:
    """What a step of a policy that fetches does: score, select, replace, fetch, attend in two parts, merge."""

    def __init__(self, chunks=512, chunk_tokens=8, head_dim=128, chosen=32):
        self.chosen, self.row = chosen, (chunk_tokens, head_dim)
        self.k = normal(1, 2, chunks * chunk_tokens, head_dim).cuda()
        self.v_host = normal(1, 2, chunks, chunk_tokens * head_dim, seed=1).pin_memory()
        self.landmarks = self.k.unflatten(2, (chunks, chunk_tokens)).mean(3)
        self.q = torch.zeros(1, 8, 1, head_dim, device="cuda")
        self.resident = torch.full((1, 2, chosen), -1, device="cuda")
        self.v_slots = torch.zeros(1, 2, chosen, chunk_tokens * head_dim, device="cuda")
        self.counter = torch.zeros((), dtype=torch.int64, device="cuda")

    def run(self):
        chunk_tokens, head_dim = self.row
        best = top_ids(landmark_scores(self.q, self.landmarks, scale=0.1), self.chosen)
        fetch_ids, slots, _ = replace_ascending(self.resident, best)
        gather_rows(self.v_host, fetch_ids, self.v_slots, slots, self.counter)
        chunks = self.k.unflatten(2, (-1, chunk_tokens))
        rows = self.resident[..., None, None].expand(-1, -1, -1, chunk_tokens, head_dim)
        k = chunks.gather(2, rows).flatten(2, 3)
        v = self.v_slots.unflatten(-1, (chunk_tokens, head_dim)).flatten(2, 3)
        half = k.shape[2] // 2
        parts = [partial_attention(self.q, k[:, :, part], v[:, :, part], scale=0.1) for part in
                 (slice(half), slice(half, None))]  # fmt: skip
        return merge(parts)

    def by_hand(self):
        """On the CPU, with every chunk's values at hand."""
        best = top_ids(landmark_scores(self.q.cpu(), self.landmarks.cpu(), scale=0.1), self.chosen)
        tokens = (best[..., None] * self.row[0] + torch.arange(self.row[0])).flatten(2)
        v = self.v_host.unflatten(-1, self.row).flatten(2, 3)
        return best, partial_attention_at(self.q.cpu(), self.k.cpu(), v, tokens, scale=0.1)[0]


def test_a_decode_step_never_waits_for_the_gpu():
    step = Step()
    step.run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_decode_step_replays_as_a_cuda_graph():
    step = Step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step.run()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step.run()
    step.resident.fill_(-1)
    step.counter.zero_()
    held, missed = [set(), set()], 0
    for seed in range(4):
        step.q.copy_(normal(1, 8, 1, 128, seed=seed // 2) + 0.1 * normal(1, 8, 1, 128, seed=10 + seed))
        graph.replay()
        best, wanted = step.by_hand()
        for head in range(2):
            chosen = set(best[0, head].tolist())
            missed += len(chosen - held[head])
            held[head] = chosen
        torch.testing.assert_close(out.cpu(), wanted, atol=2e-5, rtol=2e-5)
        assert int(step.counter) == missed
