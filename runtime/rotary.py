"""Rotary positions: the angles that a model has used so far, and keys turned back to before their rotation.

Hugging Face hands a cache rotated keys. Policies that decompose keys or renumber positions need them before; turning
back costs about one rounding of the keys' dtype.
"""

import torch
from torch import Tensor

# Models that rotate halves, (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), over the leading dimensions of a head.
ROTATES_HALVES = frozenset(
    (
        *(
            "gemma",
            "gemma2",
            "gemma3",
            "gemma3_text",
            "gpt_oss",
            "granite",
            "llama",
            "ministral3",
            "mistral",
            "mixtral",
        ),
        *("olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm"),
        "starcoder2",
    )
)


class Rotary:
    """The cosines and sines of every token of a batch, as the model computed them."""

    def __init__(self, capacity_tokens: int, *, half: bool) -> None:
        """`half`: the model keeps one half of the angles, which serves both (gpt-oss)."""
        self.capacity_tokens, self.half, self.tokens = capacity_tokens, half, 0
        self._cos = self._sin = torch.empty(0)

    def extend(self, cos: Tensor, sin: Tensor) -> None:
        """Take the angles of new tokens, (batch or 1, new_tokens, rotated dimensions or half as many)."""
        if self.half:
            cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)
        self.restore(cos, sin)

    def restore(self, cos: Tensor, sin: Tensor) -> None:
        """Take the angles of more tokens, (batch or 1, tokens, rotated dimensions), as `so_far` gives them."""
        if not self.tokens:
            shape = (cos.shape[0], self.capacity_tokens, cos.shape[-1])
            self._cos, self._sin = cos.new_zeros(shape), cos.new_zeros(shape)
        if cos.shape[0] > self._cos.shape[0]:  # until now one row served the whole batch
            self._cos, self._sin = (old.repeat(cos.shape[0], 1, 1) for old in (self._cos, self._sin))
        end = self.tokens + cos.shape[1]
        self._cos[:, self.tokens : end] = cos
        self._sin[:, self.tokens : end] = sin
        self.tokens = end

    def so_far(self) -> tuple[Tensor, Tensor]:
        """Cosine and sine of all tokens, (batch or 1, tokens, rotated dimensions) each."""
        return self._cos[:, : self.tokens].contiguous(), self._sin[:, : self.tokens].contiguous()

    def drop(self, tokens: int) -> None:
        """Forget the last `tokens`."""
        self.tokens -= tokens

    def at(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the tokens (batch or 1, ...) of each row: (batch, ..., rotated dimensions)."""
        batch = max(tokens.shape[0], self._cos.shape[0])
        tokens = tokens.expand(batch, *tokens.shape[1:])
        row = torch.arange(batch, device=tokens.device).clamp(max=self._cos.shape[0] - 1)
        row = row.view(-1, *(1 for _ in tokens.shape[1:]))
        return self._cos[row, tokens], self._sin[row, tokens]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading dimensions of x (..., head_dim) by angles that broadcast to it; in the dtype of x."""
    width = cos.shape[-1]
    turned, kept = x[..., :width], x[..., width:]
    return torch.cat([turned * cos + _quarter_turn(turned) * sin, kept], dim=-1).to(x.dtype)


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The inverse of `rotate`, in fp32 inside: scaled angles (YaRN) are undone as well."""
    width = cos.shape[-1]
    cos, sin = cos.float(), sin.float()
    turned, kept = x[..., :width].float(), x[..., width:]
    back = (turned * cos - _quarter_turn(turned) * sin) / (cos.square() + sin.square())
    return torch.cat([back.to(x.dtype), kept], dim=-1)


def _quarter_turn(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
