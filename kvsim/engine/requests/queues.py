"""The lists of a replica or tenant, as links between requests: each request is in one of them at most."""

from kvsim.engine.state.cluster import NOBODY, NOWHERE, Record, Records


def push_last(requests: Records, owner: Record, queue: int, index: int) -> None:
    """Append a request that is in no list."""
    push_before(requests, owner, queue, index, NOBODY)


def push_first(requests: Records, owner: Record, queue: int, index: int) -> None:
    """Put a request that is in no list before all others."""
    push_before(requests, owner, queue, index, owner["first"][queue])


def push_before(requests: Records, owner: Record, queue: int, index: int, after: int) -> None:
    """Put a request that is in no list before one of them, or at the end when that is nobody."""
    request = requests[index]
    before = owner["last"][queue] if after == NOBODY else requests[after]["before"]
    request["queue"], request["before"], request["after"] = queue, before, after
    if before == NOBODY:
        owner["first"][queue] = index
    else:
        requests[before]["after"] = index
    if after == NOBODY:
        owner["last"][queue] = index
    else:
        requests[after]["before"] = index
    owner["length"][queue] += 1


def take_out(requests: Records, owner: Record, index: int) -> None:
    """Remove a request from the list that it is in."""
    request = requests[index]
    queue, before, after = request["queue"], request["before"], request["after"]
    if before == NOBODY:
        owner["first"][queue] = after
    else:
        requests[before]["after"] = after
    if after == NOBODY:
        owner["last"][queue] = before
    else:
        requests[after]["before"] = before
    request["queue"] = NOWHERE
    owner["length"][queue] -= 1
