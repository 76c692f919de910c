"""Partial attention and its merge against sums written out in float64, one query and one key at a time."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from runtime.kernels.attention import causal_mask, merge, partial_attention, partial_attention_at  # noqa: E402


def tensors(batch, kv_heads, group, new_tokens, tokens, head_dim, *, spread=1.0, seed=0):
    """q strided as transformers hands it over: a transposed view."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, new_tokens, kv_heads * group, head_dim, generator=generator).transpose(1, 2) * spread
    k, v = (torch.randn(batch, kv_heads, tokens, head_dim, generator=generator) for _ in range(2))
    return q, k, v


def attention_by_hand(q, k, v, scale, attends=lambda _b, _h, _i, _t: True, softcap=None, sinks=None):
    """float64 `(out, lse)`; `attends(b, h, i, t)` says whether query i of head h sees key t."""
    batch, heads, new_tokens, _ = q.shape
    group = heads // k.shape[1]
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(new_tokens):
                seen = [t for t in range(k.shape[2]) if attends(b, h, i, t)]
                logits = [float(q[b, h, i].double() @ k[b, h // group, t].double()) * scale for t in seen]
                if softcap is not None:
                    logits = [softcap * math.tanh(x / softcap) for x in logits]
                if not seen:
                    continue
                sink = [] if sinks is None else [float(sinks[h])]
                top = max(logits + sink)
                total = sum(math.exp(x - top) for x in logits + sink)
                lse[b, h, i] = top + math.log(total)
                for t, x in zip(seen, logits, strict=True):
                    out[b, h, i] += math.exp(x - top) / total * v[b, h // group, t].double()
    return out, lse


def assert_near(got, wanted, tolerance=1e-5):
    for mine, oracle in zip(got, wanted, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), oracle, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("new_tokens", [1, 3])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_attention_is_the_sum_over_keys(group, new_tokens, softcap):
    q, k, v = tensors(2, 2, group, new_tokens, 11, 16)
    assert not q.is_contiguous() or new_tokens == 1
    got = partial_attention(q, k, v, scale=0.25, softcap=softcap)
    assert_near(got, attention_by_hand(q, k, v, 0.25, softcap=softcap))


def test_values_may_be_narrower_than_keys():
    q, k, v = tensors(1, 2, 2, 2, 7, 16)
    got = partial_attention(q, k, v[..., :6], scale=0.25)
    assert got[0].shape == (1, 4, 2, 6)
    assert_near(got, attention_by_hand(q, k, v[..., :6], 0.25))


@pytest.mark.parametrize("shape", [(9,), (2, 1, 1, 9), (1, 1, 3, 9), (2, 2, 1, 9), (2, 8, 3, 9)])
def test_masks_broadcast_and_count_by_query_head_or_kv_head(shape):
    q, k, v = tensors(2, 2, 4, 3, 9, 8)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
    full = mask[(None,) * (4 - len(shape))]
    per_head = {1: lambda _h: 0, 2: lambda h: h // 4, 8: lambda h: h}[full.shape[1]]

    def attends(b, h, i, t):
        return bool(full[b % full.shape[0], per_head(h), i % full.shape[2], t])

    assert_near(partial_attention(q, k, v, scale=0.3, mask=mask), attention_by_hand(q, k, v, 0.3, attends))


def test_a_query_that_sees_nothing_gets_zero_and_minus_infinity():
    q, k, v = tensors(2, 1, 4, 1, 5, 8)
    mask = torch.tensor([True, False])[:, None, None, None].expand(2, 1, 1, 5)
    out, lse = partial_attention(q, k, v, scale=1.0, mask=mask)
    assert torch.equal(out[1], torch.zeros(4, 1, 8))
    assert torch.equal(lse[1], torch.full((4, 1), -torch.inf))
    assert_near((out, lse), attention_by_hand(q, k, v, 1.0, lambda b, _h, _i, _t: b == 0))


def test_no_keys_at_all_is_a_part_without_weight():
    q, k, v = tensors(1, 2, 2, 1, 0, 8)
    out, lse = partial_attention(q, k, v, scale=1.0)
    assert torch.equal(out, torch.zeros(1, 4, 1, 8))
    assert torch.equal(lse, torch.full((1, 4, 1), -torch.inf))


def test_rows_that_nobody_sees_may_hold_nan():
    q, k, v = tensors(1, 2, 4, 2, 8, 8)
    mask = torch.arange(8) < 5
    clean = partial_attention(q, k, v, scale=0.5, mask=mask)
    k[:, :, 5:], v[:, :, 5:] = torch.nan, torch.nan
    for got, wanted in zip(partial_attention(q, k, v, scale=0.5, mask=mask), clean, strict=True):
        assert torch.equal(got, wanted)


def test_causal_new_tokens_are_the_last_ones():
    q, k, v = tensors(1, 2, 2, 4, 10, 8)
    wanted = attention_by_hand(q, k, v, 0.4, lambda _b, _h, i, t: t <= 6 + i)  # query 0 is key 10 - 4
    assert_near(partial_attention(q, k, v, scale=0.4, causal=True), wanted)
    assert_near(partial_attention(q, k, v, scale=0.4, mask=causal_mask(4, 10)), wanted)
    padded = torch.arange(10) >= 3
    wanted = attention_by_hand(q, k, v, 0.4, lambda _b, _h, i, t: 3 <= t <= 6 + i)
    assert_near(partial_attention(q, k, v, scale=0.4, causal=True, mask=padded), wanted)


def test_attention_at_ids_reads_those_rows_only():
    q, k, v = tensors(2, 2, 4, 1, 12, 8)
    ids = torch.tensor([[[3, 7, -1, 11], [0, -1, -1, -1]], [[-1, -1, -1, -1], [5, 4, 9, 1]]])
    named = [[set(row.tolist()) - {-1} for row in heads] for heads in ids]
    wanted = attention_by_hand(q, k, v, 0.35, lambda b, h, _i, t: t in named[b][h // 4])
    for b in range(2):
        for h in range(2):
            for t in set(range(12)) - named[b][h] - {0}:  # row 0 may be read in place of -1, and then it is dropped
                k[b, h, t], v[b, h, t] = torch.nan, torch.nan
    assert_near(partial_attention_at(q, k, v, ids, scale=0.35), wanted)
    assert_near(partial_attention_at(q, k, v, ids.int(), scale=0.35), wanted)


def test_a_row_named_twice_counts_twice():
    q, k, v = tensors(1, 1, 1, 1, 3, 8)
    _, once = partial_attention_at(q, k, v, torch.tensor([[[2]]]), scale=1.0)
    _, twice = partial_attention_at(q, k, v, torch.tensor([[[2, 2]]]), scale=1.0)
    assert float(twice - once) == pytest.approx(math.log(2), abs=1e-6)


@given(
    st.sampled_from([1, 4, 8]),
    st.lists(st.integers(0, 9), min_size=1, max_size=4),
    st.integers(0, 2**31),
)
def test_merged_parts_equal_one_softmax(group, lengths, seed):
    """Whatever the split, empty parts included, and with logits up to 200 on both sides."""
    tokens = sum(lengths)
    q, k, v = tensors(1, 2, group, 1, tokens, 8, seed=seed)
    if tokens:
        q = q * (200 / (q.abs().amax() * k.abs().amax() * 8))  # no product can exceed 200
    parts, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        parts.append(partial_attention(q, k[:, :, part], v[:, :, part], scale=1.0))
        start += length
    whole, _ = attention_by_hand(q, k, v, 1.0)
    torch.testing.assert_close(merge(parts).double(), whole, atol=1e-4, rtol=1e-4)


def test_extreme_logits_neither_overflow_nor_vanish():
    # Logits of +200, -200 and 0 in three parts: the first outweighs the others by e^200.
    q = torch.ones(1, 1, 1, 1)
    parts = [
        partial_attention(q, torch.full((1, 1, 1, 1), logit), torch.full((1, 1, 1, 1), value), scale=1.0)
        for logit, value in ((200.0, 1.0), (-200.0, 5.0), (0.0, 7.0))
    ]
    assert merge(parts).item() == 1.0
    assert merge(parts[1:2] * 2).item() == 5.0


def test_sinks_take_weight_and_give_no_value():
    # One key of logit 0 beside a sink of logit ln 3: the key keeps 1 / (1 + 3).
    q, k, v = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2), torch.full((1, 1, 1, 2), 8.0)
    part = partial_attention(q, k, v, scale=1.0)
    torch.testing.assert_close(merge([part], torch.tensor([math.log(3)])), torch.full((1, 1, 1, 2), 2.0))
    q, k, v = tensors(2, 2, 4, 2, 9, 8)
    sinks = torch.linspace(-3, 3, 8)
    halves = [partial_attention(q, k[:, :, part], v[:, :, part], scale=0.5) for part in (slice(4), slice(4, 9))]
    wanted, _ = attention_by_hand(q, k, v, 0.5, sinks=sinks)
    torch.testing.assert_close(merge(halves, sinks).double(), wanted, atol=1e-5, rtol=1e-5)


def test_parts_without_weight_are_ignored_and_nothing_at_all_is_zero():
    q, k, v = tensors(1, 1, 2, 1, 4, 8)
    some = partial_attention(q, k, v, scale=1.0)
    nothing = partial_attention(q, k, v, scale=1.0, mask=torch.zeros(4, dtype=torch.bool))
    torch.testing.assert_close(merge([nothing, some, nothing]), some[0])
    assert torch.equal(merge([nothing, nothing]), torch.zeros(1, 2, 1, 8))
    assert torch.equal(merge([nothing], torch.tensor([1.0, -torch.inf])), torch.zeros(1, 2, 1, 8))


def test_16_bit_inputs_are_summed_in_fp32():
    q, k, v = (x.bfloat16() for x in tensors(1, 2, 4, 1, 300, 64))
    assert_near(partial_attention(q, k, v, scale=0.125), attention_by_hand(q, k, v, 0.125))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 3, 1, 8)}, "3 query heads are not a multiple of 2 KV heads"),
        ({"q": torch.zeros(1, 4, 1, 4)}, "q has head_dim 4 and k has 8"),
        ({"v": torch.zeros(1, 2, 6, 8)}, "of the same batch"),
        ({"v": torch.zeros(1, 2, 5, 8).bfloat16()}, "one dtype"),
        ({"softcap": 0.0}, "softcap=0.0 must be positive"),
        ({"mask": torch.zeros(5)}, "pass bool, True = attend"),
        ({"mask": torch.zeros(1, 3, 1, 5).bool()}, r"does not broadcast to \(1, 4 or 2, 1, 5\)"),
        ({"q": torch.zeros(1, 4, 6, 8), "causal": True}, "6 causal new tokens need to be among the keys"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    call = {"q": torch.zeros(1, 4, 1, 8), "k": torch.zeros(1, 2, 5, 8), "v": torch.zeros(1, 2, 5, 8)} | change
    with pytest.raises(ValueError, match=message):
        partial_attention(call.pop("q"), call.pop("k"), call.pop("v"), scale=1.0, **call)


def test_parts_and_ids_that_do_not_fit_are_refused():
    q, k, v = tensors(1, 2, 2, 1, 5, 8)
    part = partial_attention(q, k, v, scale=1.0)
    with pytest.raises(ValueError, match="at least one"):
        merge([])
    with pytest.raises(ValueError, match="must have one shape"):
        merge([part, (part[0][:, :1], part[1][:, :1])])
    with pytest.raises(ValueError, match=r"must be \(heads,\) = \(4,\)"):
        merge([part], torch.zeros(2))
    with pytest.raises(ValueError, match=r"must be \(batch, kv_heads, n\)"):
        partial_attention_at(q, k, v, torch.zeros(1, 4, 3, dtype=torch.int64), scale=1.0)
