"""Numbers that are none, found before a run has been made with them."""

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass


def first_nan(value: object, path: str = "") -> str | None:
    """The dotted path to the first NaN in nested dataclasses, mappings and sequences; None where there is none."""
    if isinstance(value, float):
        return path if math.isnan(value) else None
    if is_dataclass(value):
        parts = ((field.name, getattr(value, field.name)) for field in fields(value))
    elif isinstance(value, Mapping):
        parts = ((str(key), item) for key, item in value.items())
    elif isinstance(value, list | tuple):
        parts = ((str(index), item) for index, item in enumerate(value))
    else:
        return None
    return next((found for name, item in parts if (found := first_nan(item, f"{path}.{name}".lstrip(".")))), None)
