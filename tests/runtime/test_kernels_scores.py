"""Scores, landmarks and low-rank keys against float64 loops, bounds and the optimum of a truncated SVD."""

import math

import pytest

torch = pytest.importorskip("torch")

from runtime.kernels.landmarks import chunk_bounds, chunk_means, outlier_chunks  # noqa: E402
from runtime.kernels.lowrank import decompose, rebuild  # noqa: E402
from runtime.kernels.scores import bound_scores, landmark_scores  # noqa: E402


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def queries(batch, new_tokens, heads, head_dim):
    """Strided as transformers hands them over."""
    return normal(batch, new_tokens, heads, head_dim, seed=1).transpose(1, 2)


def landmark_mass_by_hand(q, landmarks, scale, keep):
    """Softmax mass per query head, summed over the queries, as nested lists [b][head][chunk]."""
    group = q.shape[1] // landmarks.shape[1]
    mass = torch.zeros(q.shape[0], q.shape[1], landmarks.shape[2], dtype=torch.float64)
    for b, h, i in [(b, h, i) for b in range(q.shape[0]) for h in range(q.shape[1]) for i in range(q.shape[2])]:
        logits = {c: float(q[b, h, i].double() @ landmarks[b, h // group, c].double()) * scale for c in keep}
        top = max(logits.values())
        total = sum(math.exp(x - top) for x in logits.values())
        for c, x in logits.items():
            mass[b, h, c] += math.exp(x - top) / total
    return mass


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("new_tokens", [1, 2])
@pytest.mark.parametrize("reduce", ["max", "sum", "mean"])
def test_landmark_scores_are_softmax_mass_reduced_over_the_group(group, new_tokens, reduce):
    q, landmarks = queries(2, new_tokens, 2 * group, 8), normal(2, 2, 6, 8)
    keep = [0, 2, 3, 5]
    mass = landmark_mass_by_hand(q, landmarks, 0.5, keep).unflatten(1, (2, group))
    combine = {"max": max, "sum": sum, "mean": lambda xs: sum(xs) / group}[reduce]
    got = landmark_scores(q, landmarks, scale=0.5, reduce=reduce, valid=torch.tensor([1, 0, 1, 1, 0, 1]).bool())
    for b, h, c in [(b, h, c) for b in range(2) for h in range(2) for c in range(6)]:
        wanted = combine([float(x) for x in mass[b, h, :, c]]) if c in keep else -math.inf
        assert float(got[b, h, c]) == pytest.approx(wanted, abs=1e-6)


def test_landmark_scores_of_large_logits_stay_finite():
    q = torch.full((1, 1, 1, 1), 200.0)
    scores = landmark_scores(q, torch.tensor([[[[1.0], [-1.0], [1.0]]]]), scale=1.0)
    torch.testing.assert_close(scores, torch.tensor([[[0.5, 0.0, 0.5]]]))


def test_without_a_valid_chunk_every_score_is_minus_infinity():
    nothing = torch.zeros(3, dtype=torch.bool)
    scores = landmark_scores(queries(1, 1, 2, 8), normal(1, 1, 3, 8), scale=1.0, valid=nothing)
    assert torch.equal(scores, torch.full((1, 1, 3), -torch.inf))


@pytest.mark.parametrize("group", [1, 4, 8])
def test_bounds_are_the_channelwise_maxima(group):
    q, keys = queries(2, 1, 2 * group, 8), normal(2, 2, 30, 8)
    low, high = chunk_bounds(keys, 4)
    got = bound_scores(q, low, high, valid=torch.arange(8) != 3)
    for b, h, page in [(b, h, page) for b in range(2) for h in range(2) for page in range(8)]:
        rows = keys[b, h, page * 4 : page * 4 + 4].double()  # the last page has two
        bounds = []
        for member in range(group):
            x = q[b, h * group + member, 0].double()
            bounds.append(sum(max(float(x[i] * rows[:, i].min()), float(x[i] * rows[:, i].max())) for i in range(8)))
            assert bounds[-1] >= float((rows @ x).max()) - 1e-12  # what makes it a bound
        assert float(got[b, h, page]) == pytest.approx(max(bounds) if page != 3 else -math.inf, abs=1e-5)


def test_bounds_of_single_keys_are_the_logits():
    q, keys = queries(1, 1, 2, 8), normal(1, 2, 5, 8)
    torch.testing.assert_close(bound_scores(q, *chunk_bounds(keys, 1))[:, :, :, None], keys @ q.mT)


def test_scores_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="heads a multiple of kv_heads"):
        landmark_scores(queries(1, 1, 3, 8), normal(1, 2, 4, 8), scale=1.0)
    with pytest.raises(ValueError, match="reduce='median' is unknown; known are 'max', 'sum', 'mean' and 'none'"):
        landmark_scores(queries(1, 1, 2, 8), normal(1, 2, 4, 8), scale=1.0, reduce="median")


def test_chunk_means_and_the_chunks_that_they_describe_worst():
    keys = normal(2, 2, 24, 8)
    means = chunk_means(keys, 4)
    worst = outlier_chunks(keys, means, 2)
    for b, h in [(b, h) for b in range(2) for h in range(2)]:
        least = []
        for c in range(6):
            rows = keys[b, h, c * 4 : c * 4 + 4].double()
            mean = sum(rows[i] for i in range(4)) / 4
            torch.testing.assert_close(means[b, h, c].double(), mean, atol=1e-6, rtol=1e-6)
            least.append(min(float(row @ mean / (row.norm() * mean.norm())) for row in rows))
        assert worst[b, h].tolist() == sorted(sorted(range(6), key=lambda c: least[c])[:2])


def test_padding_counts_for_no_mean_and_is_no_outlier():
    """Rows padded by a part of a chunk or by whole ones give what their real tokens alone give, whatever lies there."""
    keys = normal(2, 2, 24, 8)
    for pad in (0, 1, 7, 21, 24):
        seen = torch.arange(24).expand(2, 1, 24) >= pad
        padded = keys.masked_fill(~seen[..., None], torch.nan)
        means = chunk_means(padded, 4, seen)
        worst = outlier_chunks(padded, means, 3, seen)
        for b, h in [(b, h) for b in range(2) for h in range(2)]:
            least = {}
            for c in range(pad // 4, 6):
                rows = keys[b, h, max(pad, c * 4) : c * 4 + 4].double()
                if len(rows):
                    torch.testing.assert_close(means[b, h, c].double(), rows.mean(0), atol=1e-6, rtol=1e-6)
                    least[c] = min(float(row @ rows.mean(0) / (row.norm() * rows.mean(0).norm())) for row in rows)
            assert not means[b, h, : pad // 4].any()
            expected = sorted(sorted(least, key=lambda c: (round(least[c], 6), c))[:3])
            assert worst[b, h].tolist() == expected + [-1] * (3 - len(expected))


def test_chunks_must_be_whole_for_a_mean():
    with pytest.raises(ValueError, match="10 tokens are no multiple of chunk_tokens=4"):
        chunk_means(normal(1, 1, 10, 8), 4)


def test_full_rank_rebuilds_the_keys():
    keys = normal(2, 2, 40, 8)
    ids = torch.tensor([[[0, 39, 7], [5, -1, 12]], [[-1, -1, -1], [38, 1, 1]]])
    u, sv = decompose(keys, 16)  # 2 heads x 8 wide
    assert (u.shape, sv.shape) == ((2, 40, 16), (2, 2, 16, 8))
    rows = rebuild(u, sv, ids)
    for b, h, i in [(b, h, i) for b in range(2) for h in range(2) for i in range(3)]:
        row = int(ids[b, h, i])
        wanted = keys[b, h, row] if row >= 0 else torch.zeros(8)
        torch.testing.assert_close(rows[b, h, i], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_no_product_of_that_rank_is_closer(rank):
    """Eckart-Young: the least squared error is the sum of the squares of the singular values left out."""
    scales = torch.logspace(0, -3, 16)  # a spectrum that decays, as that of keys
    wide = normal(1, 200, 16) @ torch.diag(scales) @ torch.linalg.qr(normal(16, 16, seed=3)).Q
    keys = wide.unflatten(2, (2, 8)).transpose(1, 2)
    u, sv = decompose(keys, rank)
    everything = torch.arange(200).expand(1, 2, -1)
    error = float((rebuild(u, sv, everything).double() - keys.double()).square().sum())
    left_out = torch.linalg.svdvals(wide[0].double())[rank:].square().sum()
    assert error == pytest.approx(float(left_out), rel=1e-3)


def test_long_prompts_are_decomposed_in_blocks(monkeypatch):
    keys = normal(1, 2, 50, 4)
    whole = rebuild(*decompose(keys, 3), torch.arange(50).expand(1, 2, -1))
    monkeypatch.setattr("runtime.kernels.lowrank.BLOCK_TOKENS", 16)
    blocks = rebuild(*decompose(keys, 3), torch.arange(50).expand(1, 2, -1))
    torch.testing.assert_close(blocks, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [0, 17])
def test_a_rank_beyond_the_keys_is_refused(rank):
    with pytest.raises(ValueError, match=f"rank={rank} must lie between 1 and 16 for 40 x 16 keys"):
        decompose(normal(1, 2, 40, 8), rank)
