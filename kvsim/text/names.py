"""Errors for names that are not in a catalogue: they list what is known, nearest first."""

from collections.abc import Iterable
from difflib import SequenceMatcher

from policies.shown import shown

_LIKELY_TYPO = 0.6  # difflib's own cutoff for a close match


def nearest_first(name: str, known: Iterable[str]) -> list[str]:
    """The known names, the most similar to `name` first; equally similar ones keep their order."""
    return sorted(known, key=lambda candidate: -_similarity(name, candidate))


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error to raise for an unknown name.

    `unknown policy 'shadowvk'; did you mean 'shadowkv'? known: shadowkv, snapkv, full`
    """
    candidates = nearest_first(name, known)
    if not candidates:
        return ValueError(f"unknown {kind} {shown(name)}; none is known")
    likely = _similarity(name, candidates[0]) >= _LIKELY_TYPO
    hint = f" did you mean {shown(candidates[0])}?" if likely else ""
    return ValueError(f"unknown {kind} {shown(name)};{hint} known: {', '.join(candidates)}")


def _similarity(name: str, candidate: str) -> float:
    return SequenceMatcher(None, name.casefold(), candidate.casefold()).ratio()
