"""Reading YAML and JSON documents, and checking them against a schema, with errors that name the key and the fix."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from kvsim.text.names import nearest_first
from kvsim.text.printable import brief
from kvsim.text.yaml_subset import MOST_CHARACTERS, Loader
from policies.shown import shown

T = TypeVar("T")


DOCUMENT_BYTES = 8 << 20
"""The largest file of settings that is taken for one; published configs have some hundred kilobytes."""


def read_document(path: Path, most_bytes: int = DOCUMENT_BYTES) -> str:
    """The text of a user's file; ValueError when it is not UTF-8, no regular file or larger than `most_bytes`.

    OSError when it cannot be read.
    """
    from traces.files import check_regular  # with it comes numpy, which a command without files does not need

    check_regular(path)
    with path.open("rb") as stream:
        content = stream.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"{path} is larger than the {most_bytes:,} bytes of any file of its kind; name another one")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8") from None


def parse_yaml(document: str, origin: str) -> dict[str, Any]:
    """The mapping that a YAML document holds, as `kvsim.text.yaml_subset` reads it.

    ValueError, naming `origin`, where it holds anything else.
    """
    if len(document) > MOST_CHARACTERS:
        raise ValueError(f"{origin} has {len(document):,} characters; a YAML file here has at most {MOST_CHARACTERS:,}")
    try:
        data = yaml.load(document, Loader)  # noqa: S506 - a safe loader
    except yaml.YAMLError as error:
        raise ValueError(f"{origin} is not YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None
    match data:
        case dict():
            return data
        case _:
            raise ValueError(f"{origin} holds no mapping of keys to values; write KEY: VALUE lines")


def parse_json(document: str, origin: str) -> Any:
    """The value that a JSON document holds; ValueError, naming `origin`, for malformed JSON and a key given twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the key {shown(twice)} stands twice in one object; keep one of them")
        return found

    def whole(digits: str) -> int:
        if len(digits) > 40:
            raise ValueError(f"{shown(digits)} is a number of {len(digits):,} digits; no figure needs more than 40")
        return int(digits)

    try:
        return json.loads(document, object_pairs_hook=unique, parse_int=whole)
    except json.JSONDecodeError as error:
        raise ValueError(f"{origin} is not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{origin} nests too deep; write it flatter") from None
    except ValueError as error:  # a key given twice, or a number of thousands of digits
        raise ValueError(f"{origin}: {error}") from None


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
    if not location:  # of the whole, not of a key
        return message.removeprefix("Value error, ")
    key = str(location[-1])
    where = ".".join(brief(str(part), 80) for part in location)
    if kind in ("extra_forbidden", "unexpected_keyword_argument", "invalid_key"):
        return f"unknown key {shown(where)}; did you mean {shown(nearest_first(key, known)[0])}?"
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{where} is missing"
    return f"{where}={shown(value)}: {message.removeprefix('Value error, ')}"
