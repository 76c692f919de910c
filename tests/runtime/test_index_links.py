"""The links of the graph against loops over small sets."""

from collections import Counter

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from runtime.index.clusters import kmeans  # noqa: E402
from runtime.index.links import as_scored, closest, co_found, exact_nearest, prune, reversed_links  # noqa: E402

KEYS = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
QUERIES = torch.randn(40, 5, generator=torch.Generator().manual_seed(1))


def others(points: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` other points nearest to each."""
    return torch.cdist(points, points).fill_diagonal_(torch.inf).topk(count, largest=False).indices


def test_nearest_is_by_inner_product() -> None:
    nearest = exact_nearest(QUERIES, KEYS, 4)
    for row, query in enumerate(QUERIES.numpy()):
        assert nearest[row].tolist() == np.argsort(-(KEYS.numpy() @ query))[:4].tolist()


def test_closest_is_by_distance_however_long_a_key_is() -> None:
    points = KEYS.clone()
    points[7] *= 1000
    apart = torch.cdist(points.double(), points.double())
    nearest = closest(points, 4)
    assert nearest[:, 0].tolist() == list(range(60))
    assert nearest[:, 1:].tolist() == apart.fill_diagonal_(torch.inf).topk(3, largest=False).indices.tolist()


def test_distance_is_how_differently_queries_score_two_keys() -> None:
    queries = QUERIES * torch.tensor([3.0, 1.0, 1.0, 0.1, 0.0])  # no query has the last direction
    points = as_scored(KEYS, queries).double()
    scores = KEYS.double() @ queries.double().T
    for a, b in ((0, 1), (5, 40), (59, 2)):
        differently = (scores[a] - scores[b]).square().mean()
        torch.testing.assert_close((points[a] - points[b]).square().sum(), differently, rtol=1e-4, atol=1e-4)


def test_keys_that_queries_find_together_are_linked_the_common_ones_last() -> None:
    found = exact_nearest(QUERIES, KEYS, 6)
    together: Counter[tuple[int, int]] = Counter()
    times: Counter[int] = Counter()
    for row in found.tolist():
        times.update(row)
        together.update((a, b) for a in row for b in row if a != b)
    links = co_found(found, 60, 8)
    for key in range(60):
        weights = {b: count / times[b] ** 0.5 for (a, b), count in together.items() if a == key}
        linked = [end for end in links[key].tolist() if end >= 0]
        assert len(linked) == min(8, len(weights))
        heaviest = sorted(weights.values(), reverse=True)[: len(linked)]
        np.testing.assert_allclose([weights[end] for end in linked], heaviest, rtol=1e-6)


def test_reversed_links_come_back() -> None:
    links = others(KEYS, 5)
    back = reversed_links(links, 60)
    for key in range(60):
        assert {end for end in back[key].tolist() if end >= 0} == {a for a in range(60) if key in links[a].tolist()}


def test_pruning_takes_no_candidate_that_an_earlier_one_hides() -> None:
    candidates = torch.cat([others(KEYS, 12), torch.full((60, 2), -1)], dim=1)
    chosen = prune(KEYS, candidates, 12)
    points = KEYS.double().numpy()

    def distance(a: int, b: int) -> float:
        return float(np.linalg.norm(points[a] - points[b]))

    for key in range(60):
        outwards = sorted(set(candidates[key].tolist()) - {-1, key}, key=lambda c: distance(c, key))
        taken: list[int] = []
        for candidate in outwards:
            if all(distance(candidate, t) >= distance(candidate, key) for t in taken):
                taken.append(candidate)
        assert chosen[key].tolist() == taken + [key] * (12 - len(taken))


def test_too_few_candidates_are_filled_with_the_key_itself() -> None:
    chosen = prune(KEYS, torch.tensor([[1, 1, -1]]).expand(60, 3), 3)
    assert chosen[7].tolist() == [1, 7, 7]
    assert chosen[1].tolist() == [1, 1, 1]


def test_clusters_of_separate_groups_are_the_groups() -> None:
    centres = torch.tensor([[10.0, 0.0], [0.0, 10.0], [-10.0, -10.0]])
    group = torch.arange(90) % 3
    keys = centres[group] + 0.1 * torch.randn(90, 2, generator=torch.Generator().manual_seed(2))
    for seed in range(20):  # Lloyd may end in a poor optimum; from keys of all three groups it cannot
        drawn = torch.randperm(90, generator=torch.Generator().manual_seed(seed))[:3]
        if len(set(group[drawn].tolist())) == 3:
            break
    clusters = kmeans(keys[None], 3, rounds=5, seed=seed)
    for label in range(3):
        assert len(set(clusters.members[0][group == label].tolist())) == 1
        own = clusters.members[0][group == label][0]
        torch.testing.assert_close(clusters.centroids[0, own], keys[group == label].mean(0))
