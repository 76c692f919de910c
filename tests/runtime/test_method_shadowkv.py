"""ShadowKV inside the runtime against a float64 oracle that selects and attends token by token."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from one_layer import OneLayer, angles, attention, drawn, turned  # noqa: E402

from policies import ShadowKV, parse_policy  # noqa: E402
from runtime import offload  # noqa: E402

DIM, CHUNK = 8, 4
# Eight chunks at 48 tokens: three are selected, two can hold sinks and two are outliers.
POLICY = ShadowKV(chunk_tokens=CHUNK, budget_tokens=3 * CHUNK, rank=6, outlier_chunks=2, sink_tokens=3)


def layer(policy, heads, kv_heads, prompt, steps, *, pads=None, seed=0, rows=1, scale=2.0, **options):
    """The layer, and its keys before their rotation; queries and keys are large enough for attention to be uneven."""
    rows = len(pads) if pads else rows
    q, before, v = drawn(rows, heads, kv_heads, prompt + steps, DIM, seed)
    before = before * scale
    k = turned(before, angles(pads or [0] * rows, prompt + steps, DIM)).float()
    return OneLayer(policy, q * scale, k, v, prompt=prompt, pads=pads, **options), before


class Oracle:
    """One row of the batch, token by token and in fp64: what is kept, what a step selects, and its output."""

    def __init__(self, one, before, row):
        self.one, self.row, self.policy = one, row, one.policy
        self.pad = 0 if one.seen is None else int((~one.seen[row]).sum())
        self.c = one.policy.chunk_tokens
        self.chunks = one.policy.chunks(one.prompt)
        self.kv_heads, self.group = one.k.shape[1], one.q.shape[1] // one.k.shape[1]
        self.k, self.v, self.q = one.k[row].double(), one.v[row].double(), one.q[row].double()
        self.rebuilt = self._low_rank(before)
        self.landmarks = [{c: self._mean(h, c) for c in self._real_chunks()} for h in range(self.kv_heads)]
        self.outliers = [self._worst(h) for h in range(self.kv_heads)]
        chosen = [self.select(h, one.prompt - 1) for h in range(self.kv_heads)]
        self.slots = [dict.fromkeys(ids, "exact") for ids in chosen]

    def _real(self, chunk):
        return [t for t in range(chunk * self.c, (chunk + 1) * self.c) if t >= self.pad]

    def _real_chunks(self):
        return [c for c in range(self.chunks) if self._real(c)]

    def _mean(self, h, chunk):
        return self.k[h, self._real(chunk)].mean(0)

    def _worst(self, h):
        def least(c):
            mean = self.landmarks[h][c]
            return min(float(key @ mean / (key.norm() * mean.norm())) for key in self.k[h, self._real(c)])

        sinks = {t // self.c for t in range(self.pad, min(self.one.prompt, self.pad + self.policy.sink_tokens))}
        return sorted(self._real_chunks(), key=lambda c: (c not in sinks, least(c), c))[: self.policy.exact_chunks]

    def _low_rank(self, before):
        """The best product of the policy's rank, by a singular value decomposition, turned to the keys' positions."""
        prompt = before[self.row, :, : self.one.prompt].double().clone()
        prompt[:, : self.pad] = 0
        u, s, vh = torch.linalg.svd(prompt.transpose(0, 1).flatten(1), full_matrices=False)
        rank = self.policy.rank
        low = (u[:, :rank] * s[:rank] @ vh[:rank]).unflatten(1, (self.kv_heads, DIM)).transpose(0, 1)
        return turned(low[None], angles([self.pad], self.one.prompt, DIM))[0]

    def select(self, h, token):
        index = [c for c in self._real_chunks() if c not in self.outliers[h]]
        if not index:
            return []
        marks = torch.stack([self.landmarks[h][c] for c in index])
        members = range(h * self.group, (h + 1) * self.group)
        score = torch.stack([torch.softmax(marks @ self.q[m, token] * DIM**-0.5, 0) for m in members]).amax(0)
        order = sorted(range(len(index)), key=lambda i: (-float(score[i]), index[i]))
        return sorted(index[i] for i in order[: self.policy.budget_chunks])

    def decode(self, token):
        """Output (heads, head_dim) and misses of each KV head."""
        out, misses = torch.zeros(len(self.q), DIM, dtype=torch.float64), []
        for h in range(self.kv_heads):
            chosen = self.select(h, token)
            misses.append(len(set(chosen) - set(self.slots[h])))
            self.slots[h] = {c: self.slots[h].get(c, "rebuilt") for c in chosen}
            tail = range(max(self.pad, self.chunks * self.c), token + 1)
            exact = [t for c in self.outliers[h] for t in self._real(c)] + list(tail)
            keys, values = [self.k[h, exact]], [self.v[h, exact]]
            for c, how in self.slots[h].items():
                keys.append((self.k if how == "exact" else self.rebuilt)[h, self._real(c)])
                values.append(self.v[h, self._real(c)])
            for m in range(h * self.group, (h + 1) * self.group):
                sink = None if self.one.sinks is None else self.one.sinks[m]
                out[m] = attention(self.q[m, token], torch.cat(keys), torch.cat(values), self.one.softcap, sink)
        return out, misses


def follow(one, before):
    """Run all steps and compare each with the oracle: outputs, misses and what the slots hold."""
    oracles = [Oracle(one, before, row) for row in range(one.batch)]
    one.prefill()
    missed = 0
    for past, call in one.decode():
        for row, oracle in enumerate(oracles):
            out, misses = oracle.decode(past)
            assert call.counts["miss"][row].tolist() == misses
            held = [sorted(c for c in ids if c >= 0) for ids in call.state["slot_ids"][row].tolist()]
            assert held == [sorted(slots) for slots in oracle.slots]
            torch.testing.assert_close(call.out[row, :, 0].double(), out, atol=2e-5, rtol=0)
            missed += sum(misses)
    return missed


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2), (8, 1)])
@pytest.mark.parametrize("prompt", [48, 49, 51, 79, 80])
def test_decode_follows_the_oracle(heads, kv_heads, prompt):
    one, before = layer(POLICY, heads, kv_heads, prompt, 12, seed=prompt + heads)
    assert follow(one, before) > 0


# Padding of whole chunks, of a part of one, of all but the tail (48 tokens have 32 in chunks), and of all but a token.
@pytest.mark.parametrize(("prompt", "pads"), [(48, (0, 4, 13, 30)), (51, (1, 35, 50)), (80, (9, 24, 63))])
def test_padding_is_never_chosen_nor_attended(prompt, pads):
    one, before = layer(POLICY, 4, 2, prompt, 8, pads=pads, seed=prompt)
    one.k[:, :, :prompt].masked_fill_(~one.seen[:, None, :prompt, None], float("nan"))  # would spread if it counted
    one.v[:, :, :prompt].masked_fill_(~one.seen[:, None, :prompt, None], float("nan"))
    follow(one, before)


@pytest.mark.parametrize(
    ("softcap", "sinks"), [(3.0, None), (None, torch.tensor([0.5, -2.0, 4.0, 1.0])), (5.0, torch.ones(4))]
)
def test_softcap_and_sinks(softcap, sinks):
    one, before = layer(POLICY, 4, 2, 60, 6, pads=(0, 7), seed=5, softcap=softcap, sinks=sinks)
    follow(one, before)


def test_no_outliers_and_generation_beyond_any_buffer_of_the_authors():
    """Their cache ends after 128 generated tokens."""
    policy = ShadowKV(chunk_tokens=CHUNK, budget_tokens=3 * CHUNK, rank=5, outlier_chunks=0, sink_tokens=0)
    one, before = layer(policy, 4, 1, 64, 150, seed=6)
    assert follow(one, before) > 100


def test_a_prompt_in_chunks_leaves_the_same_state():
    whole, _ = layer(POLICY, 4, 2, 61, 3, pads=(0, 9), seed=7)
    pieces, _ = layer(POLICY, 4, 2, 61, 3, pads=(0, 9), seed=7, chunked=True)
    last = whole.prefill().out[:, :, -5:]
    torch.testing.assert_close(pieces.prefill(20, 1, 35, 5).out, last, atol=1e-6, rtol=0)
    for name in (
        "u",
        "sv",
        "landmarks",
        "chunk_ids",
        "k_exact",
        "v_exact",
        "k_slots",
        "v_slots",
        "slot_ids",
        "values_host",
    ):
        assert torch.equal(pieces.arena.kept(0)[name], whole.arena.kept(0)[name]), name
    for (_, one), (_, other) in zip(whole.decode(), pieces.decode(), strict=True):
        assert torch.equal(one.out, other.out)


def covering(rank, seed):
    """A layer whose budget covers every real chunk, since each row has a chunk of padding, with its slots emptied."""
    policy = ShadowKV(chunk_tokens=CHUNK, budget_tokens=7 * CHUNK, rank=rank, outlier_chunks=0, sink_tokens=0)
    one, before = layer(policy, 8, 2, 48, 4, pads=(4, 11), seed=seed)
    one.prefill()
    one.arena.kept(0)["slot_ids"].fill_(-1)
    one.arena.kept(0)["k_slots"].fill_(float("nan"))
    one.arena.kept(0)["v_slots"].fill_(float("nan"))
    return one, before


def full_attention(one, row, token, keys):
    pad, group = int((~one.seen[row]).sum()), one.q.shape[1] // one.k.shape[1]
    return torch.stack(
        [
            attention(one.q[row, m, token], keys[m // group, pad : token + 1], one.v[row, m // group, pad : token + 1])
            for m in range(one.q.shape[1])
        ]
    )


def test_full_rank_and_a_budget_of_everything_is_full_attention():
    """Every key is rebuilt and every value fetched.

    Tolerance: turning back, projecting, multiplying and turning again leave some 8 roundings of 6e-8 on keys of about
    6, logits sum 8 products with queries of about 2, over sqrt(8): 2e-5; outputs of size 1 differ by no more.
    """
    one, _ = covering(rank=2 * DIM, seed=8)
    for past, call in one.decode():
        assert call.counts["miss"].tolist() == ([[7, 7], [6, 6]] if past == 48 else [[0, 0], [0, 0]])
        for row in range(2):
            expected = full_attention(one, row, past, one.k[row])
            torch.testing.assert_close(call.out[row, :, 0].double(), expected, atol=2e-5, rtol=0)


def test_the_error_of_low_rank_alone():
    """All chunks selected and rebuilt: the keys differ from the true ones by the singular values left out."""
    one, before = covering(rank=5, seed=9)
    (past, call), *_ = one.decode()
    for row, pad in enumerate((4, 11)):
        oracle = Oracle(one, before, row)
        keys = one.k[row].double().clone()
        keys[:, :32] = oracle.rebuilt[:, :32]
        torch.testing.assert_close(
            call.out[row, :, 0].double(), full_attention(one, row, past, keys), atol=2e-5, rtol=0
        )
        exact = full_attention(one, row, past, one.k[row])
        assert (call.out[row, :, 0].double() - exact).abs().max() > 0.05
        # Eckart and Young: the squared error over all tokens is the sum of the squares of what is left out.
        prompt = before[row, :, pad:48].double().transpose(0, 1).flatten(1)
        left_out = torch.linalg.svdvals(prompt)[5:].square().sum()
        u, sv = call.state["u"][row].double(), call.state["sv"][row].double()
        low = (u[pad:] @ sv).transpose(0, 1).flatten(1)
        torch.testing.assert_close((low - prompt).square().sum(), left_out, rtol=1e-5, atol=0)


def test_the_error_of_selection_alone():
    """Exact keys, some chunks not selected: full attention is the mixture of what was read and what was not."""
    one, before = layer(POLICY, 4, 2, 80, 1, seed=10)
    one.q[:, :, 80] = one.q[:, :, 79]  # so that the slots, filled for the last query of the prompt, are chosen again
    one.prefill()
    oracle = Oracle(one, before, 0)
    ((past, call),) = one.decode()
    assert call.counts["miss"].tolist() == [[0, 0]]
    for m in range(4):
        h = m // 2
        chunks = [*oracle.slots[h], *oracle.outliers[h]]
        read = sorted({t for c in chunks for t in range(c * CHUNK, (c + 1) * CHUNK)} | set(range(64, 81)))
        unread = [t for t in range(81) if t not in read]
        q, k, v = one.q[0, m, past], one.k[0, h], one.v[0, h]
        mass = torch.softmax(k.double() @ q.double() * DIM**-0.5, 0)[read].sum()
        mixture = mass * call.out[0, m, 0].double() + (1 - mass) * attention(q, k[unread], v[unread])
        torch.testing.assert_close(mixture, attention(q, k, v), atol=1e-5, rtol=0)
        assert mass < 0.99


@pytest.mark.parametrize("outliers", [0, 2])
def test_a_planted_needle_is_read(outliers):
    """One key along the query among others that are not: by its landmark or as an outlier, at every place tried."""
    policy = ShadowKV(chunk_tokens=CHUNK, budget_tokens=4 * CHUNK, rank=16, outlier_chunks=outliers, sink_tokens=0)
    places = [0, 3, 17, 30, 63, 64, 101, 126, 127]
    for place in places:
        one, _ = layer(policy, 4, 2, 144, 1, seed=11 + place, scale=1.0)
        for m in range(4):
            one.q[0, m, 144] = one.q[0, 0, 144] / one.q[0, 0, 144].norm() * 4
        one.k[0, :, place] = one.q[0, 0, 144] * 2.5  # its logit is 40 / sqrt(8) = 14
        one.prefill()
        ((past, call),) = one.decode()
        for m in range(4):
            expected = attention(one.q[0, m, past], one.k[0, m // 2], one.v[0, m // 2])
            assert (expected - one.v[0, m // 2, place].double()).abs().max() < 0.1
            torch.testing.assert_close(call.out[0, m, 0].double(), expected, atol=0.1, rtol=0)


def tiny(**options):
    config = transformers.LlamaConfig(
        vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, eos_token_id=None, **options,
    )  # fmt: skip
    torch.manual_seed(12)
    return transformers.AutoModelForCausalLM.from_config(config).eval().float()


def padded(rows, tokens, pads):
    ids = torch.randint(3, 101, (rows, tokens), generator=torch.Generator().manual_seed(13))
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        ids[row, :pad], mask[row, :pad] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def test_a_later_turn_is_decoded_token_by_token():
    """Feeding several tokens at once to a built cache gives the logits of feeding them one by one."""
    model, inputs = tiny(), padded(2, 70, (0, 6))
    more = torch.randint(3, 101, (2, 9), generator=torch.Generator().manual_seed(14))
    policy = parse_policy("shadowkv:chunk_tokens=4,budget_tokens=16,rank=8,outlier_chunks=2")
    logits = []
    with torch.no_grad(), offload(model, policy, max_new_tokens=32) as kv:
        for sizes in ((9,), (1,) * 9):
            cache, mask, past = kv.cache(), inputs["attention_mask"], 0
            model(**inputs, past_key_values=cache)
            parts = []
            for size in sizes:
                mask = torch.cat([mask, mask.new_ones(2, size)], dim=1)
                ids = more[:, past : past + size]
                position = mask.cumsum(1)[:, -size:] - 1
                parts.append(
                    model(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache).logits
                )
                past += size
            logits.append(torch.cat(parts, dim=1))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=0)


def test_a_row_generates_what_it_generates_alone():
    """Padding of a multiple of 32 tokens (eight chunks) leaves the chunks of a row what they are without it."""
    model, inputs = tiny(), padded(2, 144, (0, 32))
    policy = parse_policy("shadowkv:chunk_tokens=4,budget_tokens=32,rank=12,outlier_chunks=3")
    options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    with torch.no_grad(), offload(model, policy, max_new_tokens=64) as kv:
        together = model.generate(**inputs, past_key_values=kv.cache(), **options)
        alone = {name: tensor[1:, 32:] for name, tensor in inputs.items()}
        assert torch.equal(model.generate(**alone, past_key_values=kv.cache(), **options)[0], together[1, 32:])
