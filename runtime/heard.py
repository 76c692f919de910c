"""The token ids that a cache holds, heard as the model takes them, and compared with those that come again.

A later turn passes all ids again, and Hugging Face cuts off as many as the cache has tokens before the model sees them:
whether they are the cached ones is checked here.
"""

from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# What a forward may be given besides ids without its keys and values depending on it.
WITH_IDS = frozenset(("input_ids", "attention_mask", "position_ids", "cache_position", "labels", "logits_to_keep"))


class Heard:
    """The ids of one cache, (batch, tokens), and which are real; `known` until tokens come whose ids nobody names.

    `unchecked`: the cache comes from a file, and no ids have been compared with its own yet.
    """

    def __init__(self) -> None:
        self.known, self.unchecked, self.tokens = True, False, 0
        self.speaker: nn.Module | None = None  # the outermost module of the forward under way
        self._ids = torch.empty(0, 0, dtype=torch.int64)
        self._real = torch.empty(0, 0, dtype=torch.bool)

    def note(self, past: int, ids: Tensor | None, mask: Tensor | None) -> None:
        """Note the ids (batch, new_tokens) of a forward that begins after `past` tokens, None where it names none.

        `mask`, (batch, past and new tokens), is zero where a token is padding; None: all are real.
        """
        if past == 0:
            self.known, self.tokens = True, 0
        elif ids is not None and ids.shape[0] != self._ids.shape[0]:
            return  # the cache will refuse it
        if not self.known or ids is None or ids.ndim != 2 or past > self.tokens:
            self.known = False
            return
        end = past + ids.shape[1]
        if mask is not None and (not isinstance(mask, Tensor) or tuple(mask.shape) != (len(ids), end)):
            self.known = False  # it says more than which tokens are padding
            return
        with torch.inference_mode(mode=False), torch.no_grad():
            self._reserve(ids, past, end)
            self._ids[:, past:end] = ids
            self._real[:, past:end] = True if mask is None else mask[:, -ids.shape[1] :].bool()
        self.tokens = end

    def restore(self, ids: Tensor, real: Tensor) -> None:
        """Take what `ids` and `real` gave, (batch, tokens) each, as not compared with anything yet."""
        self.note(0, ids, real)
        self.unchecked = True

    def forget(self) -> None:
        """Compare nothing from here on."""
        self.known = self.unchecked = False

    def ids(self, tokens: int) -> Tensor | None:
        """The ids of the first `tokens` tokens, (batch, tokens), or None where they are not known."""
        return self._ids[:, :tokens].clone() if self.known and tokens <= self.tokens else None

    def take(self, rows: Tensor) -> None:
        """Sequence i takes the ids of sequence `rows[i]`."""
        if self.tokens:
            self._ids, self._real = (held[rows.to(held.device)] for held in (self._ids, self._real))

    def copy(self) -> "Heard":
        """The same of a cache's copy."""
        copy = Heard()
        vars(copy).update(vars(self), speaker=None, _ids=self._ids.clone(), _real=self._real.clone())
        return copy

    def compare(self, past: int, ids: Tensor, fed: Tensor | None, given: dict[str, Any]) -> None:
        """Compare the ids and the mask that `generate` was given with the first `past` tokens, which it leaves out.

        `fed` are the ids that the model will see, None for embeddings. Raises ValueError where they are of another
        prompt, or are not all that the cache has and at least one more.
        """
        if fed is None:
            if self.unchecked:
                raise ValueError(
                    "the cache was loaded for token ids and embeddings are given, which cannot be compared with them; "
                    "pass ids, or kv.load(path, unbound=True)"
                )
            return
        new, mask = fed.shape[1], given.get("attention_mask")
        if not (given.get("is_first_iteration") or new > 1 or self.unchecked):
            return  # one more token of a loop that was checked when it began
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if self.known and (ids.shape[1] not in (new, past + new) or (mask is not None and mask.shape[1] != past + new)):
            masked = "" if mask is None else f", with an attention mask for {mask.shape[1]} tokens"
            raise ValueError(
                f"the cache holds {past} tokens, and {ids.shape[1]} ids are given, of which {new} would be processed"
                f"{masked}: pass all ids and at least one that is new, without prefill_chunk_size, which begins at the "
                "first"
            )
        self.check(past, ids if ids.shape[1] == past + new else None, mask)

    def check(self, past: int, ids: Tensor | None, mask: Tensor | None) -> None:
        """Compare the first `past` of ids, and of the mask that comes with them, with the cached ones; None: neither.

        Padding may hold any id. A token that was real may become padding where only such tokens follow it in the
        cache, as what follows the end of a sequence does. Raises ValueError, naming the first token that differs.
        """
        self.unchecked = False
        if not self.known or past > self.tokens or (ids is None and mask is None):
            return
        held, real = self._ids[:, :past], self._real[:, :past]
        given = next(x for x in (ids, mask) if x is not None)
        if given.shape[0] != held.shape[0]:
            raise ValueError(
                f"the cache holds {held.shape[0]} sequences and {given.shape[0]} are given; make the cache with the "
                "same batch, beams and returned sequences included"
            )
        if given.shape[1] < past:
            raise ValueError(
                f"{given.shape[1]} ids a sequence are given, and the cache holds {past} tokens; give them all"
            )
        now = torch.ones_like(real) if mask is None else mask[:, :past].to(real.device).bool()
        follows = now.flip(1).cummax(dim=1).values.flip(1) if past else now  # a real token stands here or later
        self._refuse((now & ~real) | (real & ~now & follows), "is {} in the cache and {} here", real, now)
        if ids is not None:
            ids = ids[:, :past].to(held.device)
            self._refuse(real & now & (ids != held), "has the id {} in the cache and {} here", held, ids)

    def _refuse(self, wrong: Tensor, says: str, held: Tensor, here: Tensor) -> None:
        if not wrong.any():
            return
        row, token = (int(x) for x in wrong.nonzero()[0])
        pair = (_named(x[row, token].item()) for x in (held, here))
        raise ValueError(
            f"token {token} of sequence {row} {says.format(*pair)}: the cache is of another prompt; pass the ids "
            "and the attention mask that it was made from and the new ones behind them, or use a new kv.cache()"
        )

    def _reserve(self, ids: Tensor, past: int, end: int) -> None:
        if past and end <= self._ids.shape[1]:
            return
        room = (ids.shape[0], max(end, 2 * past))
        before = (self._ids[:, :past], self._real[:, :past])
        self._ids = ids.new_zeros(room, dtype=torch.int64)
        self._real = ids.new_zeros(room, dtype=torch.bool)
        if past:
            self._ids[:, :past], self._real[:, :past] = before


