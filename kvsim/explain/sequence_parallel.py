"""Prefill with the prompt split over several GPUs: what each scheme sends, and how long a layer's attention takes.

P devices hold n / P tokens each. Volumes are of one layer, forward only, of the device that sends most: Ring Attention
(arXiv:2310.01889), its zigzag order for causal attention (ring-flash-attention), TokenRing (arXiv:2412.20501), LightSeq
(arXiv:2310.03294), Ulysses (arXiv:2309.14509), and gathering all keys and values at once (Llama 3, arXiv:2407.21783).
"""

from collections.abc import Callable
from typing import NamedTuple

from kvsim.hardware.machine import Machine
from kvsim.text.names import unknown_name
from policies.dense import causal_pairs, pair_flops
from policies.dtypes import row_bytes
from policies.model import LayerShape, ModelShape
from policies.plan import Step

LSE_BYTES = 4  # the log-sum-exp that travels with a partial output, fp32; LightSeq sends maximum and sum, twice that


class Volume(NamedTuple):
    """Bytes that the busiest device sends for one layer; both directions of a link work at a time."""

    forward_bytes: int  # keys and values, or queries, to the devices after it
    backward_bytes: int  # outputs, and what else goes the other way
    steps: int  # exchanges one after the other
    buffer_bytes: int  # received at a time, beside the device's own tokens


