"""How a model's attention rotates keys, found by calling it: no architecture is known by name."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from runtime.rotary import ROTATIONS, UNROTATED, Rotation, angles_of, unrotate


class _Keys(DynamicCache):
    """Takes the keys that one attention module makes, and keeps nothing else."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Note the keys."""
        self.made = key_states
        return key_states, value_states


def rotation_of(
    module: nn.Module, args: tuple[Any, ...], given: Mapping[str, Any], cache: DynamicCache
) -> Rotation | None:
    """How an attention module rotates keys: those of one hidden state are equal at all positions once turned back.

    `args` and `given` are what the model has called it with, `cache` the one among them. None where the module cannot
    be called by itself, or none of the known rotations makes its keys equal.
    """
    keys, angles = _Keys(), None
    arguments = _by_name(module, args, given)
    for name, value in arguments.items():
        if value is cache:
            arguments[name] = keys
        elif name == "position_embeddings":
            arguments[name], angles = _stretched(value)
        elif isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point():  # hidden states
            arguments[name] = value[:, :1].expand_as(value).contiguous()
    try:
        with torch.no_grad():
            module.forward(**arguments)
        made = keys.made
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError):
        return None
    if _equal_rows(made):
        return UNROTATED
    if angles is None:
        return None
    return next((r for r in ROTATIONS if _undoes(r, made, *angles)), None)


def _by_name(module: nn.Module, args: tuple[Any, ...], given: Mapping[str, Any]) -> dict[str, Any]:
    called = inspect.signature(module.forward).bind_partial(*args, **given)
    arguments: dict[str, Any] = {}
    for name, value in called.arguments.items():
        rest = called.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        arguments |= value if rest else {name: value}
    return arguments


def _undoes(rotation: Rotation, keys: Tensor, cos: Tensor, sin: Tensor) -> bool:
    cos, sin = (table[:, None] for table in rotation.full(cos, sin))
    if cos.shape[-1] > keys.shape[-1] or cos.shape[-1] % 2:
        return False
    return _equal_rows(unrotate(keys, cos, sin, pairs=rotation.pairs))


def _equal_rows(keys: Tensor) -> bool:
    """Whether keys (1, kv_heads, tokens, head_dim) are the same for all tokens."""
    return alike(keys, keys[:, :, :1].expand_as(keys).contiguous())


def _stretched(position_embeddings: Any) -> tuple[Any, tuple[Tensor, Tensor] | None]:
    """Other angles in the layout of the model's, of which none is small, so that every dimension tells how it turns."""
    angles = angles_of(position_embeddings)
    if angles is None:
        return position_embeddings, None
    cos, sin = (part.double() for part in angles)
    angle = torch.atan2(sin, cos)
    angle = angle.sign() * angle.abs() ** 0.1
    new = (angle.cos().to(angles[0].dtype), angle.sin().to(angles[1].dtype))
    if isinstance(position_embeddings, Tensor):
        return torch.complex(*new), new
    return type(position_embeddings)(new), new


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal up to some roundings of their dtype."""
    if one.shape != other.shape:
        return False
    allowed = max(1e-4, 4 * torch.finfo(other.dtype).eps)
    one, other = one.double(), other.double()
    return bool((one - other).norm() <= allowed * other.norm())
