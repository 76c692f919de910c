"""Rotary positions: the angles that a model has used so far, and keys turned back to before their rotation.

Hugging Face hands a cache rotated keys. Policies that decompose keys or renumber positions need them before; turning
back costs about one rounding of the keys' dtype.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """How a layer rotates the leading dimensions of its keys, and how the model lays out the angles.

    `pairs`: neighbours are rotated, (x0, x1), (x2, x3), ..., as in RoFormer; else halves, x_i with x_(i + width / 2),
    as in GPT-NeoX. `table` says what the last dimension of a cosine holds: `half` (each angle once), `doubled` (all
    angles, then all again), `interleaved` (each angle twice in a row), or `none`: nothing is rotated. `backwards`: by
    the negative angles.
    """

    pairs: bool = False
    table: str = "doubled"
    backwards: bool = False

    def full(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """A model's cosines and sines, one for each rotated dimension: (batch or 1, tokens, rotated dimensions)."""
        return self._full(cos), -self._full(sin) if self.backwards else self._full(sin)

    def _full(self, table: Tensor) -> Tensor:
        if self.table == "none":
            return table[..., :0]
        if self.table == ("interleaved" if self.pairs else "doubled"):
            return table
        if self.table == "doubled":
            table = table[..., : table.shape[-1] // 2]
        elif self.table == "interleaved":
            table = table[..., ::2]
        return table.repeat_interleave(2, dim=-1) if self.pairs else torch.cat([table, table], dim=-1)


UNROTATED = Rotation(table="none")
ROTATIONS = tuple(
    Rotation(pairs=pairs, table=table, backwards=backwards)
    for backwards in (False, True)
    for pairs in (False, True)
    for table in ("doubled", "interleaved", "half")
)


def angles_of(position_embeddings: Any) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines of what a model hands its attention: two tensors, or one of complex numbers (Llama 4)."""
    if isinstance(position_embeddings, Tensor) and position_embeddings.is_complex():
        return position_embeddings.real, position_embeddings.imag
    if isinstance(position_embeddings, tuple | list) and len(position_embeddings) == 2:
        cos, sin = position_embeddings
        if isinstance(cos, Tensor) and isinstance(sin, Tensor) and cos.dim() == 3 and cos.shape == sin.shape:
            return cos, sin
    return None


class Rotary:
    """The cosines and sines of every token of a batch, as the model computed them."""

    def __init__(self, capacity_tokens: int, rotation: Rotation) -> None:
        self.capacity_tokens, self.rotation, self.tokens = capacity_tokens, rotation, 0
        self._cos = self._sin = torch.empty(1, capacity_tokens, 0)  # all that there is of keys that are not rotated

    @property
    def pairs(self) -> bool:
        """Whether neighbours are rotated, not halves."""
        return self.rotation.pairs

    def extend(self, cos: Tensor, sin: Tensor) -> None:
        """Take the angles of new tokens, (batch or 1, new_tokens, dimensions of the model's table)."""
        self.restore(*self.rotation.full(cos, sin))

    def restore(self, cos: Tensor, sin: Tensor) -> None:
        """Take the angles of more tokens, (batch or 1, tokens, rotated dimensions), as `so_far` gives them."""
        if not self.tokens:
            shape = (cos.shape[0], self.capacity_tokens, cos.shape[-1])
            self._cos, self._sin = cos.new_zeros(shape), cos.new_zeros(shape)
        self.widen(cos.shape[0])
        end = self.tokens + cos.shape[1]
        self._cos[:, self.tokens : end] = cos
        self._sin[:, self.tokens : end] = sin
        self.tokens = end

    def widen(self, batch: int) -> None:
        """Give each of `batch` sequences angles of its own, where one row has served them all."""
        if self._cos.shape[0] < batch:
            self._cos, self._sin = (old.repeat(batch, 1, 1) for old in (self._cos, self._sin))

    def extend_at(self, cos: Tensor, sin: Tensor, row: Tensor) -> None:
        """Take the angles of one token for row `row`, int64 (1,) on their device; `tokens` is the caller's to raise.

        The table must be wide enough for them.
        """
        cos, sin = self.rotation.full(cos, sin)
        self._cos.index_copy_(1, row, cos.expand(len(self._cos), -1, -1))
        self._sin.index_copy_(1, row, sin.expand(len(self._sin), -1, -1))

    @property
    def table(self) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every token that there is room for, (batch or 1, tokens, rotated dimensions) each."""
        return self._cos, self._sin

    def so_far(self) -> tuple[Tensor, Tensor]:
        """Cosine and sine of all tokens, (batch or 1, tokens, rotated dimensions) each."""
        return self._cos[:, : self.tokens].contiguous(), self._sin[:, : self.tokens].contiguous()

    def drop(self, tokens: int) -> None:
        """Forget the last `tokens`."""
        self.tokens -= tokens

    def take(self, rows: Tensor) -> None:
        """Sequence i takes the angles of sequence `rows[i]`."""
        if self._cos.shape[0] > 1:  # one row serves them all
            rows = rows.to(self._cos.device)
            for table in (self._cos, self._sin) if len(rows) == len(self._cos) else ():  # whoever reads them goes on
                table.copy_(table[rows])
            if len(rows) != len(self._cos):
                self._cos, self._sin = self._cos[rows], self._sin[rows]

    def copy(self) -> "Rotary":
        """A table of its own with the same angles."""
        copy = Rotary(self.capacity_tokens, self.rotation)
        copy.tokens, copy._cos, copy._sin = self.tokens, self._cos.clone(), self._sin.clone()
        return copy

    def at(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the tokens (batch or 1, ...) of each row: (batch, ..., rotated dimensions)."""
        batch = max(tokens.shape[0], self._cos.shape[0])
        tokens = tokens.expand(batch, *tokens.shape[1:])
        if self.rotation == UNROTATED:
            nothing = torch.empty(*tokens.shape, 0, device=tokens.device)
            return nothing, nothing
        row = torch.arange(batch, device=tokens.device).clamp(max=self._cos.shape[0] - 1)
        row = row.view(-1, *(1 for _ in tokens.shape[1:]))
        return self._cos[row, tokens], self._sin[row, tokens]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, pairs: bool = False) -> Tensor:
    """Rotate the leading dimensions of x (..., head_dim) by angles that broadcast to it; in the dtype of x."""
    width = cos.shape[-1]
    turned, kept = x[..., :width], x[..., width:]
    return torch.cat([turned * cos + _quarter_turn(turned, pairs) * sin, kept], dim=-1).to(x.dtype)


def unrotate(x: Tensor, cos: Tensor, sin: Tensor, *, pairs: bool = False) -> Tensor:
    """The inverse of `rotate`, in fp32 inside: scaled angles (YaRN) are undone as well."""
    width = cos.shape[-1]
    cos, sin = cos.float(), sin.float()
    turned, kept = x[..., :width].float(), x[..., width:]
    back = (turned * cos - _quarter_turn(turned, pairs) * sin) / (cos.square() + sin.square())
    return torch.cat([back.to(x.dtype), kept], dim=-1)


def _quarter_turn(x: Tensor, pairs: bool) -> Tensor:
    if pairs:
        return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], dim=-1)
