"""The rules that a layer's plan keeps, checked: names resolve, processors reach what they touch, counts are drawn."""

from collections.abc import Mapping, Sequence

from policies.plan import MODEL_OPS, Buffer, Compute, Copy, Count, Op, Plan, Sync


def check_plan(plan: Plan, buffers: Sequence[Buffer], counts: Sequence[Count] = ()) -> None:
    """Raise ValueError, naming the operation, where a layer's plan breaks a rule of `policies.plan`."""
    of = {b.name: b for b in buffers}
    if len(of) != len(buffers):
        raise ValueError(f"two buffers share a name: {sorted(b.name for b in buffers)}")
    declared = {c.name for c in counts}
    names = {op.name for op in plan} | set(MODEL_OPS)
    seen = {"qkv"}
    drawn: set[str] = set()
    for op in plan:
        if op.name in seen or op.name in MODEL_OPS:
            raise ValueError(f"operation {op.name!r} occurs twice; names are unique within a layer")
        _check_after(op, seen, names)
        if isinstance(op, Copy):
            _check_copy(op, of)
        elif isinstance(op, Compute):
            _check_reach(op, of)
            if unknown := set(op.draws) - declared:
                raise ValueError(f"{op.name}: draws {sorted(unknown)}, which the policy does not declare")
            if again := set(op.draws) & drawn:
                raise ValueError(f"{op.name}: draws {sorted(again)}, which an earlier operation has drawn")
            drawn |= set(op.draws)
        if late := _counts_of(op) - drawn:
            raise ValueError(f"{op.name}: uses counts {sorted(late)} before any operation draws them")
        seen.add(op.name)
    if "attend" not in seen:
        raise ValueError("the plan has no operation 'attend'; the model's mlp waits for it")
    if idle := declared - drawn:
        raise ValueError(f"counts {sorted(idle)} are declared, but no operation draws them")


def _check_after(op: Op, seen: set[str], names: set[str]) -> None:
    for name in op.after:
        base, at, back = name.partition("@")
        if at and not (back.startswith("-") and back[1:].isdecimal() and int(back[1:])):
            raise ValueError(f"{op.name}: after {name!r} must be an earlier layer's operation, such as 'attend@-1'")
        if base not in (names if at else seen):
            raise ValueError(f"{op.name}: after {name!r} names no earlier operation of this layer")


def _check_copy(op: Copy, of: Mapping[str, Buffer]) -> None:
    for name in (op.src, op.dst, *op.ids):
        if name not in of:
            raise ValueError(f"{op.name}: unknown buffer {name!r}")
    src, dst = of[op.src], of[op.dst]
    if src.row_bytes != dst.row_bytes:
        raise ValueError(f"{op.name}: a row of {op.src!r} has {src.row_bytes} bytes, of {op.dst!r} {dst.row_bytes}")
    if src.tier is dst.tier:
        raise ValueError(
            f"{op.name}: {op.src!r} and {op.dst!r} are both in {src.tier}; work within a tier is a Compute"
        )
    for buffer in (src, dst):
        if op.rows.fixed > buffer.rows:
            raise ValueError(f"{op.name}: copies {op.rows.fixed} rows, but {buffer.name!r} has {buffer.rows}")


def _check_reach(op: Compute, of: Mapping[str, Buffer]) -> None:
    for access in (*op.reads, *op.writes):
        if access.buffer not in of:
            raise ValueError(f"{op.name}: unknown buffer {access.buffer!r}")
        tier = of[access.buffer].tier
        if tier is not op.processor.tier:
            raise ValueError(f"{op.name}: {op.processor} cannot reach {access.buffer!r} in {tier}; copy it first")


def _counts_of(op: Op) -> set[str]:
    if isinstance(op, Sync):
        return set()
    rows = [op.rows]
    if isinstance(op, Compute):
        rows += [access.rows for access in (*op.reads, *op.writes)]
    return {name for r in rows for name, _ in r.counts}
