"""Selection, replacement and row gathers against loops over Python lists."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from runtime.kernels.gather import gather_rows  # noqa: E402
from runtime.kernels.select import replace_ascending, token_ids, top_ids  # noqa: E402

SCORES = st.one_of(st.sampled_from([-1.0, 0.0, -0.0, 2.5, float("-inf")]), st.floats(-(2.0**100), 2.0**100, width=32))


@given(st.lists(st.lists(SCORES, min_size=6, max_size=6), min_size=1, max_size=3), st.integers(1, 6))
def test_top_ids_are_those_of_a_stable_sort(rows, k):
    for row, ids in zip(rows, top_ids(torch.tensor(rows), k).tolist(), strict=True):
        best = sorted(range(6), key=lambda i: (-row[i], i))[:k]
        best = sorted(i for i in best if row[i] > float("-inf"))
        assert ids == best + [-1] * (k - len(best))


def test_equal_scores_give_the_first_ids():
    assert top_ids(torch.zeros(2, 3, 1000), 5).tolist() == [[list(range(5))] * 3] * 2


def test_no_ids_are_an_empty_list():
    assert top_ids(torch.zeros(2, 3, 4), 0).shape == (2, 3, 0)


@pytest.mark.parametrize("k", [-1, 5])
def test_top_ids_refuses_a_k_beyond_the_row(k):
    with pytest.raises(ValueError, match=f"k={k} must lie between 0 and the 4 scores"):
        top_ids(torch.zeros(2, 4), k)


@st.composite
def residents_and_wanted(draw):
    """Slots with distinct ids or -1, and distinct wanted ids, ascending, padded with -1; as lists of heads."""
    slots = draw(st.integers(1, 8))
    wanted = draw(st.integers(1, slots))
    ids = st.integers(0, 11)
    heads = []
    for _ in range(2):
        resident = draw(st.lists(ids, min_size=slots, max_size=slots, unique=True))
        resident = [draw(st.sampled_from([i, i, -1])) for i in resident]
        new = sorted(draw(st.lists(ids, max_size=wanted, unique=True)))
        heads.append((resident, new + [-1] * (wanted - len(new))))
    return heads


@given(residents_and_wanted())
def test_hits_stay_and_misses_take_the_freed_slots(heads):
    resident = torch.tensor([[r for r, _ in heads]])
    new = torch.tensor([[n for _, n in heads]])
    after = resident.clone()
    fetch_ids, slots, n_missed = replace_ascending(after, new)
    for h, (old, wanted) in enumerate(heads):
        missed = [i for i in wanted if i >= 0 and i not in old]
        freed = [s for s, i in enumerate(old) if i < 0 or i not in wanted]
        padding = [-1] * (len(wanted) - len(missed))
        assert fetch_ids[0, h].tolist() == missed + padding
        assert slots[0, h].tolist() == freed[: len(missed)] + padding
        assert n_missed[0, h] == len(missed)
        expected = [i if i in wanted else -1 for i in old]
        for i, slot in zip(missed, freed, strict=False):
            expected[slot] = i
        assert after[0, h].tolist() == expected
        assert {i for i in expected if i >= 0} == {i for i in wanted if i >= 0}


def test_asking_again_for_the_same_moves_nothing():
    resident = torch.full((1, 2, 4), -1)
    wanted = torch.tensor([[[1, 5, 6, 9], [0, 2, 3, 4]]])
    assert replace_ascending(resident, wanted)[2].tolist() == [[4, 4]]
    before = resident.clone()
    assert replace_ascending(resident, wanted)[2].tolist() == [[0, 0]]
    assert torch.equal(resident, before)


@pytest.mark.parametrize("n", [0, 3])
def test_no_ids_and_more_ids_than_slots_are_refused(n):
    with pytest.raises(ValueError, match="at most the slots"):
        replace_ascending(torch.zeros(1, 1, 2, dtype=torch.int64), torch.zeros(1, 1, n, dtype=torch.int64))


def test_token_ids_of_chunks():
    assert token_ids(torch.tensor([[2, -1, 0]]), 3).tolist() == [[6, 7, 8, -1, -1, -1, 0, 1, 2]]


@given(st.integers(0, 5), st.integers(0, 2**31))
def test_gathered_rows_land_in_their_slots(n, seed):
    generator = torch.Generator().manual_seed(seed)
    src = torch.randn(2, 9, 2, 5, generator=generator).transpose(1, 2)  # rows of a token lie beside each other
    dst = torch.randn(2, 2, 6, 5, generator=generator)
    ids = torch.randint(-1, 9, (2, 2, n), generator=generator)
    slots = torch.stack([torch.randperm(6, generator=generator)[:n] for _ in range(4)]).view(2, 2, n)
    slots[ids < 0] = -1
    expected, copied = dst.clone(), 0
    for b in range(2):
        for h in range(2):
            for row, slot in zip(ids[b, h].tolist(), slots[b, h].tolist(), strict=True):
                if row >= 0:
                    expected[b, h, slot] = src[b, h, row]
                    copied += 1
    counter = torch.tensor(100)
    gather_rows(src, ids, dst, slots, counter)
    assert torch.equal(dst, expected)
    assert counter == 100 + copied


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"src": torch.zeros(1, 2, 4, 6)}, "equal but for their rows"),
        ({"ids": torch.zeros(1, 2, 2, dtype=torch.int64)}, r"both be \(batch, kv_heads, n\)"),
        ({"src": torch.zeros(1, 2, 4, 5).half()}, "a gather does not convert"),
        ({"src": torch.zeros(1, 2, 5, 4).mT}, "must be contiguous"),
        ({"counter": torch.zeros(1)}, "must be one int64 element"),
    ],
)
def test_gathers_that_do_not_fit_are_refused(change, message):
    call = {
        "src": torch.zeros(1, 2, 4, 5),
        "ids": torch.zeros(1, 2, 3, dtype=torch.int64),
        "dst": torch.zeros(1, 2, 3, 5),
        "slots": torch.zeros(1, 2, 3, dtype=torch.int64),
        "counter": torch.zeros(1, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        gather_rows(**(call | change))