class Split(NamedTuple):
    """A prompt of a layer's `tokens` over `devices`, in elements of `dtype`."""

    layer: LayerShape
    tokens: int
    devices: int
    dtype: str

    @property
    def own_tokens(self) -> int:
        """Tokens of one device, the last of which may be padding."""
        return -(-self.tokens // self.devices)

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one device's tokens."""
        shape = self.layer
        token = row_bytes((shape.kv_heads, shape.head_dim), self.dtype)
        return self.own_tokens * (token + row_bytes((shape.kv_heads, shape.v_head_dim), self.dtype))

    @property
    def q_bytes(self) -> int:
        """Queries of one device's tokens."""
        return self.own_tokens * row_bytes((self.layer.heads, self.layer.head_dim), self.dtype)

    @property
    def out_bytes(self) -> int:
        """Outputs of one device's tokens."""
        return self.own_tokens * row_bytes((self.layer.heads, self.layer.v_head_dim), self.dtype)

    def lse_bytes(self, each: int = LSE_BYTES) -> int:
        """What a partial output of one device's tokens needs to be merged, `each` bytes a token and head."""
        return self.own_tokens * self.layer.heads * each


def _ring(split: Split) -> Volume:
    others = split.devices - 1
    return Volume(others * split.kv_bytes, 0, others, 2 * split.kv_bytes if others else 0)


def _token_ring(split: Split) -> Volume:
    others = split.devices - 1
    back = split.out_bytes + split.lse_bytes()
    return Volume(others * split.q_bytes, others * back, others, 2 * (split.q_bytes + back) if others else 0)


def _light_seq(split: Split) -> Volume:
    half = split.devices // 2
    sent = [light_seq_sent(split, rank) for rank in range(split.devices)]
    busiest = max(sent, key=sum)
    return Volume(*busiest, half + 1 if half else 0, 2 * max(split.kv_bytes, split.q_bytes) if half else 0)


def light_seq_sent(split: Split, rank: int) -> tuple[int, int]:
    """Bytes that one rank of LightSeq sends forward (keys, values) and backward (queries to helpers, outputs home).

    A rank keeps at most half of the blocks that it attends to; late ranks hand the rest to the early ones, who have
    less to do: rank r gives one to each of the first r - P/2.
    """
    half = split.devices // 2
    forward = min(half, split.devices - 1 - rank) * split.kv_bytes
    asks, helps = max(0, rank - half), max(0, half - 1 - rank)
    return forward, asks * split.q_bytes + helps * (split.out_bytes + split.lse_bytes(2 * LSE_BYTES))


def _ulysses(split: Split) -> Volume:
    # All to all: a device keeps its own P-th of the heads of what it has, and sends the others.
    total = split.q_bytes + split.kv_bytes + split.out_bytes
    sent = total * (split.devices - 1) // split.devices
    return Volume(sent, 0, 2 if split.devices > 1 else 0, split.q_bytes + split.kv_bytes)


def _all_gather(split: Split) -> Volume:
    others = split.devices - 1
    return Volume(others * split.kv_bytes, 0, min(others, 1), others * split.kv_bytes)


VOLUMES: dict[str, Callable[[Split], Volume]] = {
    "ring": _ring,
    "zigzag": _ring,
    "token-ring": _token_ring,
    "light-seq": _light_seq,
    "ulysses": _ulysses,
    "all-gather": _all_gather,
}


def volume(scheme: str, split: Split) -> Volume:
    """What one layer's exchange costs in bytes.

    Raises ValueError for an unknown scheme, for fewer than one device, for LightSeq on an odd number of them, and for
    Ulysses on more devices than it can divide the KV heads over.
    """
    if scheme not in VOLUMES:
        raise unknown_name("scheme", scheme, list(VOLUMES))
    devices, kv_heads = split.devices, split.layer.kv_heads
    if devices < 1:
        raise ValueError(f"sp={devices} must be at least 1")
    if scheme == "light-seq" and devices > 1 and devices % 2:
        raise ValueError(f"sp={devices}: light-seq pairs early with late ranks; use an even number")
    if scheme == "ulysses" and kv_heads % devices:
        raise ValueError(f"sp={devices}: ulysses divides the {kv_heads} KV heads; use a divisor of {kv_heads}")
    return VOLUMES[scheme](split)


def attention_s(scheme: str, split: Split, machine: Machine) -> float:
    """Time of one layer's causal attention over all devices; a step's exchange runs beside its arithmetic.

    Raises ValueError as `volume` does.
    """
    sent = volume(scheme, split)
    own, devices = split.own_tokens, split.devices
    flops = pair_flops(split.layer, Step(prompt_tokens=split.tokens, past_tokens=0, new_tokens=split.tokens))

    def compute_s(pairs: int) -> float:
        return pairs * flops / machine.gpu.rates.attention_flops

    block, diagonal = own * own, causal_pairs(0, own)
    if not sent.steps:
        return compute_s(diagonal)
    most = max(sent.forward_bytes, sent.backward_bytes)
    step_s = machine.peer_s(-(-most // sent.steps))
    if scheme == "ring":  # the last device attends to every block, so each step takes a whole one
        return compute_s(diagonal) + sent.steps * max(step_s, compute_s(block))
    if scheme in ("zigzag", "token-ring"):  # an early and a late half each: half a block a step, everywhere
        return compute_s(diagonal) + sent.steps * max(step_s, compute_s(block // 2))
    if scheme == "light-seq":  # the helpers' last outputs come one step later
        return compute_s(diagonal) + (sent.steps - 1) * max(step_s, compute_s(block)) + step_s
    # Ulysses and the gather exchange before they compute, and share the pairs evenly.
    return sent.steps * step_s + compute_s(-(-causal_pairs(0, split.tokens) // devices))


def prefill_s(model: ModelShape, machine: Machine, tokens: int, devices: int, scheme: str) -> float:
    """Time to prefill a prompt of `tokens` on `devices` that hold the whole model each.

    Raises ValueError as `volume` does, and for layers other than full attention.
    """
    own = -(-tokens // devices)
    total = machine.head_s(model, 1)
    for shape in dict.fromkeys(model.layers):
        if shape.kind != "full":
            raise ValueError(f"sequence parallelism is priced for full attention; {model.name} has {shape.kind} layers")
        linear = sum(machine.layer_s(model, shape, own))
        attention = attention_s(scheme, Split(shape, tokens, devices, model.kv_dtype), machine)
        total += model.layers.count(shape) * (linear + attention)
    return total
