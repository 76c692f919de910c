"""Several policies in one layer, each on its own KV heads: every part sees its heads and its buffers alone."""

from collections.abc import Iterable

import torch

from policies import ByHeads, Policy
from runtime.call import Call, EndKernel, Gather, Kernel, Method, Piece, Route
from runtime.methods import method_of


def method(policy: Policy) -> Method:
    """The parts' kernels under the parts' prefixes, and `attend`, which joins their outputs."""
    if not isinstance(policy, ByHeads):
        raise TypeError(f"not a by-heads policy: {policy!r}")
    methods = [method_of(part) for _, part in policy.parts]
    total = sum(heads for heads, _ in policy.parts)
    shares, start = [], 0
    for heads, _ in policy.parts:
        shares.append((start, start + heads))
        start += heads

    def part(call: Call, index: int) -> Call:
        if index not in call.parts:
            call.parts[index] = _part(call, f"h{index}.", shares[index], total)
        return call.parts[index]

    def kernel(index: int, inner: Kernel) -> Kernel:
        def run(call: Call) -> None:
            inner(part(call, index))
            call.counts |= {f"h{index}.{name}": value for name, value in part(call, index).counts.items()}

        return run

    def route(index: int, inner: Route) -> Route:
        def run(call: Call) -> Iterable[Piece | Gather]:
            return inner(part(call, index))

        return run

    def end(index: int, inner: EndKernel) -> EndKernel:
        return lambda calls: inner([part(call, index) for call in calls])

    def join(call: Call) -> None:
        outs = [part(call, index).out for index in range(len(methods))]
        call.out = torch.cat([out for out in outs if out is not None], dim=1)

    named = list(enumerate(methods))
    captured = {f"h{i}.{name}": kernel(i, inner) for i, m in named for name, inner in (m.captured or {}).items()}
    return Method(
        kernels={
            **{f"h{i}.{name}": kernel(i, inner) for i, m in named for name, inner in m.kernels.items()},
            "attend": join,
        },
        routes={f"h{i}.{name}": route(i, inner) for i, m in named for name, inner in m.routes.items()},
        ends={f"h{i}.{name}": end(i, inner) for i, m in named for name, inner in m.ends.items()},
        fused=frozenset(f"h{i}.{name}" for i, m in named for name in m.fused),
        extends=all(m.extends for m in methods),
        execution_tokens=min((m.execution_tokens for m in methods if m.execution_tokens), default=0),
        crops=all(m.crops for m in methods),
        unrotates=any(m.unrotates for m in methods),
        any_padding=all(m.any_padding for m in methods),
        any_mask=all(m.any_mask for m in methods),
        may_be_infinite=frozenset(f"h{i}.{name}" for i, m in named for name in m.may_be_infinite),
        captured=captured if all(m.captured is not None for m in methods) else None,
        captured_tokens=min((m.captured_tokens for m in methods if m.captured_tokens), default=0),
    )


def _part(call: Call, prefix: str, share: tuple[int, int], total: int) -> Call:
    shape = call.shape
    first, last = (bound * shape.kv_heads // total for bound in share)
    heads = slice(first * shape.group, last * shape.group)
    return Call(
        shape=shape.with_heads((last - first) * shape.group, last - first),
        step=call.step,
        state={name.removeprefix(prefix): t for name, t in call.state.items() if name.startswith(prefix)},
        q=call.q[:, heads],
        new_k=call.new_k[:, first:last],
        new_v=call.new_v[:, first:last],
        mask=call.mask,
        scale=call.scale,
        softcap=call.softcap,
        sinks=None if call.sinks is None else call.sinks[heads],
        rotary=call.rotary,
        lengths=call.lengths,
    )
