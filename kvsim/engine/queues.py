"""The lists of a replica, as links between its requests: each request is in one of them at most."""

from kvsim.engine.state import NOBODY, NOWHERE, Record, Records


def push_last(requests: Records, replica: Record, queue: int, index: int) -> None:
    """Append a request that is in no list."""
    request, last = requests[index], replica["last"][queue]
    request["queue"], request["before"], request["after"] = queue, last, NOBODY
    if last == NOBODY:
        replica["first"][queue] = index
    else:
        requests[last]["after"] = index
    replica["last"][queue] = index
    replica["length"][queue] += 1


def push_first(requests: Records, replica: Record, queue: int, index: int) -> None:
    """Put a request that is in no list before all others."""
    request, first = requests[index], replica["first"][queue]
    request["queue"], request["before"], request["after"] = queue, NOBODY, first
    if first == NOBODY:
        replica["last"][queue] = index
    else:
        requests[first]["before"] = index
    replica["first"][queue] = index
    replica["length"][queue] += 1


def take_out(requests: Records, replica: Record, index: int) -> None:
    """Remove a request from the list that it is in."""
    request = requests[index]
    queue, before, after = request["queue"], request["before"], request["after"]
    if before == NOBODY:
        replica["first"][queue] = after
    else:
        requests[before]["after"] = after
    if after == NOBODY:
        replica["last"][queue] = before
    else:
        requests[after]["before"] = before
    request["queue"] = NOWHERE
    replica["length"][queue] -= 1