def undo_of(hooks: Iterable[RemovableHandle]) -> Callable[[], None]:
    """What takes these hooks away again."""

    def undo() -> None:
        for hook in hooks:
            hook.remove()

    return undo


def takes_ids(module: nn.Module) -> bool:
    """Whether a module's forward may be given token ids and a cache."""
    return {"input_ids", "past_key_values"} <= {*signature(module.forward).parameters}


def hear(module: nn.Module, heard_of: Callable[[Any], Heard | None]) -> Callable[[], None]:
    """Note the ids of every forward of a module that is given a cache, and compare a loaded one's padding.

    `heard_of` gives what a cache of ours has heard, None for others. What is returned undoes it.
    """
    names = list(signature(module.forward).parameters)

    def begin(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        given = {**dict(zip(names, args, strict=False)), **given}
        cache: Any = given.get("past_key_values")
        heard = heard_of(cache)
        if heard is None or heard.speaker not in (None, module):  # a module around this one has spoken
            return
        heard.speaker = module
        past, ids, mask = cache.tokens, given.get("input_ids"), given.get("attention_mask")
        if heard.unchecked and isinstance(mask, Tensor) and mask.ndim == 2:
            heard.check(past, None, mask)
        heard.unchecked = False
        others = (value for name, value in given.items() if name not in WITH_IDS and isinstance(value, Tensor))
        plain = not any(value.is_floating_point() or bool(value.any()) for value in others)
        heard.note(past, ids if plain else None, mask)

    def end(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any], _out: Any) -> None:
        heard = heard_of({**dict(zip(names, args, strict=False)), **given}.get("past_key_values"))
        if heard is not None and heard.speaker is module:
            heard.speaker = None

    hooks = (
        module.register_forward_pre_hook(begin, with_kwargs=True),
        module.register_forward_hook(end, with_kwargs=True, always_call=True),
    )
    return undo_of(hooks)


def _named(value: Any) -> str:
    return str(value) if not isinstance(value, bool) else "real" if value else "padding"
