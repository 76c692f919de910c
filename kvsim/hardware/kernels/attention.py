"""Attention of prompts and of decode steps, as serving engines' kernels run it."""

from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict

from kvsim.hardware.kernels.chip import Chip, element_bytes, smooth_max
from kvsim.hardware.kernels.shares import Count, Seconds, Share, Sharpness

_FITTED_HEAD_DIM = 128
_SPLIT_TOKENS = 200  # between 128, which kernels do not split, and 256, which they do
_FILLED = 1.6  # KV heads an SM from which on FlashAttention 2 splits no sequence (its num_splits_heuristic, in torch)
_SPLIT_SMS, _MOST_PARTS, _PART_TOKENS = 2, 128, 128  # what it splits for otherwise, and what bounds the parts


def attention_flops(batch: int, tokens: int, cached: int, heads: int, head_dim: int) -> int:
    """FLOPs of causal attention of `tokens` after `cached` ones: two products for each pair of a query and a key."""
    return 4 * batch * heads * head_dim * (tokens * cached + tokens * (tokens + 1) // 2)


def attention_bytes(
    kv_dtype: str, batch: int, tokens: int, cached: int, heads: int, kv_heads: int, head_dim: int
) -> float:
    """Bytes of 16-bit queries and outputs, and of all keys and values once."""
    kv_bytes = 2 * element_bytes(kv_dtype) * batch * kv_heads * head_dim * (cached + tokens)
    return 4 * batch * heads * head_dim * tokens + kv_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillFit:
    """Constants of causal attention over whole prompts.

    A smooth maximum of FLOPs, of waves of query blocks, of the longest row of key blocks, and of bytes.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    start_s: Seconds
    peak: Share
    sharpness: Sharpness
    hbm: Share
    block: Count  # query rows of a block
    block_s: Seconds  # of a wave of blocks
    token_s: Seconds  # of a key in the longest row of blocks
    packed: bool  # query heads of a KV head share blocks at any length, not only where a prompt is one token
    copy_s: Seconds = 0.0  # of queries laid out anew where they are one token each

    def limits_s(
        self, chip: Chip, kv_dtype: str, batch: int, tokens: int, cached: int, heads: int, kv_heads: int, head_dim: int
    ) -> tuple[float, float, float, float]:
        """Times by FLOPs, waves, the longest row, and bytes."""
        group = heads // kv_heads
        packed = (tokens == 1) | self.packed
        rows = tokens * (1 + (group - 1) * packed)
        blocks = batch * (heads - (heads - kv_heads) * packed) * -(-rows // self.block)
        flops = 4 * batch * heads * head_dim * tokens * (cached + (tokens + self.block) / 2)
        nbytes = attention_bytes(kv_dtype, batch, tokens, cached, heads, kv_heads, head_dim)
        return (
            flops / (self.peak * chip.half_flops),
            -(-blocks // chip.sms) * self.block_s,
            (cached + tokens) * self.token_s * head_dim / _FITTED_HEAD_DIM,
            nbytes / (self.hbm * chip.hbm_Bps),
        )

    def extra_s(self, batch: int, tokens: int, heads: int, kv_heads: int) -> float:
        """Start, and a copy of single queries of several heads."""
        return self.start_s + self.copy_s * ((tokens == 1) & (batch > 1) & (kv_heads > 1) & (heads > kv_heads))

    def seconds(
        self, chip: Chip, kv_dtype: str, batch: int, tokens: int, cached: int, heads: int, kv_heads: int, head_dim: int
    ) -> float:
        """Time of one layer's attention of `batch` prompts of `tokens`, after `cached` tokens each."""
        limits = self.limits_s(chip, kv_dtype, batch, tokens, cached, heads, kv_heads, head_dim)
        return self.extra_s(batch, tokens, heads, kv_heads) + smooth_max(self.sharpness, *limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeFit:
    """Constants of attention of one new token a sequence over its cache.

    A smooth maximum of bytes, of waves of KV heads, and of the longest stretch of keys that one SM reads.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    start_s: Seconds
    hbm: Share
    sharpness: Sharpness
    head_s: Seconds  # of a wave of KV heads
    query_s: Seconds  # of each query head in it
    copy_s: Seconds  # of queries laid out anew
    split_s: Seconds  # of joining what several SMs found of one sequence
    token_s: Seconds  # of a key where a sequence is split
    lone_token_s: Seconds  # where each KV head has one query head, and kernels do not split
    whole_hbm: Share | None = None  # in place of `hbm` where KV heads fill the SMs, of kernels that split no more then
    part_s: Seconds = 0.0  # of each part that a sequence is split into, when they are joined

    def limits_s(
        self, chip: Chip, kv_dtype: str, batch: int, tokens: int, heads: int, kv_heads: int, head_dim: int
    ) -> tuple[float, float, float]:
        """Times by bytes, waves and the longest stretch."""
        nbytes = attention_bytes(kv_dtype, batch, 1, tokens - 1, heads, kv_heads, head_dim)
        waves = -(-batch * kv_heads // chip.sms)
        lone = heads == kv_heads
        token_s = (self.token_s + (self.lone_token_s - self.token_s) * lone) * head_dim / _FITTED_HEAD_DIM
        whole = batch * kv_heads >= _FILLED * chip.sms
        share = self.hbm + ((self.whole_hbm or self.hbm) - self.hbm) * whole
        return (
            nbytes / (share * chip.hbm_Bps),
            waves * (self.head_s + self.query_s * heads / kv_heads),
            tokens * token_s,
        )

    def extra_s(self, batch: int, tokens: int, heads: int, kv_heads: int) -> float:
        """Start, and what depends on the layout: a copy of queries, and joining parts of a split sequence."""
        grouped = heads > kv_heads
        copied = grouped & (batch > 1) & (kv_heads > 1)
        return self.start_s + self.copy_s * copied + self.split_s * (grouped & (tokens >= _SPLIT_TOKENS))

    def joining_s(self, chip: Chip, batch: int, tokens: int, kv_heads: int) -> float:
        """Time of joining the parts of split sequences, which grows with their number."""
        parts = _least(_least(tokens / _PART_TOKENS, _SPLIT_SMS * chip.sms / (batch * kv_heads)), _MOST_PARTS)
        return self.part_s * parts * (batch * kv_heads < _FILLED * chip.sms)

    def seconds(
        self, chip: Chip, kv_dtype: str, batch: int, tokens: int, heads: int, kv_heads: int, head_dim: int
    ) -> float:
        """Time of one layer's attention of `batch` new tokens, each over a cache of `tokens`."""
        limits = self.limits_s(chip, kv_dtype, batch, tokens, heads, kv_heads, head_dim)
        extra_s = self.extra_s(batch, tokens, heads, kv_heads) + self.joining_s(chip, batch, tokens, kv_heads)
        return extra_s + smooth_max(self.sharpness, *limits)


def _least(one: float, other: float) -> float:
    """The smaller of two, of numbers and of columns alike."""
    return (one + other - abs(one - other)) / 2
