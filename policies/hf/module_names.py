"""Lists of module names in quantisation configs: exact names, parts of names, wildcards and regular expressions."""

import re
from collections.abc import Iterable
from fnmatch import translate

from policies.shown import shown

# Where a language model stands in a checkpoint. Names below anything else are those of a tower or a draft.
_PREFIXES = (
    "", "model.", "language_model.", "model.language_model.", "language_model.model.", "backbone.", "transformer.",
    "model.decoder.", "decoder.", "gpt_neox.", "text_model.", "model.text_model.", "thinker.model.", "model.model.",
    "transformer.encoder.",
)  # fmt: skip
_TRIED = ("model.", "language_model.model.", "model.language_model.", "backbone.", "")
_MOST_REPEATS = 8
_NESTED_REPEATS = re.compile(r"[*+}]\)[*+{]")


class ModuleNames:
    """Names of modules, each of which stands for everything below it as well.

    A name is whole (`model.layers.0.mlp`) or a part of any (`lm_head`, `mlp.gate`), has wildcards (`*.self_attn.*`), or
    is a regular expression after `re:`. Raises ValueError for what is none of these.
    """

    def __init__(self, names: Iterable[object]) -> None:
        self._whole: set[str] = set()
        self._parts: list[str] = []
        wildcards: list[str] = []
        expressions: list[str] = []
        for name in names:
            if not isinstance(name, str):
                raise ValueError(f"module names must be texts, and {shown(name)} is none")
            if name.startswith("re:"):
                expressions.append(_checked(name[3:]))
                continue
            own = _own_name(name.removesuffix(".weight"))
            if set(own) & set("*?["):
                wildcards.append(own)
            elif own.startswith("layers."):
                self._whole.add(own)
            elif own:
                self._parts.append(own)
        self._wildcards = [re.compile(translate(w)) for wild in wildcards for w in (wild, f"{wild}.*")]
        self._expressions = [re.compile(expression) for expression in expressions]

    def __contains__(self, name: str) -> bool:
        """Whether a module, `layers.3.mlp.gate_proj` or `lm_head`, is named."""
        ends = [i for i, letter in enumerate(name) if letter == "."] + [len(name)]
        if any(name[:end] in self._whole for end in ends):
            return True
        if any(f".{part}." in f".{name}." for part in self._parts):
            return True
        if any(wildcard.match(name) for wildcard in self._wildcards):
            return True
        return any(e.match(prefix + name) for e in self._expressions for prefix in _TRIED)


def _own_name(name: str) -> str:
    """The name within the language model; empty where it is one within the layers of another."""
    prefix, found, rest = name.partition("layers.")
    if not found:
        return name[max(len(start) for start in _PREFIXES if name.startswith(start)) :]
    if "*" in prefix:
        return name
    return f"layers.{rest}" if prefix in _PREFIXES else ""


def _checked(expression: str) -> str:
    """An expression that is valid and short of repeats, so that it matches in no time."""
    repeats = len(re.findall(r"(?<!\\)[*+{]", expression))
    if len(expression) > 1000 or repeats > _MOST_REPEATS or _NESTED_REPEATS.search(expression):
        rule = f"has nested repeats, more than {_MOST_REPEATS} of them, or more than 1,000 characters"
        raise ValueError(f"a regular expression of module names {rule}: {shown(expression)}")
    try:
        re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"no regular expression of module names ({error}): {shown(expression)}") from None
    return expression
