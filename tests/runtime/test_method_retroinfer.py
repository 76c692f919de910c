"""RetroInfer inside the runtime against a float64 oracle that clusters, ranks, caches and attends one by one."""

from collections import Counter

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from one_layer import OneLayer, attention, drawn  # noqa: E402

from kvsim.plans.replay import replay_held_bytes, replay_moved_bytes  # noqa: E402
from policies import RetroInfer, parse_policy  # noqa: E402
from policies.plan import Tier  # noqa: E402
from runtime import offload  # noqa: E402

DIM = 8
# A prompt of 100 tokens has 24 clusters of some 4: 3 are read, 5 estimated. Every 8 generated tokens make 2 more.
POLICY = RetroInfer(
    sink_tokens=3, window_tokens=6, cluster_tokens=4, block_tokens=3, segment_tokens=45, retrieval=0.12,
    estimation=0.2, kmeans_iterations=4, update_tokens=8,
)  # fmt: skip


def layer(policy, heads, kv_heads, prompt, steps, *, pads=None, seed=0, scale=2.0, **options):
    """Queries and keys large enough for attention to be uneven."""
    q, k, v = drawn(len(pads or [0]), heads, kv_heads, prompt + steps, DIM, seed)
    return OneLayer(policy, q * scale, k * scale, v, prompt=prompt, pads=pads, **options)


def authors_clusters(prompt, policy):
    """Clusters of a prompt and segments that it is cut in, by trial."""
    segments = max(1, int(prompt / policy.segment_tokens + 0.5))
    unit = next(u for u in range(8, 8 * segments + 1, 8) if u % segments == 0)
    size = policy.cluster_tokens
    return min(range(unit, prompt + 2 * unit, unit), key=lambda n: (abs(size * n - prompt), n)), segments


def unit(vector):
    return vector / vector.norm() if vector.norm() > 0 else vector


