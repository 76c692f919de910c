"""Several policies in one model, by layer, KV heads or prompt length; and the one entry to a layer's plan."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from policies.beside import beside_attention
from policies.full import Full
from policies.model import LayerShape, ModelShape
from policies.plan import Buffer, Compute, Copy, Count, Op, Plan, Rows, Step, Work
from policies.policy import Policy, Reuse

DENSE = Full()


class LayerPlan(NamedTuple):
    """What one sequence stores and does on one layer in one step, and the policy that says so."""

    policy: Policy
    buffers: tuple[Buffer, ...]
    ops: Plan
    counts: tuple[Count, ...]


class EndPlan(NamedTuple):
    """What one policy does after the last layer of a prompt, for all layers that it has."""

    policy: Policy
    layers: tuple[int, ...]
    ops: Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class ByLayer(Policy):
    """`parts` are (first layer, last layer, policy); every other layer has `otherwise`."""

    name: ClassVar[str] = "by-layer"
    paper: ClassVar[str] = "composition"

    parts: tuple[tuple[int, int, Policy], ...]
    otherwise: Policy

    def __post_init__(self) -> None:
        for i, (first, last, policy) in enumerate(self.parts):
            if not 0 <= first <= last:
                raise ValueError(f"layers={first}-{last} of {policy.name} must be a range such as 0-1")
            for other_first, other_last, other in self.parts[:i]:
                if first <= other_last and other_first <= last:
                    taken = f"layers={other_first}-{other_last} of {other.name}"
                    raise ValueError(f"layers={first}-{last} of {policy.name} overlap {taken}")

    def part(self, layer: int, n_layers: int) -> Policy:
        """The policy of one of `n_layers` layers; ValueError when a part reaches beyond the last."""
        for first, last, policy in self.parts:
            if last >= n_layers:
                raise ValueError(f"layers={first}-{last} of {policy.name}: the model's layers are 0-{n_layers - 1}")
        return next((policy for first, last, policy in self.parts if first <= layer <= last), self.otherwise)


@dataclass(frozen=True, slots=True, kw_only=True)
class ByContext(Policy):
    """`short` for prompts of fewer than `below_tokens`, `long` for the others."""

    name: ClassVar[str] = "by-context"
    paper: ClassVar[str] = "composition"

    below_tokens: int
    short: Policy
    long: Policy

    def __post_init__(self) -> None:
        if self.below_tokens < 1:
            raise ValueError(f"below={self.below_tokens} must be at least 1 token")

    def part(self, prompt_tokens: int) -> Policy:
        """The policy of a prompt."""
        return self.short if prompt_tokens < self.below_tokens else self.long


@dataclass(frozen=True, slots=True, kw_only=True)
class ByHeads(Policy):
    """`parts` are (number of KV heads, policy) from the first head on; together they cover every KV head of a layer.

    Each part plans a sub-shape of the model; its names carry a prefix such as `h0.`. Under tensor parallelism a rank
    holds the same share of each part.
    """

    name: ClassVar[str] = "by-heads"
    paper: ClassVar[str] = "composition, as DuoAttention, Xiao et al. 2024, arXiv:2410.10819"

    parts: tuple[tuple[int, Policy], ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("by-heads needs at least one part, such as (2, Full())")
        for heads, policy in self.parts:
            if heads < 1:
                raise ValueError(f"heads={heads} of {policy.name} must be at least 1")
            if isinstance(policy, ByLayer | ByContext | ByHeads):
                raise ValueError(
                    f"a head group cannot be {policy.name}; split by layer or context first, then by heads"
                )

    def split(self, model: ModelShape, step: Step, layer: int) -> tuple[tuple[str, ModelShape, Policy], ...]:
        """For each part its prefix, its sub-shape and its policy on this layer; ValueError when heads do not add up."""
        kv_heads, total = model.layers[layer].kv_heads, sum(heads for heads, _ in self.parts)
        if total % kv_heads or any(heads * kv_heads % total for heads, _ in self.parts):
            raise ValueError(
                f"head groups of {total} KV heads do not fit layer {layer} of {model.name}, which has {kv_heads}; "
                f"make heads= add up to {kv_heads}"
            )
        shapes = [model.with_kv_heads(heads * kv_heads // total) for heads, _ in self.parts]
        return tuple(
            (f"h{i}.", shape, resolve(policy, shape, step, layer))
            for i, (shape, (_, policy)) in enumerate(zip(shapes, self.parts, strict=True))
        )

    def buffers(self, model: ModelShape, step: Step, layer: int) -> tuple[Buffer, ...]:
        """All parts' buffers, each under its prefix."""
        return tuple(
            replace(buffer, name=prefix + buffer.name)
            for prefix, shape, part in self.split(model, step, layer)
            for buffer in part.buffers(shape, step, layer)
        )

    def prefill(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """All parts' operations; `attend` is done when every part's is."""
        split = self.split(model, step, layer)
        return _joined([(prefix, part.prefill(shape, step, layer)) for prefix, shape, part in split])

    def decode(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """All parts' operations; `attend` is done when every part's is."""
        split = self.split(model, step, layer)
        return _joined([(prefix, part.decode(shape, step, layer)) for prefix, shape, part in split])

    def prefill_end(self, model: ModelShape, step: Step) -> Plan:
        """All parts' whole-model work."""
        layer = next((i for i, shape in enumerate(model.layers) if shape.kind == "full"), None)
        if layer is None:
            return ()
        return tuple(
            _prefixed(op, prefix)
            for prefix, shape, part in self.split(model, step, layer)
            for op in part.prefill_end(shape, step)
        )

    def counts(self, model: ModelShape, step: Step, layer: int) -> tuple[Count, ...]:
        """All parts' counts, each under its prefix."""
        return tuple(
            replace(count, name=prefix + count.name)
            for prefix, shape, part in self.split(model, step, layer)
            for count in part.counts(shape, step, layer)
        )


def resolve(policy: Policy, model: ModelShape, step: Step, layer: int) -> Policy:
    """The policy that plans this layer: a part of a composition, or the dense cache where the policy has no say.

    Raises ValueError for an MLA layer under a policy that needs keys per head, for a layer whose rows stand for several
    tokens under any other than the dense cache, for a layer that reads the cache of one whose policy moves it, and for
    parts that the model has no layers for.
    """
    shape = model.layers[layer]
    if shape.share_kv_with is not None:
        owner = resolve(policy, model, step, shape.share_kv_with)
        if owner != DENSE:
            raise ValueError(
                f"layer {layer} of {model.name} reads the cache of layer {shape.share_kv_with}, which {owner.name} "
                f"does not leave as it is; use full@layers={shape.share_kv_with}"
            )
        return DENSE
    while isinstance(policy, ByLayer | ByContext):
        policy = policy.part(layer, model.n_layers) if isinstance(policy, ByLayer) else policy.part(step.prompt_tokens)
    if shape.kind not in policy.kinds:
        if shape.kind == "mla":
            raise ValueError(
                f"{policy.name} needs keys per KV head, but layer {layer} of {model.name} caches an MLA latent; "
                "use full or offload-all"
            )
        if shape.kind in ("block", "core", "compressed"):
            raise ValueError(
                f"{policy.name} needs a key of every token, but layer {layer} of {model.name} caches one row for "
                f"{shape.block_tokens} tokens; use full"
            )
        return DENSE
    if step.prompt_tokens < policy.minimum_prompt_tokens(model, layer):
        return DENSE
    return policy


def settle(policy: Policy, model: ModelShape, prompt_tokens: int, layer: int) -> Policy:
    """The policy of a layer for a whole conversation: what its first prompt decides stays, however long it grows."""
    step = Step(prompt_tokens=prompt_tokens, past_tokens=0, new_tokens=prompt_tokens)
    leaf = resolve(policy, model, step, layer)
    if not isinstance(leaf, ByHeads):
        return leaf
    parts = zip(leaf.parts, leaf.split(model, step, layer), strict=True)
    return replace(leaf, parts=tuple((heads, part) for (heads, _), (_, _, part) in parts))


def plan_layer(policy: Policy, model: ModelShape, step: Step, layer: int) -> LayerPlan:
    """One layer's plan for one step of one sequence: what both drivers walk."""
    leaf = resolve(policy, model, step, layer)
    ops = leaf.prefill(model, step, layer) if step.prefilling else leaf.decode(model, step, layer)
    buffers, beside = beside_attention(model, step, layer)
    if beside:
        names = tuple(op.name for op in beside)
        ops = (*beside, *(replace(op, after=(*op.after, *names)) if op.name == "attend" else op for op in ops))
    return LayerPlan(leaf, (*leaf.buffers(model, step, layer), *buffers), ops, leaf.counts(model, step, layer))


def plan_layers(policy: Policy, model: ModelShape, step: Step) -> list[LayerPlan]:
    """The plan of each layer; layers of one shape share one where their policy says that shapes alone decide."""
    alike: dict[tuple[int, LayerShape], LayerPlan] = {}  # each plan keeps its policy, which its id stands for
    plans = []
    for layer, shape in enumerate(model.layers):
        leaf = resolve(policy, model, step, layer)
        if not vars(type(leaf)).get("by_shape", False):  # a subclass may plan otherwise than its parent
            plans.append(plan_layer(policy, model, step, layer))
            continue
        if (id(leaf), shape) not in alike:
            alike[id(leaf), shape] = plan_layer(policy, model, step, layer)
        plans.append(alike[id(leaf), shape])
    return plans


def plan_ends(policy: Policy, model: ModelShape, step: Step) -> tuple[EndPlan, ...]:
    """Whole-model work after the step's last layer, for every policy that has layers in the model."""
    layers: dict[Policy, list[int]] = {}
    for layer in range(model.n_layers):
        layers.setdefault(resolve(policy, model, step, layer), []).append(layer)
    ends = []
    for leaf, members in layers.items():
        own = tuple(replace(model.layers[i], share_kv_with=None) for i in members)
        if ops := leaf.prefill_end(replace(model, layers=own), step):
            ends.append(EndPlan(leaf, tuple(members), ops))
    return tuple(ends)


def plan_end(policy: Policy, model: ModelShape, step: Step) -> Plan:
    """The operations of `plan_ends`, one policy after the other."""
    return tuple(op for end in plan_ends(policy, model, step) for op in end.ops)


def leaves(policy: Policy) -> list[Policy]:
    """The policies that a composition is made of; any other policy alone."""
    if isinstance(policy, ByLayer):
        parts = [p for *_, p in policy.parts] + [policy.otherwise]
    elif isinstance(policy, ByContext):
        parts = [policy.short, policy.long]
    elif isinstance(policy, ByHeads):
        parts = [p for _, p in policy.parts]
    else:
        return [policy]
    return [leaf for part in parts for leaf in leaves(part)]


def reuse_of(policy: Policy) -> Reuse:
    """What a prefix cache may keep: the least that any part of a composition allows."""
    return max((leaf.reuse for leaf in leaves(policy)), key=list(Reuse).index)


def _joined(parts: Sequence[tuple[str, Plan]]) -> Plan:
    ops = tuple(_prefixed(op, prefix) for prefix, plan in parts for op in plan)
    # Every part writes its own heads of the output, so joining them moves nothing.
    done = Compute(
        name="attend", work=Work.ELEMENTWISE, after=tuple(f"{prefix}attend" for prefix, _ in parts), launches=0
    )
    return (*ops, done)


def _prefixed(op: Op, prefix: str) -> Op:
    def rows(r: Rows) -> Rows:
        return Rows(r.fixed, tuple((prefix + name, k) for name, k in r.counts))

    after = tuple(name if name.partition("@")[0] in ("qkv", "mlp") else prefix + name for name in op.after)
    if isinstance(op, Copy):
        return replace(
            op,
            name=prefix + op.name,
            after=after,
            src=prefix + op.src,
            dst=prefix + op.dst,
            rows=rows(op.rows),
            ids=tuple(prefix + name for name in op.ids),
        )
    if isinstance(op, Compute):
        return replace(
            op,
            name=prefix + op.name,
            after=after,
            rows=rows(op.rows),
            reads=tuple(replace(a, buffer=prefix + a.buffer, rows=rows(a.rows)) for a in op.reads),
            writes=tuple(replace(a, buffer=prefix + a.buffer, rows=rows(a.rows)) for a in op.writes),
            draws=tuple(prefix + name for name in op.draws),
        )
    return replace(op, name=prefix + op.name, after=after)
