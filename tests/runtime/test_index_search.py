"""Flat, inverted file and graph against exhaustive search written out head by head."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from runtime.index import Flat, Found, Graph, GraphParameters, Ivf, Lists, link  # noqa: E402
from runtime.index.measure import measure, quality  # noqa: E402

KV_HEADS, GROUP, N, HEAD_DIM = 2, 3, 500, 16
SMALL = GraphParameters(degree=12, scanned=0.3, entries=8, nearest=10, candidates=20, train_queries=400)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


KEYS = normal(0, KV_HEADS, N, HEAD_DIM)
QUERIES = normal(1, KV_HEADS * GROUP, 200, HEAD_DIM)
ASKED = normal(2, KV_HEADS * GROUP, HEAD_DIM)


def exact(head: int, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and inner products of the best keys of one query head, in fp64."""
    scores = KEYS[head // GROUP].double().numpy() @ ASKED[head].double().numpy()
    best = np.argsort(-scores)[:top_k]
    return best, scores[best]


def indexes(share: float) -> dict[str, object]:
    """One of each kind; `share` of the keys or lists is searched."""
    return {
        "flat": Flat.build(KEYS, QUERIES),
        "ivf": Ivf.build(KEYS, QUERIES, lists=20, probe=max(1, int(20 * share))),
        "graph": Graph.build(KEYS, QUERIES, replace(SMALL, scanned=share)),
    }


@pytest.mark.parametrize("kind", ["flat", "ivf", "graph"])
def test_a_search_of_everything_is_exact(kind: str) -> None:
    found = indexes(1.0)[kind].search(ASKED, 10)
    for head in range(KV_HEADS * GROUP):
        ids, scores = exact(head, 10)
        np.testing.assert_array_equal(found.ids[head], ids)
        np.testing.assert_allclose(found.scores[head], scores, rtol=1e-4, atol=1e-4)
    # Every key once; the lists' centroids are inner products too.
    assert found.scanned.tolist() == [N + (20 if kind == "ivf" else 0)] * (KV_HEADS * GROUP)


@pytest.mark.parametrize("kind", ["flat", "ivf", "graph"])
@pytest.mark.parametrize("share", [0.1, 0.4])
def test_what_is_found_are_distinct_keys_with_their_own_scores_best_first(kind: str, share: float) -> None:
    found = indexes(share)[kind].search(ASKED, 25)
    for head in range(KV_HEADS * GROUP):
        ids = found.ids[head].numpy()
        ids = ids[ids >= 0]
        assert len(set(ids.tolist())) == len(ids)
        own = KEYS[head // GROUP].double().numpy()[ids] @ ASKED[head].double().numpy()
        np.testing.assert_allclose(found.scores[head][: len(ids)], own, rtol=1e-4, atol=1e-4)
        assert (np.diff(own) <= 1e-4).all()
        assert torch.isneginf(found.scores[head][len(ids) :]).all()


def test_a_list_search_scans_the_centroids_and_the_probed_lists() -> None:
    index = Ivf.build(KEYS, QUERIES, lists=20, probe=3)
    found = index.search(ASKED, 5)
    for head, scanned in enumerate(found.scanned.tolist()):
        kv_head = head // GROUP
        nearest = (index.lists.centroids[kv_head] @ ASKED[head]).argsort(descending=True)[:3]
        distances = torch.cdist(KEYS[kv_head], index.lists.centroids[kv_head])
        members = torch.isin(distances.argmin(1), nearest)
        assert scanned == 20 + int(members.sum())
        best = (KEYS[kv_head] @ ASKED[head]).masked_fill(~members, -torch.inf).topk(5).indices
        assert found.ids[head].tolist() == best.tolist()


def test_rows_of_padding_are_never_found() -> None:
    """Whatever they hold, and however often a group's keys are read."""
    padded = torch.tensor([3, 497])
    keys = KEYS.clone()
    for rows, n in zip(keys, padded.tolist(), strict=True):
        rows[:n] = 1e4
    for scans in (1, GROUP):
        found = Flat(keys, padding=padded, scans=scans).search(ASKED, 5)
        assert found.scanned.tolist() == [497] * GROUP + [3] * GROUP
        for head in range(KV_HEADS * GROUP):
            n = padded[head // GROUP].item()
            scores = KEYS[head // GROUP, n:].double() @ ASKED[head].double()
            best = (scores.argsort(descending=True)[:5] + n).tolist()
            assert found.ids[head].tolist() == best + [-1] * (5 - len(best))


def test_no_probe_is_spent_on_an_empty_list() -> None:
    """Three keys in ten lists: two probes find two keys, the nearest of them for every head."""
    keys = KEYS[:, :8].clone()
    lists = Lists(keys, torch.empty(2, 8).int(), torch.full((2, 10, HEAD_DIM), 1e4), torch.empty(2, 11).int())
    lists.arrange(first=5, rounds=4, seed=0)
    found = Ivf(lists, 2).search(ASKED, 4)
    assert found.scanned.tolist() == [10 + 2] * (KV_HEADS * GROUP)
    for head in range(KV_HEADS * GROUP):
        best = (KEYS[head // GROUP, 5:8] @ ASKED[head]).argsort(descending=True)[:2] + 5
        assert found.ids[head].tolist() == [*best.tolist(), -1, -1]


def test_lists_shorter_than_top_k_leave_places_empty() -> None:
    found = Ivf.build(KEYS, QUERIES, lists=250, probe=1).search(ASKED, 100)  # two keys a list on average
    assert (found.ids == -1).any()
    assert torch.equal(found.ids == -1, torch.isneginf(found.scores))


@pytest.mark.parametrize("share", [0.05, 0.1, 0.33])
def test_a_graph_search_keeps_to_its_allowance(share: float) -> None:
    scanned = Graph.build(KEYS, QUERIES, replace(SMALL, scanned=share)).search(ASKED, 10).scanned
    assert (scanned <= np.ceil(share * N)).all()
    assert (scanned >= 10).all()


def test_the_graph_finds_more_for_more_and_beats_chance() -> None:
    asked = normal(3, KV_HEADS * GROUP, 10, HEAD_DIM)
    index = Graph.build(KEYS, QUERIES, SMALL)
    recalls = []
    for share in (0.2, 0.4, 0.6):
        index.parameters = replace(SMALL, scanned=share)
        result = measure(index, KEYS, asked, 10)
        recalls.append(result.recall.mean().item())
        assert recalls[-1] > 1.5 * share  # a random choice would find `share`
    assert recalls == sorted(recalls)


def test_a_head_is_searched_the_same_whether_alone_or_among_others() -> None:
    together = Graph.build(KEYS, QUERIES, SMALL).search(ASKED, 10)
    alone = Graph.build(KEYS[1:], QUERIES[GROUP:], SMALL)
    for head in range(GROUP):
        found = alone.search(ASKED[GROUP + head][None], 10)
        assert set(found.ids[0].tolist()) == set(together.ids[GROUP + head].tolist())
        assert found.scanned[0] == together.scanned[GROUP + head]


def test_stopping_on_mass_ends_the_search_of_a_concentrated_head_alone() -> None:
    asked = ASKED.clone()
    asked[0] *= 50  # softmax falls on a key or two
    asked[1] = 0  # and here on all alike: 64 keys more are a share of 64 / 192 at the least
    every = Graph.build(KEYS, QUERIES, replace(SMALL, scanned=0.5))
    stopping = Graph(KEYS, every.links, every.entries, replace(SMALL, scanned=0.5, stop_gain=0.01))
    to_the_end, stopped = every.search(asked, 10), stopping.search(asked, 10)
    assert stopped.scanned[0] < to_the_end.scanned[0] == 250
    assert stopped.scanned[1] > stopped.scanned[0]
    assert (stopped.scanned <= to_the_end.scanned).all()


def walk(index: Graph, head: int, query: np.ndarray, allowance: int) -> tuple[list[int], list[int]]:
    """The keys in the order in which a search scans them, and those whose links it reads, with plain lists."""
    kv_head, n = head // GROUP, index.keys.shape[1]
    scores = index.keys[kv_head].double().numpy() @ query
    scanned: list[int] = []
    followed: list[int] = []
    frontier: list[int] = []
    met = index.entries[kv_head].tolist()
    while True:
        for key in met:
            if key not in scanned:
                scanned.append(key)
                frontier.append(key)
                if len(scanned) == allowance:
                    return scanned, followed
        if frontier:
            best = max(frontier, key=lambda key: scores[key])
            frontier.remove(best)
            followed.append(best)
            met = index.links[kv_head, best].tolist()
        else:
            met = [max(set(range(n)) - set(scanned))]


@pytest.mark.parametrize("share", [0.05, 0.3, 0.98])
def test_a_graph_search_is_best_first(share: float) -> None:
    index = Graph.build(KEYS, QUERIES, replace(SMALL, scanned=share))
    found = index.search(ASKED, 15)
    for head in range(KV_HEADS * GROUP):
        query = ASKED[head].double().numpy()
        scanned, followed = walk(index, head, query, int(np.ceil(share * N)))
        assert found.followed[head] == len(followed)
        scores = KEYS[head // GROUP].double().numpy() @ query
        assert found.ids[head].tolist() == sorted(scanned, key=lambda key: -scores[key])[:15]


def test_keys_without_links_are_swept_from_the_last_and_padding_is_left_alone() -> None:
    own = torch.arange(N, dtype=torch.int32)
    links = own[None, :, None].expand(KV_HEADS, N, 4).contiguous()
    entries = torch.tensor([[0], [9]], dtype=torch.int32)
    padding = torch.tensor([0, 10])
    index = Graph(KEYS, links, entries, replace(SMALL, scanned=0.02), padding)  # 10 keys
    found = index.search(ASKED, 10)
    for head in range(KV_HEADS * GROUP):
        # The entry of the second KV head is padding.
        swept = {0, *range(N - 9, N)} if head < GROUP else set(range(N - 10, N))
        assert set(found.ids[head].tolist()) == swept
    index.parameters = replace(SMALL, scanned=1.0)
    found = index.search(ASKED, N)
    assert found.scanned.tolist() == [N] * GROUP + [N - 10] * GROUP
    assert (found.ids[GROUP:, N - 10 :] == -1).all()
    assert found.ids[GROUP:, : N - 10].sort(1).values.tolist() == [list(range(10, N))] * GROUP


def test_links_and_entries_have_shapes_of_the_sizes_alone() -> None:
    for n, queries in ((1, QUERIES), (7, QUERIES), (N, QUERIES[:, :1])):
        links, entries = link(KEYS[:, :n], queries, SMALL)
        assert (links.shape, entries.shape) == ((KV_HEADS, n, 12), (KV_HEADS, 8))
        assert links.dtype == entries.dtype == torch.int32
        assert 0 <= min(links.min(), entries.min()) <= max(links.max(), entries.max()) < n


def test_entries_are_the_best_keys_of_queries_far_apart() -> None:
    centres = 10 * torch.eye(HEAD_DIM)[:4]
    topic = torch.randint(4, (200,), generator=torch.Generator().manual_seed(4))
    queries = (centres[topic] + 0.1 * normal(5, 200, HEAD_DIM)).expand(KV_HEADS * GROUP, -1, -1)
    _, entries = link(KEYS, queries, replace(SMALL, entries=32))
    for keys, begun in zip(KEYS, entries, strict=True):
        assert set((centres @ keys.T).argmax(1).tolist()) <= set(begun.tolist())


def test_half_of_the_entries_lie_apart_where_one_key_is_the_best_of_all() -> None:
    """Clusters of keys, 12 of them, and one key that every query finds: there is an entry in each of the largest."""
    cluster = torch.arange(N) % 12
    keys = 0.05 * normal(6, KV_HEADS, N, HEAD_DIM) + 4 * normal(7, 12, HEAD_DIM)[cluster]
    queries = 0.3 * normal(8, KV_HEADS * GROUP, 200, HEAD_DIM) + 2
    keys[:, 0] = 50
    _, entries = link(keys, queries, replace(SMALL, entries=16))
    for begun in entries.tolist():
        assert begun[0] == 0
        assert len(set(begun)) == 8
        assert len({key % 12 for key in set(begun) - {0}}) >= 5


def test_quality_of_a_known_answer() -> None:
    keys = torch.tensor([[[2.0], [1.0], [0.0]]])  # softmax of 2, 1, 0 with head_dim 1
    answer = (torch.tensor([[0, 2]]), torch.tensor([2]))
    result = quality([answer], keys, torch.ones(1, 1, 1), 2)
    weights = np.exp([2.0, 1.0, 0.0]) / np.exp([2.0, 1.0, 0.0]).sum()
    assert result.recall.item() == 0.5  # of keys 0 and 1, key 0
    assert result.mass.item() == pytest.approx(weights[0] + weights[2])
    assert result.best_mass.item() == pytest.approx(weights[0] + weights[1])
    assert result.scanned.item() == pytest.approx(2 / 3)


def test_flat_has_the_quality_of_the_best() -> None:
    result = measure(Flat.build(KEYS, QUERIES), KEYS, ASKED[:, None], 10)
    assert torch.equal(result.recall, torch.ones(KV_HEADS * GROUP))
    torch.testing.assert_close(result.mass, result.best_mass)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Flat.build(KEYS[0], QUERIES), r"keys have shape \(500, 16\); give \(kv_heads, n, head_dim\)"),
        (lambda: Flat.build(KEYS, QUERIES[:3]), r"heads a multiple of the 2 KV heads"),
        (lambda: Flat.build(KEYS, QUERIES).search(ASKED[:3], 5), r"q has shape \(3, 16\)"),
        (lambda: Flat.build(KEYS, QUERIES).search(ASKED, 501), r"top_k=501 is not between 1 and the 500 keys"),
        (lambda: Ivf.build(KEYS, QUERIES, lists=501, probe=1), r"lists=501 is not between 1 and the 500 keys"),
        (lambda: Ivf.build(KEYS, QUERIES, lists=5, probe=6), r"probe=6 is not between 1 and lists=5"),
        (lambda: GraphParameters(scanned=0.0), r"scanned=0.0 is not a share"),
        (lambda: GraphParameters(degree=1), r"degree=1 is below 2"),
        (lambda: GraphParameters(stop_gain=1.0), r"stop_gain=1.0 is not a share"),
    ],
)
def test_what_does_not_fit_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("n", [1, 2, 5])
def test_few_keys(n: int) -> None:
    keys = KEYS[:, :n]
    found = Graph.build(keys, QUERIES).search(ASKED, n)
    assert isinstance(found, Found)
    assert found.ids.sort(1).values.tolist() == [list(range(n))] * (KV_HEADS * GROUP)