class Oracle:
    """One row of the batch and one KV head, in fp64: its clusters, its cache of blocks, what a step reads."""

    def __init__(self, one, row, head):
        self.one, self.policy, self.row = one, one.policy, row
        self.pad = 0 if one.seen is None else int((~one.seen[row]).sum())
        group = one.q.shape[1] // one.k.shape[1]
        self.members = range(head * group, (head + 1) * group)
        self.q, self.k, self.v = one.q[row].double(), one.k[row, head].double(), one.v[row, head].double()
        self.sinks = list(range(self.pad, min(one.prompt, self.pad + self.policy.sink_tokens)))
        first, end = self.policy.sink_tokens, one.prompt - self.policy.window_tokens
        clusters, self.segments = authors_clusters(one.prompt, self.policy)
        self.clusters = self.cluster(range(first, end), clusters, self.segments)
        self.near = [t for t in range(end, one.prompt) if self.real(t)]
        self.pending = self.policy.window_tokens  # tokens of the ring, padding included
        self.retrieved = max(1, int(clusters * self.policy.retrieval + 0.5))
        self.estimated = min(int(clusters * self.policy.estimation + 0.5), clusters - self.retrieved)
        self.slots = []  # (block, step at which it was last read)
        self.exceeded = 0  # clusters for which the cache had no room

    def real(self, token):
        return token >= self.pad and token not in self.sinks

    def cluster(self, tokens, number, segments):
        """Lists of tokens, empty ones included."""
        tokens, n = list(tokens), len(tokens)
        real = [t for t in tokens if self.real(t)]
        mean = self.k[real].mean(0) if real else 0
        at = [tokens[j * n // number] for j in range(number)]
        units = [unit(self.k[t] - mean) if self.real(t) else None for t in at]
        each = number // segments

        def nearest(token, among):
            known = [j for j in among if units[j] is not None] or [among[0]]
            return max(
                known, key=lambda j: (float(units[j] @ (self.k[token] - mean)) if units[j] is not None else 0, -j)
            )

        for s in range(segments):
            among = range(s * each, (s + 1) * each)
            own = [t for t in tokens[s * each * n // number : (s + 1) * each * n // number] if self.real(t)]
            for _ in range(self.policy.kmeans_iterations - 1):
                of = {t: nearest(t, among) for t in own}
                for j in among:
                    if inside := [t for t in own if of[t] == j]:
                        units[j] = unit((self.k[inside] - mean).mean(0))
        last = {t: nearest(t, range(number)) for t in real}
        return [[t for t in real if last[t] == j] for j in range(number)]

    def decode(self, token):
        """Outputs of the group's heads, and the blocks read and missed."""
        self.near.append(token)
        self.pending += 1
        filled = [j for j, inside in enumerate(self.clusters) if inside]
        means = {j: self.k[self.clusters[j]].mean(0) for j in filled}
        logits = {m: {j: self.logit(m, token, means[j]) for j in filled} for m in self.members}
        score = dict.fromkeys(filled, 0.0)
        for of in logits.values():
            total = torch.logsumexp(torch.tensor(list(of.values()), dtype=torch.float64), 0)
            for j in filled:
                score[j] += float(torch.exp(of[j] - total))
        ranked = sorted(filled, key=lambda j: (-score[j], j))
        read, blocks, estimated = [], [], ranked[self.retrieved : self.retrieved + self.estimated]
        full = False
        for j in ranked[: self.retrieved]:
            more = [(j, i) for i in range(-(-len(self.clusters[j]) // self.policy.block_tokens))]
            full = full or len(blocks) + len(more) > self.room()
            if full:
                estimated.append(j)
                self.exceeded += 1
            else:
                read.append(j)
                blocks += more
        missed = self.read(blocks, token)
        exact = self.sinks + self.near + [t for j in read for t in self.clusters[j]]
        out = []
        for m in self.members:
            weights = [torch.exp(self.logit(m, token, self.k[t])) for t in exact]
            total, mixed = sum(weights), sum(w * self.v[t] for w, t in zip(weights, exact, strict=True))
            for j in estimated:
                weight = torch.exp(logits[m][j])
                total = total + weight * len(self.clusters[j])
                mixed = mixed + weight * self.v[self.clusters[j]].sum(0)
            if self.one.sinks is not None:
                total = total + torch.exp(self.one.sinks[m].double())
            out.append(mixed / total)
        if self.pending == self.policy.window_tokens + self.policy.update_tokens:
            self.update(token)
        return torch.stack(out), len(blocks), missed

    def logit(self, m, token, key):
        value = key @ self.q[m, token] * DIM**-0.5
        return value if self.one.softcap is None else self.one.softcap * torch.tanh(value / self.one.softcap)

    def room(self):
        return 3 * self.retrieved * -(-self.policy.cluster_tokens // self.policy.block_tokens)

    def read(self, blocks, now):
        """Blocks that were in no slot; they take an empty one, or that of the block which was read longest ago."""
        while len(self.slots) < self.one.arena.kept(0)["resident"].shape[1] // self.one.k.shape[1]:
            self.slots.append((None, 0))
        held = {block: i for i, (block, _) in enumerate(self.slots)}
        missed = [block for block in blocks if block not in held]
        for block in blocks:
            if block in held:
                self.slots[held[block]] = (block, now)
        for block in missed:
            oldest = min(range(len(self.slots)), key=lambda i: (self.slots[i][1], i))
            self.slots[oldest] = (block, now)
        return len(missed)

    def update(self, token):
        """All but the last window's worth of tokens become clusters."""
        update = self.policy.update_tokens
        leaving = range(token + 1 - self.policy.window_tokens - update, token + 1 - self.policy.window_tokens)
        added = update // self.policy.cluster_tokens
        self.clusters += self.cluster(leaving, added, 1)
        self.near = [t for t in self.near if t not in leaving]
        self.pending -= update
        self.retrieved += max(1, int(added * self.policy.retrieval + 0.5))
        self.estimated += int(added * self.policy.estimation + 0.5)


def follow(one):
    """Run all steps and compare each with the oracle: outputs, blocks read and missed; totals of these, and of clusters
    that were estimated for want of room.
    """
    one.prefill()
    oracles = [[Oracle(one, row, head) for head in range(one.k.shape[1])] for row in range(one.batch)]
    totals = Counter()
    for past, call in one.decode():
        for row, heads in enumerate(oracles):
            found = [oracle.decode(past) for oracle in heads]
            torch.testing.assert_close(
                call.out[row, :, 0].double(), torch.cat([out for out, _, _ in found]), atol=2e-5, rtol=0
            )
            assert call.counts["read"][row].tolist() == [read for _, read, _ in found]
            assert call.counts["miss"][row].tolist() == [missed for _, _, missed in found]
            totals.update(read=sum(read for _, read, _ in found), miss=sum(missed for _, _, missed in found))
    totals["exceeded"] = sum(oracle.exceeded for heads in oracles for oracle in heads)
    return totals


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2), (4, 1)])
@pytest.mark.parametrize("prompt", [100, 101, 143])
def test_every_step_is_that_of_the_oracle(heads, kv_heads, prompt):
    """Three times tokens that gathered are clustered, and the ring of exact rows comes round."""
    one = layer(POLICY, heads, kv_heads, prompt, 29, seed=prompt + heads)
    found = follow(one)
    assert 0 < found["miss"] < found["read"]
    assert found["exceeded"] == 0


# A part of a window is padding, sinks reach into the window, and all but a token is padding.
@pytest.mark.parametrize("pads", [(0, 5, 40), (1, 91, 96), (2, 93, 99)])
def test_padding_is_in_no_cluster_and_never_attended(pads):
    one = layer(POLICY, 4, 2, 100, 27, pads=pads, seed=sum(pads))
    one.k[:, :, :100].masked_fill_(~one.seen[:, None, :100, None], float("nan"))  # would spread if it counted
    one.v[:, :, :100].masked_fill_(~one.seen[:, None, :100, None], float("nan"))
    follow(one)


@pytest.mark.parametrize(
    ("softcap", "sinks"), [(3.0, None), (None, torch.tensor([0.5, -2.0, 4.0, 1.0])), (5.0, torch.ones(4))]
)
def test_softcap_and_sinks(softcap, sinks):
    follow(layer(POLICY, 4, 2, 100, 10, pads=(0, 7), seed=5, softcap=softcap, sinks=sinks))


@pytest.mark.parametrize(
    "text",
    [
        "sink_tokens=0,window_tokens=0,cluster_tokens=4,update_tokens=4,retrieval=0.2,estimation=0.5",
        "cluster_tokens=1,block_tokens=4,update_tokens=3,retrieval=0.1,estimation=0.3",  # more clusters than keys
        "window_tokens=5,cluster_tokens=8,block_tokens=8,update_tokens=8,retrieval=0.1,kmeans_iterations=1",
        "window_tokens=5,cluster_tokens=16,block_tokens=1,update_tokens=16,retrieval=0.3,estimation=0",
    ],
)
def test_other_parameters(text):
    follow(layer(parse_policy(f"retroinfer:segment_tokens=60,{text}"), 4, 2, 100, 20, pads=(0, 9), seed=6))


@pytest.mark.parametrize("estimation", [0, 0.2])
def test_what_exceeds_the_cache_is_estimated(estimation):
    """Keys that are alike fill one cluster, which has more blocks than the cache."""
    policy = RetroInfer(
        sink_tokens=0, window_tokens=4, cluster_tokens=4, block_tokens=2, retrieval=0.05, estimation=estimation,
        update_tokens=8,
    )  # fmt: skip
    one = layer(policy, 2, 1, 100, 6, seed=7)
    one.k[:, :, 20:80] = one.k[:, :, 20:21]
    one.q[:, :] = one.k[:, :, 20:21] * 0.3 + one.q * 0.05
    assert follow(one)["exceeded"] > 0


def everything(block_tokens=4, **options):
    return RetroInfer(
        sink_tokens=2, window_tokens=4, cluster_tokens=4, block_tokens=block_tokens, retrieval=1.0, estimation=0.0,
        update_tokens=8, **options,
    )  # fmt: skip


@pytest.mark.parametrize("block_tokens", [1, 3, 4, 5])
@pytest.mark.parametrize("pads", [None, (0, 13, 60)])
def test_all_clusters_read_is_full_attention(block_tokens, pads):
    one = layer(everything(block_tokens), 4, 2, 90, 30, pads=pads, seed=8)
    one.prefill()
    for past, call in one.decode():
        for row in range(one.batch):
            pad = 0 if pads is None else pads[row]
            for m in range(4):
                k, v = (x[row, m // 2, pad : past + 1] for x in (one.k, one.v))
                expected = attention(one.q[row, m, past], k, v)
                torch.testing.assert_close(call.out[row, m, 0].double(), expected, atol=2e-5, rtol=0)


def test_equal_keys_are_estimated_exactly():
    """Where all keys of a cluster are one, a mean says everything: estimation of all others is full attention."""
    policy = RetroInfer(
        sink_tokens=0, window_tokens=4, cluster_tokens=4, retrieval=0.1, estimation=0.9, update_tokens=8
    )
    one = layer(policy, 4, 2, 84, 4, seed=9)
    places = torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(9)) * 2
    one.k[0, :, :80] = places[:, torch.arange(80) % 5]
    one.prefill()
    for past, call in one.decode():
        for m in range(4):
            expected = attention(one.q[0, m, past], one.k[0, m // 2, : past + 1], one.v[0, m // 2, : past + 1])
            torch.testing.assert_close(call.out[0, m, 0].double(), expected, atol=2e-5, rtol=0)


def test_clusters_lie_side_by_side_in_host_memory():
    """Each token's key and value, once, in the order of clusters; runs of a cluster are as long as it is."""
    one = layer(POLICY, 4, 2, 100, 20, seed=10)
    one.prefill()
    for _ in one.decode():
        pass
    state = one.arena.kept(0)
    host = state["clusters"][0].unflatten(0, (2, -1)).flatten(2)
    for head in range(2):
        oracle = Oracle(one, 0, head)
        for past in range(100, 120):
            oracle.decode(past)
        starts, sizes = state["starts"][0, head].tolist(), state["sizes"][0, head].tolist()
        for start, size, members in zip(starts, sizes, oracle.clusters, strict=True):
            assert size == len(members)
            expected = torch.cat([one.k[0, head, members], one.v[0, head, members]], dim=1)
            assert torch.equal(host[head, start : start + size], expected)
        assert sum(sizes) == 100 - 9 + 16  # all but sinks and window, and two updates


def test_a_prompt_in_chunks_leaves_the_same_state():
    whole = layer(POLICY, 4, 2, 100, 12, pads=(0, 9), seed=11)
    pieces = layer(POLICY, 4, 2, 100, 12, pads=(0, 9), seed=11, chunked=True)
    last = whole.prefill().out[:, :, -5:]
    torch.testing.assert_close(pieces.prefill(40, 1, 54, 5).out, last, atol=1e-6, rtol=0)
    for name, tensor in whole.arena.kept(0).items():
        if not name.startswith("raw"):
            assert torch.equal(pieces.arena.kept(0)[name], tensor), name
    for (_, one), (_, other) in zip(whole.decode(), pieces.decode(), strict=True):
        assert torch.equal(one.out, other.out)


def test_it_is_deterministic():
    outs = []
    for _ in range(2):
        one = layer(POLICY, 8, 2, 143, 20, seed=12)
        one.prefill()
        outs.append(torch.stack([call.out for _, call in one.decode()]))
    assert torch.equal(*outs)


def tiny():
    config = transformers.LlamaConfig(
        vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(12)
    return transformers.AutoModelForCausalLM.from_config(config).eval().float()


def padded(tokens, pads):
    ids = torch.randint(3, 101, (len(pads), tokens), generator=torch.Generator().manual_seed(13))
    mask = (torch.arange(tokens) >= torch.tensor(pads)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


TEXT = "retroinfer:window_tokens=8,cluster_tokens=4,update_tokens=16,retrieval=0.2"


def test_bytes_are_those_of_the_plans_and_of_a_count_by_hand():
    model, prompt, new = tiny(), 90, 40
    policy = parse_policy(TEXT)
    with torch.no_grad(), offload(model, policy, max_new_tokens=new) as kv:
        cache = kv.cache()
        model.generate(**padded(prompt, (0, 5, 57)), past_key_values=cache, max_new_tokens=new, do_sample=False)
        moved, held, recording = +kv.moved_bytes, kv.footprint_bytes, kv.counts
    assert moved == replay_moved_bytes(recording, policy, kv.shape)
    assert held == replay_held_bytes(recording, policy, kv.shape, new)
    # A token's key and value on one KV head of 8 are 64 bytes; 3 sequences, 3 layers, 2 heads. The prompt less 4 sinks
    # and 8 of window goes down, and 16 tokens twice, after 16 and 32 of the 39 tokens that are fed back.
    everywhere = 3 * 3 * 2
    assert moved[Tier.HBM, Tier.DDR] == everywhere * (prompt - 12 + 32) * 64
    assert held[Tier.DDR] == everywhere * (prompt - 12 + 32 + 3) * 64  # a block of 4 may reach 3 rows beyond the last
    read, missed = (int(recording.counts[name].value.sum()) for name in ("read", "miss"))
    assert moved[Tier.DDR, Tier.HBM] == missed * 4 * 64
    assert 0 < missed < read


def test_a_later_turn_is_decoded_token_by_token():
    """Feeding several tokens at once to a built cache gives the logits of feeding them one by one."""
    model, inputs = tiny(), padded(90, (0, 6))
    more = torch.randint(3, 101, (2, 20), generator=torch.Generator().manual_seed(14))
    logits = []
    with torch.no_grad(), offload(model, parse_policy(TEXT), max_new_tokens=32) as kv:
        for sizes in ((20,), (1,) * 20):
            cache, mask, past = kv.cache(), inputs["attention_mask"], 0
            model(**inputs, past_key_values=cache)
            parts = []
            for size in sizes:
                mask = torch.cat([mask, mask.new_ones(2, size)], dim=1)
                ids, position = more[:, past : past + size], mask.cumsum(1)[:, -size:] - 1
                parts.append(
                    model(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache).logits
                )
                past += size
            logits.append(torch.cat(parts, dim=1))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=0)
