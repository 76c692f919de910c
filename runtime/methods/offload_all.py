"""Everything in host memory, staged through HBM layer by layer."""

from policies import Policy
from runtime.call import Call, Method, Piece
from runtime.dense import attend, split, write


def method(policy: Policy) -> Method:
    """Fetch what came before, append, attend, send back what the policy says."""
    everything = getattr(policy, "write_back", "new") == "all"

    def store(call: Call) -> list[Piece]:
        first = 0 if everything else call.step.past_tokens
        rows = slice(first, call.step.tokens)
        return [(call.state["kv_host"][:, rows], call.state["kv"][:, rows])]

    routes = {"fetch": _fetch, "store": store}
    kernels = {"append": _append, "attend": _attend}
    return Method(kernels=kernels, routes=routes, extends=True, crops=True, any_padding=True, any_mask=True, whole=True)


def _fetch(call: Call) -> list[Piece]:
    rows = slice(0, call.step.past_tokens)
    return [(call.state["kv"][:, rows], call.state["kv_host"][:, rows])]


def _append(call: Call) -> None:
    write(call.state["kv"], call, call.step.past_tokens)


def _attend(call: Call) -> None:
    keys, values = split(call.state["kv"], call.step.tokens, call.shape.head_dim)
    call.out = attend(call, keys, values, call.mask)
