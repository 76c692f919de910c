"""Clusters of keys: k-means within segments, attention estimated from means, and the slots that blocks take."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from runtime.index.segments import Directions, directions, grouped, nearest  # noqa: E402
from runtime.kernels.attention import merge, partial_attention  # noqa: E402
from runtime.kernels.estimate import estimated_attention  # noqa: E402
from runtime.kernels.residency import take_slots  # noqa: E402


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- slots -----------------------------------------------------------------------------------------------------------


@given(
    slots=st.integers(1, 6),
    steps=st.lists(st.lists(st.integers(0, 9), unique=True, max_size=6), min_size=1, max_size=12),
)
@settings(max_examples=200, deadline=None)
def test_slots_are_those_of_a_least_recently_used_cache(slots, steps):
    resident, held = torch.zeros(1, 1, slots, 2, dtype=torch.int32), [(None, 0)] * slots
    for asked in steps:
        blocks, now = asked[:slots], 1 + max(at for _, at in held)
        wanted = torch.tensor([[[-1, *blocks][: slots + 1]]]) if len(blocks) < slots else torch.tensor([[blocks]])
        missed, taken = take_slots(resident, wanted)
        before = {block: i for i, (block, _) in enumerate(held)}
        for block in blocks:
            if block in before:
                held[before[block]] = (block, now)
        for block in blocks:
            if block not in before:
                oldest = min(range(slots), key=lambda i: (held[i][1], i))
                held[oldest] = (block, now)
        place = {block: i for i, (block, _) in enumerate(held)}
        flat = wanted[0, 0].tolist()
        assert missed[0, 0].tolist() == [block >= 0 and block not in before for block in flat]
        assert taken[0, 0].tolist() == [place.get(block, -1) for block in flat]
        assert resident[0, 0].tolist() == [[0 if block is None else block, at] for block, at in held]


def test_rows_and_heads_have_caches_of_their_own():
    resident = torch.zeros(2, 2, 3, 2, dtype=torch.int32)
    take_slots(resident, torch.tensor([[[1, 2], [3, -1]], [[-1, -1], [1, 4]]]))
    missed, slots = take_slots(resident, torch.tensor([[[2, 5], [1, 3]], [[1, 2], [4, 1]]]))
    assert missed.tolist() == [[[False, True], [True, False]], [[True, True], [False, False]]]
    assert slots.tolist() == [[[1, 2], [1, 0]], [[0, 1], [1, 0]]]


def test_more_blocks_than_slots_are_refused():
    resident = torch.zeros(1, 1, 2, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="3 blocks do not fit in 2 slots"):
        take_slots(resident, torch.tensor([[[1, 2, 3]]]))
    with pytest.raises(ValueError, match=r"resident \(1, 1, 2, 2\) must be .* wanted \(1, 2, 1\)"):
        take_slots(resident, torch.tensor([[[1], [2]]]))


# -- estimation ------------------------------------------------------------------------------------------------------


def clusters_of(keys, values, members, clusters):
    """What is kept of the clusters of (batch, kv_heads, n, d): means, value sums, sizes."""
    groups = grouped(members, clusters)
    return groups.sums(keys) / groups.sizes.clamp(min=1)[..., None], groups.sums(values), groups.sizes


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_equal_keys_are_estimated_as_they_are_attended_to(softcap):
    q, values = drawn(1, 2, 6, 3, 8), drawn(2, 2, 2, 40, 5)
    members = torch.randint(0, 7, (2, 2, 40), generator=torch.Generator().manual_seed(3))
    keys = drawn(4, 2, 2, 7, 8).gather(2, members[..., None].expand(-1, -1, -1, 8))
    ids = torch.tensor([4, 0, -1, 6]).expand(2, 2, -1)
    found = estimated_attention(q, *clusters_of(keys, values, members, 8), ids, scale=0.4, softcap=softcap)
    mask = ((members == 4) | (members == 0) | (members == 6))[:, :, None]
    padded = torch.nn.functional.pad(values, (0, 3))
    out, lse = partial_attention(q, keys, padded, scale=0.4, mask=mask, softcap=softcap)
    torch.testing.assert_close(found[0], out[..., :5], atol=2e-6, rtol=0)
    torch.testing.assert_close(found[1], lse, atol=2e-6, rtol=0)


def test_the_weight_of_a_cluster_is_never_too_large():
    q, keys, values = drawn(5, 1, 4, 1, 8) * 2, drawn(6, 1, 2, 60, 8), drawn(7, 1, 2, 60, 8)
    members = torch.randint(0, 9, (1, 2, 60), generator=torch.Generator().manual_seed(8))
    kept = clusters_of(keys, values, members, 9)
    for cluster in range(9):
        ids = torch.full((1, 2, 1), cluster)
        _, estimated = estimated_attention(q, *kept, ids, scale=0.5)
        _, exact = partial_attention(q, keys, values, scale=0.5, mask=(members == cluster)[:, :, None])
        assert (estimated <= exact + 1e-5).all()


def test_nothing_to_estimate_weighs_nothing():
    q, keys, values = drawn(9, 1, 2, 1, 8), drawn(10, 1, 1, 5, 8), drawn(11, 1, 1, 5, 8)
    kept = clusters_of(keys, values, torch.zeros(1, 1, 5, dtype=torch.int64), 2)
    exact = partial_attention(q, keys, values, scale=1.0)
    for ids in (torch.tensor([[[-1, -1]]]), torch.tensor([[[1]]]), torch.empty(1, 1, 0, dtype=torch.int64)):
        out, lse = estimated_attention(q, *kept, ids, scale=1.0)
        assert (lse == -torch.inf).all()
        torch.testing.assert_close(merge([exact, (out, lse)]), exact[0])


# -- k-means ---------------------------------------------------------------------------------------------------------


def test_sums_and_order_are_those_of_a_loop():
    rows, members = drawn(12, 2, 3, 50, 4), torch.randint(0, 8, (2, 3, 50), generator=torch.Generator().manual_seed(13))
    groups = grouped(members, 7)  # 7 stands for none
    sums = groups.sums(rows)
    for b in range(2):
        for h in range(3):
            of = [[i for i in range(50) if members[b, h, i] == c] for c in range(8)]
            assert groups.order[b, h].tolist() == [i for inside in of for i in inside]
            assert groups.sizes[b, h].tolist() == [len(inside) for inside in of[:7]]
            for c in range(7):
                torch.testing.assert_close(sums[b, h, c].double(), rows[b, h, of[c]].double().sum(0), atol=1e-5, rtol=0)


def test_rounds_bring_keys_nearer_to_their_clusters():
    """Cosines, weighed by the keys' lengths: neither assigning nor taking the mean can lower their sum."""
    keys = drawn(14, 2, 2, 300, 8)
    last = None
    for rounds in range(6):
        found = directions(keys, None, 20, 20, rounds)
        torch.testing.assert_close(found.units.norm(dim=-1), torch.ones(2, 2, 20))
        members = nearest(keys, None, found)
        total = (keys * found.units.gather(2, members[..., None].expand_as(keys))).sum(dim=(2, 3))
        assert last is None or (total >= last - 1e-4).all()
        assert last is None or rounds > 1 or (total > last).all()
        last = total


