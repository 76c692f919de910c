"""The text in a saved cache: what the cache belongs to, how many tokens it has, and the digest of each tensor."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from typing import Any

from policies.shown import shown
from runtime.fingerprint import Fingerprint

FORMAT = "kvsim-cache-2"  # the key of the text in the metadata
DIGEST = "sha256"  # the key of the text's own digest
MOST = 1 << 40  # no count of tokens or sequences is larger


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A saved cache but for its tensors; dictionaries of `prompt_tokens` and `rotary` go by layer.

    `rotary` numbers the table of angles of each layer that keeps one. `bound`: the ids of the tokens are in the file.
    `beyond`: with LongRoPE, whether they were rotated for long contexts.
    """

    written_by: str
    policy: str
    dtype: str
    fingerprint: Fingerprint
    batch: int
    tokens: int
    first_prompt_tokens: int
    max_new_tokens: int
    prompt_tokens: dict[int, int]
    rotary: dict[int, int]
    bound: bool
    beyond: bool | None
    digests: dict[str, str]

    def metadata(self) -> dict[str, str]:
        """The metadata of the file."""
        text = json.dumps(asdict(self), allow_nan=False)
        return {FORMAT: text, DIGEST: sha256(text.encode()).hexdigest()}


def read_header(metadata: Mapping[str, str]) -> Header:
    """The header that `metadata` holds; ValueError where it is another, not whole, or not such as is written."""
    text = metadata.get(FORMAT)
    if text is None:
        older = any(key.startswith("kvsim-cache-") for key in metadata)
        why = f"a saved cache of another format than {FORMAT}" if older else "no saved cache"
        raise ValueError(f"{why}; write one with kv.save(cache, path)")
    if {*metadata} != {FORMAT, DIGEST} or sha256(text.encode()).hexdigest() != metadata[DIGEST]:
        raise ValueError("a damaged header: its checksum is that of another text; save the cache again")
    try:
        says = json.loads(text, object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("a header that is nested too deep") from None
    _check_keys("the header", says, {field.name for field in fields(Header)})
    for key in ("written_by", "policy", "dtype"):
        _check(key, says[key], isinstance(says[key], str), "a text")
    for key in ("batch", "tokens", "first_prompt_tokens", "max_new_tokens"):
        _check_count(key, says[key], least=1)
    _check("bound", says["bound"], isinstance(says["bound"], bool), "true or false")
    _check("beyond", says["beyond"], says["beyond"] is None or isinstance(says["beyond"], bool), "true, false or null")
    _check_table("digests", says["digests"])
    for name, digest in says["digests"].items():
        _check(f"digests {shown(name)}", digest, isinstance(digest, str), "a text")
    return Header(
        **says
        | {"prompt_tokens": _by_layer("prompt_tokens", says["prompt_tokens"], least=1)}
        | {"rotary": _by_layer("rotary", says["rotary"], least=0)}
        | {"fingerprint": _fingerprint(says["fingerprint"])}
    )


def _fingerprint(says: Any) -> Fingerprint:
    _check_keys("fingerprint", says, {field.name for field in fields(Fingerprint)})
    for key in ("config", "settings"):
        _check_table(key, says[key])
    for key in ("settings_digest", "weights_digest"):
        _check(key, says[key], isinstance(says[key], str), "a text")
    return Fingerprint(**says)


def _by_layer(what: str, table: Any, *, least: int) -> dict[int, int]:
    _check_table(what, table)
    for layer, count in table.items():
        _check(what, layer, layer.isascii() and layer.isdigit() and str(int(layer[:9])) == layer, "by number of layer")
        _check_count(f"{what} of layer {layer}", count, least=least)
    return {int(layer): count for layer, count in table.items()}


def _check_count(what: str, value: Any, *, least: int) -> None:
    _check(what, value, type(value) is int and least <= value <= MOST, f"a whole number from {least} to {MOST}")


def _check_table(what: str, value: Any) -> None:
    _check(what, value, isinstance(value, dict), "a table")


def _check_keys(what: str, value: Any, keys: set[str]) -> None:
    _check_table(what, value)
    if odd := sorted({*value} ^ keys):
        raise ValueError(f"{what} {'lacks' if odd[0] in keys else 'has the unknown key'} {shown(odd[0])}")


def _check(what: str, value: Any, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"{what} {shown(value)} in the header must be {rule}")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError(f"a header that has a key twice among {shown([key for key, _ in pairs])}")
    return table


def _no_constant(name: str) -> Any:
    raise ValueError(f"a header with the number {name}")
