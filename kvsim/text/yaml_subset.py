"""The part of YAML that files of ours may use: plain text, numbers, true and false, within bounds.

YAML 1.1, which PyYAML reads, takes `no` for false, `12:30` for a number in base 60, `010` for 8 and `2024-01-01` for a
date. Here these are text, as in YAML 1.2, so that a tenant may be called `no` and a mistaken duration is refused.
"""

import re
from typing import Any

import yaml

from policies.shown import shown

MOST_CHARACTERS = 1 << 18  # reading takes 5 s at worst
MOST_DEPTH = 32  # no file of ours nests deeper than 5
MOST_VALUES = 100_000  # with every alias written out
_TAG = "tag:yaml.org,2002:"


class Loader(yaml.SafeLoader):
    """Plain values alone, no key twice (YAML itself would keep the last silently), bounded in depth and in number."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own form

    def __init__(self, document: str) -> None:
        super().__init__(document)
        self._depth = 0
        self._sizes: dict[int, int] = {}  # values that a node stands for, by its id

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node; ValueError where it nests too deep, refers to itself or stands for too many values."""
        is_alias = self.check_event(yaml.AliasEvent)
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) not in (None, "!", f"{_TAG}str"):
            raise ValueError(f"line {event.start_mark.line + 1} has the tag {shown(event.tag)}; leave it out")
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise ValueError(
                f"line {event.start_mark.line + 1} nests deeper than {MOST_DEPTH} levels; write it flatter"
            )
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if not is_alias:
            self._sizes[id(node)] = 1 + sum(self._sizes[id(child)] for child in _children(node))
        elif id(node) not in self._sizes:
            raise ValueError(f"line {node.start_mark.line + 1} refers to itself by an alias; write the value out")
        if self._sizes[id(node)] > MOST_VALUES:
            raise ValueError(f"it stands for more than {MOST_VALUES:,} values once its aliases are written out")
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """The next mapping; ValueError for a key that it has twice."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        first: dict[str, yaml.Node] = {}
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if first.setdefault(key.value, key) is not key:
                lines = f"{first[key.value].start_mark.line + 1} and {key.start_mark.line + 1}"
                raise ValueError(f"the key {shown(key.value)} stands twice, in lines {lines}; keep one of them")
        return node

    def construct_scalar(self, node: Any) -> Any:
        """The text of a scalar; ValueError for lone surrogates, which no file can hold."""
        text = super().construct_scalar(node)
        if isinstance(text, str) and not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
            raise ValueError(f"line {node.start_mark.line + 1} has a lone surrogate (\\ud800 to \\udfff); leave it out")
        return text


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


# What an unquoted value may be besides text, and the characters that it may begin with. Longer integers than these are
# text, which a number's field refuses: Python would not write them out in an error.
_PATTERNS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9_]{0,39}|0x[0-9a-fA-F]{1,16}|0b[01]{1,64})", "-+0123456789"),
    "float": (
        r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+][0-9]+)?|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    "null": (r"~|null|Null|NULL|", "~nN"),
    "merge": (r"<<", "<"),
}
for _kind, (_pattern, _beginnings) in _PATTERNS.items():
    _begin = [*_beginnings, *([""] if _kind == "null" else [])]
    Loader.add_implicit_resolver(_TAG + _kind, re.compile(rf"(?:{_pattern})\Z"), _begin)
