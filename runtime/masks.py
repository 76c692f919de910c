"""What a mask of Hugging Face says: which tokens are real, and whether attention is causal besides."""

from typing import NamedTuple

import torch
from torch import Tensor

from runtime.call import Method
from runtime.kernels.attention import causal_mask

HIDDEN = -1e4  # an additive mask hides what it adds this much or less to: fp16 has no smaller round number


class Seen(NamedTuple):
    """What the mask of one forward says.

    `real` is bool (batch, tokens), None where every token is; `given` is the mask itself, as bool. `plain`: attention
    is causal among real tokens and nothing else. `left`: padding comes before all real tokens. `same`: it says of
    cached tokens what the forward before has said.
    """

    real: Tensor | None
    given: Tensor | None
    plain: bool = True
    left: bool = True
    same: bool = True

    def to(self, method: Method, name: str) -> Tensor | None:
        """The mask as a method of the policy `name` takes it.

        Raises ValueError where the method would not honour it.
        """
        if method.any_mask:
            return self.given
        if not self.plain:
            raise ValueError(
                f"the attention mask says more than which tokens are padding, and {name} honours only that; use a "
                "causal mask, or policy full or offload-all"
            )
        if not self.same:
            raise ValueError(
                f"the attention mask has changed for tokens that are cached, and {name} has stored them by the mask "
                "that they came with; pass the same mask, with columns for new tokens added"
            )
        if not self.left and not method.any_padding:
            raise ValueError(
                f"the attention mask has padding behind real tokens, and {name} knows it only before them; pad on the "
                "left, or use full, offload-all, quest, snapkv or shadowkv"
            )
        return None if self.real is None else self.real[:, None, None]


def read_mask(given: Tensor | None, *, past: int, new: int, batch: int, before: Tensor | None, prompt: int) -> Seen:
    """What a mask (batch, 1, 1 or new, tokens), (batch, heads, new, tokens) or None says of past and new tokens.

    `before`: what was real of the past ones, bool (batch, past), None for all. What came behind the first `prompt` may
    turn out to be padding, as what follows the end of a text does. Waits for the device where there is a mask. Raises
    ValueError for a mask of another number of tokens or sequences, and for one that adds a bias.
    """
    tokens = past + new
    if given is None:
        return Seen(real=None, given=None, same=before is None)
    if (
        given.dim() != 4
        or given.shape[3] != tokens
        or given.shape[2] not in (1, new)
        or given.shape[0] not in (1, batch)
    ):
        raise ValueError(
            f"an attention mask of shape {tuple(given.shape)} does not fit {tokens} tokens ({past} cached, {new} new) "
            f"of {batch} sequences; give it a column for each token, the cached ones included"
        )
    mask = allowed(given)
    assert mask is not None  # noqa: S101 - it was given
    real = mask.any(dim=2).any(dim=1).expand(batch, tokens)
    everything = real.all()
    plain = torch.ones((), dtype=torch.bool, device=real.device)
    if mask.shape[2] > 1 or mask.shape[1] > 1:
        asks = real[:, None, past:, None]  # what a query of padding sees is nobody's business
        wanted = real[:, None, None] & causal_mask(new, tokens, real.device)
        plain = ((mask == wanted) | ~asks).all()
    left = ~(real[:, :-1] & ~real[:, 1:]).any()
    held = torch.ones_like(real[:, :past]) if before is None else before
    same = (real[:, : min(past, prompt)] == held[:, :prompt]).all() & (real[:, :past] <= held).all()
    answers: list[bool] = torch.stack([everything, plain, left, same]).tolist()
    hidden = real if not answers[0] else None
    return Seen(hidden, mask if hidden is not None or not answers[1] else None, *answers[1:])


def allowed(mask: Tensor | None) -> Tensor | None:
    """A mask as bool, True = attend; one that is added to scores must hide or leave alone.

    Raises ValueError for one that adds anything else.
    """
    if mask is None or mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        return mask != 0
    shown = mask == 0
    if not bool((shown | (mask <= HIDDEN)).all()):
        raise ValueError(
            f"the attention mask adds {float(mask[~shown].max()):.3g} to scores; the runtime executes masks that hide "
            "tokens (bool, or 0 and minus infinity), not biases"
        )
    return shown
