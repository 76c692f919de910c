"""The dense cache."""

from policies import Policy
from runtime.call import Call, Method
from runtime.dense import attend, split, write


def method(_policy: Policy) -> Method:
    """Append in place, then attend to everything."""
    return Method(
        kernels={"append": _append, "attend": _attend},
        extends=True,
        crops=True,
        any_padding=True,
        any_mask=True,
        whole=True,
    )


def _append(call: Call) -> None:
    write(call.state["kv"], call, call.step.past_tokens)


def _attend(call: Call) -> None:
    keys, values = split(call.state["kv"], call.step.tokens, call.shape.head_dim)
    call.out = attend(call, keys, values, call.mask)
