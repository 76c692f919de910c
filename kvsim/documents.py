"""Reading YAML documents and checking them against a schema, with errors that name the key and the fix."""

from collections.abc import Mapping
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from kvsim.names import nearest_first

T = TypeVar("T")


def parse_yaml(document: str, origin: str) -> dict[str, Any]:
    """The mapping that a YAML document holds; ValueError, naming `origin`, when it holds none."""
    try:
        data = yaml.safe_load(document)
    except yaml.YAMLError as error:
        raise ValueError(f"{origin} is not YAML: {' '.join(str(error).split())}") from None
    match data:
        case dict():
            return data
        case _:
            raise ValueError(f"{origin} holds no mapping of keys to values")


def validated(schema: TypeAdapter[T], data: Mapping[str, Any], known: list[str], origin: str) -> T:
    """`data` as the schema's type; ValueError with every fault, and for an unknown key the nearest `known` one."""
    try:
        return schema.validate_python(data)
    except ValidationError as error:
        faults = "; ".join(
            _fault(fault["loc"], fault["type"], fault["msg"], fault["input"], known) for fault in error.errors()
        )
        raise ValueError(f"{origin}: {faults}") from None


def _fault(location: tuple[int | str, ...], kind: str, message: str, value: object, known: list[str]) -> str:
    key = str(location[-1])
    where = ".".join(str(part) for part in location)
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key {where!r}; did you mean {nearest_first(key, known)[0]!r}?"
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{where} is missing"
    return f"{where}={value!r}: {message.removeprefix('Value error, ')}"
