"""The dense cache."""

from torch import Tensor

from policies import Policy
from runtime.call import Call, Method
from runtime.dense import attend, split, write
from runtime.kernels.append import append_row
from runtime.kernels.attention import Segment, attend_segments


def method(_policy: Policy) -> Method:
    """Append in place, then attend to everything."""
    return Method(
        kernels={"append": _append, "attend": _attend},
        extends=True,
        crops=True,
        any_padding=True,
        any_mask=True,
        whole=True,
        captured={"append": _append_captured, "attend": _attend_captured},
    )


def _append(call: Call) -> None:
    write(call.state["kv"], call, call.step.past_tokens)


def _attend(call: Call) -> None:
    keys, values = split(call.state["kv"], call.step.tokens, call.shape.head_dim)
    call.out = attend(call, keys, values, call.mask)


def _append_captured(call: Call) -> None:
    keys, values = _all(call)
    append_row(keys, values, call.new_k, call.new_v, call.rows(0))


def _attend_captured(call: Call) -> None:
    held = Segment(*_all(call), mask=call.mask, held=call.rows(1))
    call.out = attend_segments(call.q, [held], scale=call.scale, softcap=call.softcap, sink_logits=call.sinks)


def _all(call: Call) -> tuple[Tensor, Tensor]:
    """Keys and values of all rows that there is room for."""
    kv = call.state["kv"]
    return split(kv, kv.shape[1], call.shape.head_dim)