def test_a_segment_has_clusters_of_its_own():
    """Each is clustered as it would be alone."""
    keys = drawn(15, 1, 2, 120, 8)
    whole = directions(keys, None, 12, 4, 5)
    for s in range(3):
        alone = directions(keys[:, :, 40 * s : 40 * (s + 1)], None, 4, 4, 5)
        torch.testing.assert_close(whole.units[:, :, 4 * s : 4 * (s + 1)], alone.units)


def test_what_is_not_live_changes_nothing():
    keys, live = drawn(16, 1, 2, 90, 8), torch.ones(1, 90, dtype=torch.bool)
    live[:, :37] = False
    keys[:, :, :37] = 0
    found = directions(keys, live, 9, 3, 5)
    members = nearest(keys, live, found)
    assert (members[:, :, :37] == 9).all()
    assert (members[:, :, 37:] < 9).all()
    assert found.filled[0, 0].tolist() == [False] * 3 + [False, True, True] + [True] * 3  # seeds at 30, 40, 50


def test_where_no_seed_is_live_the_first_cluster_takes_what_is():
    keys, live = drawn(17, 1, 1, 40, 8), torch.zeros(1, 40, dtype=torch.bool)
    live[:, 38:] = True
    keys[:, :, :38] = 0
    for rounds in (0, 3):
        members = nearest(keys, live, directions(keys, live, 4, 4, rounds))
        assert members[0, 0].tolist() == [4] * 38 + [0, 0]


def test_parts_of_the_keys_are_assigned_as_all_of_them(monkeypatch):
    keys, units = drawn(18, 1, 2, 100, 8), drawn(19, 1, 2, 10, 8)
    expected = nearest(keys, None, Directions(units, None))
    monkeypatch.setattr("runtime.index.segments.PRODUCTS", 200)
    assert torch.equal(nearest(keys, None, Directions(units, None)), expected)
