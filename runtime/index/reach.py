"""Which keys a search of the graph can come to, and links to those that it could not."""

import torch


def connect(links: torch.Tensor, entries: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """Lead to every key from `entries`: `links` (n, degree of at least 2) with some replaced, int64 (n, degree).

    A key that no walk from the entries comes to is linked from the first of its `near` (n, width), nearest first, that
    one comes to. At most a quarter of a key's links are given away at a time: first those to itself, then the last
    ones, and none on the way to a key; who finds no room is linked from those before him. A group of lost keys is led
    to by the keys that none of them links to, if it has any.
    """
    links, n, most = links.clone(), len(links), max(1, links.shape[1] // 4)
    seen, needed = _walk(links, entries)
    while not seen.all():
        room = (~needed).sum(1).clamp(max=most) * seen
        lost = (~seen).nonzero()[:, 0]
        able = room[near[lost]] > 0
        beside = near[lost].gather(1, able.long().argmax(1, keepdim=True))[:, 0]
        placed = able.any(1)
        if not placed.any():  # all near them are as lost as they are: any key with room
            beside, placed = room.argmax().expand(len(lost)), torch.ones_like(placed)
        linked = torch.zeros(n, dtype=torch.bool, device=links.device)
        others = links[lost].masked_fill(links[lost] == lost[:, None], -1)
        linked[others[others >= 0]] = True
        heads = placed & ~linked[lost]
        chosen = heads if heads.any() else placed
        key, host = lost[chosen], beside[chosen]
        source, slot = _places(links, needed, key, host, room, most)
        links[source, slot] = key
        needed[source, slot] = True
        _walk(links, key, seen, needed)
    return links


def _walk(
    links: torch.Tensor,
    starts: torch.Tensor,
    seen: torch.Tensor | None = None,
    needed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Go on from `starts`, breadth first: keys come to (n,), and the links (n, degree) by which each was first."""
    n, degree = links.shape
    seen = torch.zeros(n, dtype=torch.bool, device=links.device) if seen is None else seen
    needed = torch.zeros_like(links, dtype=torch.bool) if needed is None else needed
    seen[starts] = True
    front = starts.unique()
    while len(front):
        ends = links[front]
        new = ~seen[ends]
        places = (front[:, None] * degree + torch.arange(degree, device=links.device))[new]
        first = torch.full((n,), n * degree, device=links.device).scatter_reduce_(0, ends[new], places, "amin")
        front = (first < n * degree).nonzero()[:, 0]
        seen[front] = True
        needed.view(-1)[first[front]] = True
    return seen, needed


def _places(
    links: torch.Tensor, needed: torch.Tensor, keys: torch.Tensor, hosts: torch.Tensor, room: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The link that is to lead to each of `keys`: whose it is, and which of his.

    Keys of one host stand in a queue: the first have his links, the others those of the ones before, `most` of each.
    """
    order = hosts.argsort(stable=True)
    keys_in_order, hosts = keys[order], hosts[order]
    sizes = torch.bincount(hosts, minlength=len(links))
    begins = sizes.cumsum(0) - sizes
    place = torch.arange(len(keys), device=keys.device) - begins[hosts]
    behind = place - room[hosts]  # among those without room at the host
    source = torch.where(behind < 0, hosts, keys_in_order[begins[hosts] + behind.clamp(min=0) // most])
    rank = torch.where(behind < 0, place, behind % most)
    # First those to itself, then from the last on; those that are needed come at the end and are never taken.
    slots, degree = torch.arange(links.shape[1], device=links.device), links.shape[1]
    worth = 2 * degree * needed[source].long() - degree * (links[source] == source[:, None]).long() - slots
    slot = worth.argsort(dim=1, stable=True).gather(1, rank[:, None])[:, 0]
    back = order.argsort()
    return source[back], slot[back]
