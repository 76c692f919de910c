"""A recorded run walked through the plans: what it must have moved and must hold, as exact integers."""

from collections import Counter
from collections.abc import Callable
from functools import cache

from policies import LayerPlan, ModelShape, Policy, Step, plan_layer, settle
from policies.plan import Buffer, Tier, moved_bytes, stored_bytes
from traces.counts import COLUMNS, Recording


def replay_moved_bytes(recording: Recording, policy: Policy, model: ModelShape) -> Counter[tuple[Tier, Tier]]:
    """Bytes per (source, destination) of every step of every sequence and layer, with the counts that were recorded.

    Raises ValueError when the recording is of another policy or model.
    """
    plan_of, most = _planner(policy, model), _maxima(recording)
    moved: Counter[tuple[Tier, Tier]] = Counter()
    for row, (at, totals) in enumerate(zip(recording.steps.tolist(), recording.totals(), strict=True)):
        plan = plan_of(*at[1:])
        declared = {count.name: count.heads * count.maximum for count in plan.counts}
        if most[row] != declared:
            where = ", ".join(f"{name} {value}" for name, value in zip(COLUMNS, at, strict=True))
            raise ValueError(
                f"the recording's step {row} ({where}) drew {_named(most[row])} where {policy.name} draws "
                f"{_named(declared)} on {model.name}; replay it with the policy and the model that it was made with"
            )
        moved.update(moved_bytes(plan.ops, plan.buffers, totals))
    return +moved


def replay_held_bytes(recording: Recording, policy: Policy, model: ModelShape, max_new_tokens: int) -> Counter[Tier]:
    """Bytes per tier that the recorded sequences hold when their prompts are complete, up to their last token.

    Layers have room for the first prompt and `max_new_tokens`. A ring that decoding uses is as large as any recorded
    step has needed it. Raises ValueError when the recording is of another model.
    """
    plan_of = _planner(policy, model)
    sequences: dict[int, list[list[int]]] = {}
    for sequence, *at in recording.steps.tolist():
        sequences.setdefault(sequence, []).append(at)
    held: Counter[Tier] = Counter()
    for steps in sequences.values():
        layers: list[tuple[Buffer, ...]] = []
        for layer, first in sorted({(layer, first) for layer, first, *_ in steps}):
            layers.append(plan_of(layer, first, first, first + max_new_tokens - 1, 1).buffers)
        rings = {buffer.name for buffers in layers for buffer in buffers if buffer.ring}
        layers += [tuple(b for b in plan_of(*at).buffers if b.ring and b.name in rings) for at in steps]
        held.update(stored_bytes(layers))
    return +held


def _planner(policy: Policy, model: ModelShape) -> Callable[..., LayerPlan]:
    """The plan of a recorded step, by its layer and the token counts of `COLUMNS`."""

    @cache
    def plan_of(layer: int, first_prompt: int, prompt: int, past: int, new: int) -> LayerPlan:
        if layer >= model.n_layers:
            raise ValueError(f"the recording has a layer {layer}, and {model.name} has {model.n_layers}")
        step = Step(prompt_tokens=prompt, past_tokens=past, new_tokens=new)
        return plan_layer(settle(policy, model, first_prompt, layer), model, step, layer)

    return plan_of


def _maxima(recording: Recording) -> list[dict[str, int]]:
    """For each recorded step the most that its counts could have drawn, summed over KV heads."""
    most: list[dict[str, int]] = [{} for _ in range(len(recording.steps))]
    for name, drawn in recording.counts.items():
        for row, total in zip(drawn.row.tolist(), drawn.maximum.sum(axis=1).tolist(), strict=True):
            most[row][name] = total
    return most


def _named(maxima: dict[str, int]) -> str:
    return ", ".join(f"{name} of at most {most}" for name, most in sorted(maxima.items())) or "nothing"
