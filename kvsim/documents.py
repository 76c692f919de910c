"""Reading YAML documents and checking them against a schema, with errors that name the key and the fix."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from kvsim.names import nearest_first
from policies.shown import shown

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """Plain values alone, and no key twice: of two values for one key, YAML itself would keep the last silently."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        first: dict[str, yaml.Node] = {}
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if first.setdefault(key.value, key) is not key:
                lines = f"{first[key.value].start_mark.line + 1} and {key.start_mark.line + 1}"
                raise ValueError(f"the key {shown(key.value)} stands twice, in lines {lines}; keep one of them")
        return node


def read_document(path: Path) -> str:
    """The text of a user's file; ValueError when it is not UTF-8, OSError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8") from None


def parse_yaml(document: str, origin: str) -> dict[str, Any]:
    """The mapping that a YAML document holds; ValueError, naming `origin`, when it holds none or a key twice."""
    try:
        data = yaml.load(document, _Loader)  # noqa: S506 - a safe loader
    except yaml.YAMLError as error:
        raise ValueError(f"{origin} is not YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None
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
    if kind in ("extra_forbidden", "unexpected_keyword_argument", "invalid_key"):
        return f"unknown key {shown(where)}; did you mean {shown(nearest_first(key, known)[0])}?"
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{where} is missing"
    return f"{where}={shown(value)}: {message.removeprefix('Value error, ')}"
