"""What the parts of the loop's state are, without what is in them: told to a process that compiles code for it."""

import json
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as descriptions

RECORD = 0  # dimensions: one element of an array, by its address


class Part(NamedTuple):
    """An array or a record of a named tuple."""

    name: str
    dimensions: int
    dtype: np.dtype[Any]


class Layout(NamedTuple):
    """A named tuple of arrays, records and such tuples."""

    name: str
    parts: tuple["Part | Layout", ...]


def layout_of(parts: Any, name: str = "") -> Layout:
    """The layout of a named tuple, without what is no array; one within another goes by the name of its field."""
    own: list[Part | Layout] = []
    for field, part in parts._asdict().items():
        if hasattr(part, "_asdict"):
            own.append(layout_of(part, field))
        elif isinstance(part, np.ndarray | np.void):
            own.append(Part(field, RECORD if isinstance(part, np.void) else part.ndim, part.dtype))
    return Layout(name or type(parts).__name__.lower(), tuple(own))


def to_text(layout: Layout) -> str:
    """A layout as JSON."""
    return json.dumps(_plain(layout))


def from_text(text: str) -> Layout:
    """The layout that `to_text` wrote."""
    return _layout(json.loads(text))


def _plain(layout: Layout) -> list[Any]:
    return [
        layout.name,
        [
            _plain(part)
            if isinstance(part, Layout)
            else [part.name, part.dimensions, descriptions.dtype_to_descr(part.dtype)]
            for part in layout.parts
        ],
    ]


def _layout(plain: list[Any]) -> Layout:
    name, parts = plain
    return Layout(name, tuple(_layout(part) if len(part) == 2 else _part(*part) for part in parts))


def _part(name: str, dimensions: int, description: Any) -> Part:
    return Part(name, dimensions, descriptions.descr_to_dtype(_tuples(description)))


def _tuples(description: Any) -> Any:
    """A description whose fields JSON made lists of."""
    if isinstance(description, str):
        return description
    return [(name, _tuples(kind), *map(tuple, shape)) for name, kind, *shape in description]
