"""Defaults of Transformers' configuration classes, for keys that published configs leave out."""

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from types import MappingProxyType

DefaultValue = int | bool | str


@cache
def _all() -> Mapping[str, Mapping[str, DefaultValue]]:
    text = (files("policies.hf") / "defaults.json").read_text(encoding="utf-8")
    return MappingProxyType(json.loads(text))


def defaults_of(model_type: str) -> Mapping[str, DefaultValue]:
    """Defaults of one architecture by key; empty for one that Transformers does not have."""
    return _all().get(model_type, {})
