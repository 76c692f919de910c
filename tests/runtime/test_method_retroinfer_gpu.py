"""RetroInfer on a GPU gives what it gives on the CPU, waits for nothing while decoding and builds one index twice."""

import pytest

torch = pytest.importorskip("torch")

from one_layer import OneLayer, attention, drawn  # noqa: E402

from policies import RetroInfer  # noqa: E402
from policies.plan import Tier  # noqa: E402
from runtime.index.segments import directions, grouped, nearest  # noqa: E402
from runtime.kernels.estimate import estimated_attention  # noqa: E402
from runtime.kernels.residency import take_slots  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # torch warns that its detection of synchronisation is a prototype.
    pytest.mark.filterwarnings("default"),
]
DIM, PROMPT = 64, 700
POLICY = RetroInfer(window_tokens=20, segment_tokens=256, retrieval=0.1, update_tokens=32)


def layer(policy, device, *, pads=None, steps=70, seed=0):
    q, k, v = drawn(len(pads or [0]), 8, 2, PROMPT + steps, DIM, seed)
    return OneLayer(policy, *(x.to(device) for x in (q, k, v)), prompt=PROMPT, pads=pads)


@pytest.mark.parametrize("pads", [None, (0, 37, 690)])
def test_steps_equal_those_of_the_cpu_and_never_wait(pads):
    """From one index: two of one text may differ where two clusters are as near."""
    there, here = layer(POLICY, "cuda", pads=pads), layer(POLICY, "cpu", pads=pads)
    for one in (there, here):
        one.prefill()
    there.executor.settle()
    for name, tensor in here.arena.kept(0).items():
        there.arena.kept(0)[name].copy_(tensor)
    moved, missed = there.mover.moved_bytes[Tier.DDR, Tier.HBM], 0
    # Until generated tokens are clustered, after 32 steps: the first step compiles.
    for past in range(PROMPT, PROMPT + 31):
        torch.cuda.set_sync_debug_mode("default" if past == PROMPT else "error")
        try:
            call = there.step(past, 1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        reference = here.step(past, 1)
        torch.testing.assert_close(call.out.cpu(), reference.out, atol=2e-5, rtol=2e-5)
        for name, count in reference.counts.items():
            assert torch.equal(call.counts[name].cpu(), count)
        missed += int(reference.counts["miss"].sum())
    assert there.mover.moved_bytes[Tier.DDR, Tier.HBM] - moved == missed * 4 * 2 * DIM * 4


def test_all_clusters_read_is_full_attention():
    """Through two updates, whose clusters go down and come back."""
    policy = RetroInfer(window_tokens=20, segment_tokens=256, retrieval=1.0, estimation=0.0, update_tokens=32)
    one = layer(policy, "cuda", seed=1)
    one.prefill()
    for past, call in one.decode():
        for m in range(8):
            expected = attention(one.q[0, m, past], one.k[0, m // 4, : past + 1], one.v[0, m // 4, : past + 1])
            torch.testing.assert_close(call.out[0, m, 0].double(), expected, atol=5e-5, rtol=0)


def test_an_index_is_built_twice_alike_and_waits_for_nothing():
    keys = torch.randn(1, 2, 4096, DIM, generator=torch.Generator().manual_seed(2)).cuda()
    built = []
    for mode in ("default", "error", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            found = directions(keys, None, 256, 128, 9)
            groups = grouped(nearest(keys, None, found), 256)
            built.append((found.units, groups.order, groups.sums(keys)))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for other in built[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(other, built[0], strict=True))
    reference = grouped(nearest(keys, None, found).cpu(), 256).sums(keys.cpu())
    torch.testing.assert_close(built[0][2].cpu(), reference, atol=1e-3, rtol=1e-5)


def test_slots_and_estimates_equal_the_reference():
    generator = torch.Generator().manual_seed(3)
    here = torch.zeros(2, 2, 300, 2, dtype=torch.int32)
    there = here.cuda()
    for _ in range(5):
        wanted = torch.stack([torch.randperm(900, generator=generator)[:200] for _ in range(4)]).view(2, 2, -1)
        wanted[..., 150:][torch.rand(2, 2, 50, generator=generator) < 0.5] = -1
        for mine, reference in zip(take_slots(there, wanted.cuda()), take_slots(here, wanted), strict=True):
            assert torch.equal(mine.cpu(), reference)
        assert torch.equal(there.cpu(), here)
    q, means, sums = (torch.randn(2, h, n, DIM, generator=generator) for h, n in ((8, 1), (2, 300), (2, 300)))
    sizes = torch.randint(0, 40, (2, 2, 300), generator=generator)
    given = (q, means, sums, sizes, wanted.clamp(max=299))
    found = estimated_attention(*(x.cuda() for x in given), scale=0.1)
    for mine, reference in zip(found, estimated_attention(*given, scale=0.1), strict=True):
        torch.testing.assert_close(mine.cpu(), reference, atol=2e-5, rtol=2e-5)
