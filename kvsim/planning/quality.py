"""What a policy loses, as it was measured: the package's own table, or a file of `kvsim quality --save`."""

from collections.abc import Mapping
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from kvsim.text.documents import parse_json, read_document
from policies import Policy, describe, parse_policy
from policies.shown import shown

NOT_MEASURED = "not measured"
LOSSLESS = ("full", "offload-all")  # they attend to every key as it was computed
_FIGURES = ("kl_nats", "top1_share")
_BUDGETS, _NEAR = ("budget_tokens", "window_tokens"), 0.02
_FILE_BYTES = 64 << 20


class Qualities:
    """The measured losses of policies, by what their texts mean."""

    def __init__(self, file: Path | None = None) -> None:
        """Those of `file`, or of the package. Raises ValueError for a file that is none of `kvsim quality --save`."""
        self.origin = "benchmarks/results/real_text.json" if file is None else str(file)
        shipped = files("kvsim") / "catalogue" / "quality.json"
        text = shipped.read_text(encoding="utf-8") if file is None else read_document(file, _FILE_BYTES)
        document = parse_json(text, self.origin)
        try:
            self._of = f"{document['model']}, {_text_of(document)}"
            self._rows = [_row(row) for row in document["rows"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"--quality {self.origin} is no file of kvsim quality --save ({type(error).__name__}: {error}); write "
                "one with kvsim quality --save FILE"
            ) from None

    def of(self, policy: str, context_tokens: int) -> dict[str, Any] | str:
        """The loss of a policy at the measured context nearest to this one (in its logarithm), or NOT_MEASURED."""
        wanted = parse_policy(policy)
        if wanted.name in LOSSLESS:
            return {"kl_nats": 0.0, "top1_share": 1.0, "source": "by construction: every key is attended to as it was"}
        own = [row for row in self._rows if row["policy"] is not None and _alike(row["policy"], wanted)]
        if not own:
            return NOT_MEASURED
        nearest = min(own, key=lambda row: abs(row["context_tokens"] / context_tokens - 1))
        return {
            **nearest,
            "policy": describe(nearest["policy"]),
            "source": f"measured: {self.origin}: {self._of}",
        }


def _text_of(document: Mapping[str, Any]) -> str:
    text = document["text"]
    return str(text["name"]) if isinstance(text, dict) else str(text)


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"policy": _parsed(row["policy"]), "context_tokens": int(row["context_tokens"])}
    for name in _FIGURES:
        interval = row[name]
        if not isinstance(interval["mean"], int | float):
            raise TypeError(f"{name}.mean is {shown(interval['mean'])} and no number")
        found[name] = float(interval["mean"])
        found[f"{name}_low"], found[f"{name}_high"] = interval.get("low"), interval.get("high")
    return found


def _parsed(text: str) -> Any:
    """A policy of the package, or None for one that it does not know: code from outside is not run for a row."""
    try:
        return parse_policy(text) if "." not in text.partition(":")[0] else None
    except ValueError:
        return None


def _alike(measured: Policy, wanted: Policy) -> bool:
    """Whether two policies differ in their budget alone, and in that by 2 % at the most: shares of a context round."""
    if type(measured) is not type(wanted):
        return False
    for one in fields(wanted):
        theirs, ours = getattr(measured, one.name), getattr(wanted, one.name)
        near = one.name in _BUDGETS and isinstance(ours, int) and isinstance(theirs, int)
        if theirs != ours and not (near and abs(theirs - ours) <= _NEAR * ours):
            return False
    return True


def loss_nats(quality: Mapping[str, Any] | str) -> float | None:
    """The divergence from full attention in nats a token; None where it was not measured."""
    return None if isinstance(quality, str) else float(quality["kl_nats"])
