"""Prompts of stated lengths: as ids of tokens, or as words, alike as far as a trace's prompts are."""

import numpy as np

from traces import Trace

FORMS = ("tokens", "text")
_FIRST_ID, _IDS = 1000, 20_000  # ordinary tokens of every vocabulary in use
_WORDS = (  # each is one token, with the space before it, of usual vocabularies
    *("the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not"),
    *("he", "his", "but", "at", "are", "this", "have", "from", "or", "had", "an", "they", "which", "one", "you"),
    *("were", "all", "her", "she", "there", "would", "their", "we", "him", "been", "has", "when", "who", "will"),
)


class Prompts:
    """What stands in for the prompts of a trace: requests with equal block ids begin with equal tokens, others differ.

    `form` is one of FORMS; the number of tokens of a `text` is about that which was asked for, and the server's own
    count (`usage`) is what is recorded.
    """

    def __init__(self, trace: Trace, form: str, seed: int) -> None:
        self._trace, self._form, self._seed = trace, form, seed

    def __getitem__(self, index: int) -> list[int] | str:
        tokens = int(self._trace.prompt_tokens[index])
        drawn = self._draws(index, tokens)
        if self._form == "tokens":
            ids: list[int] = (_FIRST_ID + drawn % _IDS).tolist()
            return ids
        return "".join(f" {_WORDS[number]}" for number in (drawn % len(_WORDS)).tolist())

    def _draws(self, index: int, tokens: int) -> np.ndarray:
        """Whole numbers, one a token: by block, then what fills none by the request."""
        block = self._trace.block_tokens
        ids = self._trace.blocks(index)[: tokens // block] if block else ()
        pieces = [self._drawn((0, int(name)), block) for name in ids]
        rest = tokens - block * len(pieces)
        return np.concatenate([*pieces, self._drawn((1, index), rest)])

    def _drawn(self, key: tuple[int, int], tokens: int) -> np.ndarray:
        return np.random.default_rng((self._seed, *key)).integers(0, 1 << 31, tokens)
