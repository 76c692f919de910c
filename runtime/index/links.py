"""The links of the query-aware graph: which keys lead to which."""

import torch

BLOCK = 1024  # rows of a matrix product whose result is reduced at once


def exact_nearest(queries: torch.Tensor, keys: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` keys (n, head_dim) of largest inner product for each query: int64 (n_queries, count)."""
    return torch.cat([(part @ keys.T).topk(count).indices for part in torch.split(queries, BLOCK)])


def closest(points: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` of `points` (n, head_dim) nearest to each, itself among them: int64 (n, count), nearest first.

    Of largest inner product are, where one key dominates, the same few for all: to most others nothing would lead.
    """
    half_squares = points.square().sum(1) / 2
    return torch.cat([(part @ points.T - half_squares).topk(count).indices for part in torch.split(points, BLOCK)])


def as_scored(keys: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Place keys (n, head_dim) so that the square of two keys' distance is how differently `queries` score them.

    It is the mean over queries of the square of the difference of both inner products: fp32 (n, head_dim), around 0
    so that what all keys share costs the distances no digits.
    """
    moments = queries.double().mT @ queries.double() / len(queries)
    # A direction that no query has still counts for a little, so that the factor exists.
    ridge = 1e-6 * moments.diagonal().mean().clamp(min=1e-30)
    factor = torch.linalg.cholesky(moments + ridge * torch.eye(len(moments), dtype=torch.float64, device=keys.device))
    placed: torch.Tensor = keys.double() @ factor
    return (placed - placed.mean(0)).float()


def co_found(found: torch.Tensor, n: int, count: int) -> torch.Tensor:
    """Link the keys that the same query found: int64 (n, count), most telling first, -1 where there are fewer.

    `found` (n_queries, m) are the keys that each query found: the bipartite graph, projected onto keys. A link's weight
    is the number of queries that found both, over the root of how many found its end: else every key would point to
    the few keys that every query finds, and those are entry points already.
    """
    times_found = torch.bincount(found.flatten(), minlength=n)
    pairs = found[:, :, None] * n + found[:, None, :]
    apart = ~torch.eye(found.shape[1], dtype=torch.bool, device=found.device)
    link, times = torch.unique(pairs[:, apart], return_counts=True)
    source, end = link // n, link % n
    return _table(source, end, times / times_found[end].sqrt(), n, count)


def reversed_links(links: torch.Tensor, count: int) -> torch.Tensor:
    """Which keys link to each key, those that rank it first before others: int64 (n, count), -1 where fewer."""
    n, width = links.shape
    source = torch.arange(n, device=links.device)[:, None].expand(n, width)
    rank = torch.arange(width, device=links.device).expand(n, width)
    return _table(links.flatten(), source.flatten(), -rank.flatten().float(), n, count)


def prune(points: torch.Tensor, candidates: torch.Tensor, degree: int) -> torch.Tensor:
    """Choose `degree` links of each of `points` among `candidates` (n, width; -1 = none): int64 (n, degree).

    Occlusion, as in HNSW: going outwards, a candidate is taken unless one taken before is closer to it than the key
    is, so that links lead in different directions. Room left is filled with the key itself, which costs nothing: it
    has been scanned whenever its links are followed. More links there would be scanned for little.
    """
    return torch.cat(
        [_prune(points, candidates[start : start + BLOCK], start, degree) for start in range(0, len(candidates), BLOCK)]
    )


def _prune(points: torch.Tensor, candidates: torch.Tensor, start: int, degree: int) -> torch.Tensor:
    own = torch.arange(start, start + len(candidates), device=points.device)[:, None]
    candidates = candidates.sort(dim=1).values
    repeated = torch.zeros_like(candidates, dtype=torch.bool)
    repeated[:, 1:] = candidates[:, 1:] == candidates[:, :-1]
    candidates = torch.where(repeated | (candidates < 0), own, candidates)
    away = (points[candidates] - points[own]).square().sum(2).masked_fill(candidates == own, torch.inf)
    away, order = away.sort(dim=1, stable=True)
    candidates = candidates.gather(1, order)
    ends = points[candidates]
    squares = ends.square().sum(2)
    between = squares[:, :, None] + squares[:, None] - 2 * ends @ ends.mT
    taken = torch.zeros_like(candidates, dtype=torch.bool)
    for column in range(candidates.shape[1]):
        taken[:, column] = ~(taken & (between[:, column] < away[:, column, None])).any(1)
    taken &= candidates != own
    place = taken.cumsum(1) - 1
    kept = taken & (place < degree)
    chosen = own.repeat(1, degree + 1)  # the last column takes what is not kept
    return chosen.scatter_(1, place.masked_fill(~kept, degree), candidates)[:, :degree]


def _table(source: torch.Tensor, end: torch.Tensor, weight: torch.Tensor, n: int, count: int) -> torch.Tensor:
    """Links as rows: for each source its `count` ends of largest weight, -1 where there are fewer."""
    order = weight.argsort(descending=True, stable=True)
    order = order[source[order].argsort(stable=True)]
    source, end = source[order], end[order]
    sizes = torch.bincount(source, minlength=n)
    column = torch.arange(len(source), device=source.device) - (sizes.cumsum(0) - sizes)[source]
    kept = column < count
    table = torch.full((n, count), -1, device=source.device)
    table[source[kept], column[kept]] = end[kept]
    return table
