"""Squeezed Attention inside the runtime against float64 oracles that score, choose and attend key by key."""

from collections import Counter

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from policies import SqueezedAttention, Step, parse_policy, plan_ends, plan_layer  # noqa: E402
from policies.model import LayerShape, ModelShape  # noqa: E402
from policies.plan import moved_bytes, part_of, stored_bytes  # noqa: E402
from runtime import offload  # noqa: E402
from runtime.arena import Arena  # noqa: E402
from runtime.bound import Bound  # noqa: E402
from runtime.call import Call  # noqa: E402
from runtime.executor import Executor  # noqa: E402
from runtime.methods import method_of  # noqa: E402
from runtime.mover import Mover  # noqa: E402

DIM, LAYERS, WINDOW, SINKS = 8, 2, 6, 3
SCALE = DIM**-0.5


def model(heads, kv_heads, dim=DIM, layers=LAYERS):
    sizes = {"qkv_params": 1, "out_params": 1, "mlp_params": 1, "mlp_active_params": 1}
    layer = LayerShape(kind="full", heads=heads, kv_heads=kv_heads, head_dim=dim, v_head_dim=dim, **sizes)
    return ModelShape(
        name="tiny", hidden_dim=16, vocab_size=8, max_positions=4096, layers=(layer,) * layers, embedding_params=1,
        head_params=1, params=5, dtype="fp32", kv_dtype="fp32",
    )  # fmt: skip


class Run:
    """One batch through executor and arena: q, k, v are (layers, batch, heads, tokens, head_dim), rotated already."""

    def __init__(self, policy, shape, q, k, v, prompt, first=None):
        self.policy, self.shape, self.q, self.k, self.v, self.prompt = policy, shape, q, k, v, prompt
        total, self.batch = q.shape[3], q.shape[1]
        self.first = torch.zeros(self.batch, dtype=torch.int64) if first is None else first
        self.padded = first is not None
        self.arena, self.mover = Arena(torch.device("cpu"), self.batch), Mover()
        self.executor, self.method = Executor(torch.device("cpu"), self.mover), method_of(policy)
        for layer in range(len(q)):
            kept = plan_layer(policy, shape, Step.decoding(prompt, total - prompt), layer).buffers
            self.arena.allocate(layer, kept)

    def prefill(self, chunks):
        """The prompt in chunks of these sizes, and the whole-model work at its end."""
        past = 0
        last = Step(prompt_tokens=self.prompt, past_tokens=self.prompt - chunks[-1], new_tokens=chunks[-1])
        for layer in range(len(self.q)):
            names = set(self.arena.kept(layer))
            buffers = plan_layer(self.policy, self.shape, last, layer).buffers
            self.arena.allocate(layer, [b for b in buffers if b.name not in names or b.ring], passing=True)
        for new in chunks:
            calls = [self.step(layer, past, new) for layer in range(len(self.q))]
            past += new
        for end in plan_ends(self.policy, self.shape, last):
            self.executor.run_end(end.ops, self.method, [calls[i] for i in end.layers])
        return calls

    def step(self, layer, past, new):
        step = Step(prompt_tokens=self.prompt, past_tokens=past, new_tokens=new)
        plan, at = plan_layer(self.policy, self.shape, step, layer), slice(past, past + new)
        mask = (torch.arange(past + new) >= self.first[:, None])[:, None, None] if self.padded else None
        call = Call(
            shape=self.shape.layers[layer], step=step, state=self.arena.tensors(layer, plan.buffers),
            q=self.q[layer, :, :, at], new_k=self.k[layer, :, :, at], new_v=self.v[layer, :, :, at], mask=mask,
            scale=self.q.shape[-1] ** -0.5,
        )  # fmt: skip
        self.executor.run(Bound(plan, self.method, self.arena, layer), call)
        return call


def draw(shape, prompt, steps, batch, seed, size=1.5):
    """Random queries, keys and values of a whole run; queries lean on some directions so that scores differ."""
    generator, layer, total = torch.Generator().manual_seed(seed), shape.layers[0], prompt + steps
    size = {"q": size, "k": size, "v": 1.0}
    return [
        torch.randn(len(shape.layers), batch, heads, total, layer.head_dim, generator=generator) * size[name]
        for name, heads in (("q", layer.heads), ("k", layer.kv_heads), ("v", layer.kv_heads))
    ]


def log_scores(q, centroids, sizes, group_score, keep=None):
    """float64 (kv_heads, clusters): a group's largest or mean weight of a key, in logs; q (heads, head_dim)."""
    group = len(q) // len(centroids)
    out = torch.full(sizes.shape, -torch.inf, dtype=torch.float64)
    for kv, (rows, counts) in enumerate(zip(centroids.double(), sizes.double(), strict=True)):
        counted = counts if keep is None else counts * keep[kv]
        alive = counted > 0
        weights = torch.zeros(group, len(rows), dtype=torch.float64)
        for member, head in enumerate(range(kv * group, (kv + 1) * group)):
            each = (rows @ q[head].double() * SCALE).exp()
            weights[member, alive] = each[alive] / (each * counted).sum()
        out[kv] = (weights.amax(0) if group_score == "max" else weights.mean(0)).log()
    return out


def levels_of(state, row, kv_heads):
    """Centroids, sizes and the label of each key on the fine level and, where there is one, the coarse."""
    fine = state["centroids"][row].unflatten(0, (kv_heads, -1)), state["sizes"][row]
    labels = state["labels"][row].long()
    if "coarse_sizes" not in state:
        return {"fine": (*fine, labels)}
    coarse = state["coarse_centroids"][row].unflatten(0, (kv_heads, -1)), state["coarse_sizes"][row]
    above = state["coarse_labels"][row].long().gather(1, labels.clamp(min=0)).masked_fill(labels < 0, -1)
    return {"fine": (*fine, labels), "coarse": (*coarse, above)}


def key_scores(scores, labels):
    return scores.gather(1, labels.clamp(min=0)).masked_fill(labels < 0, -torch.inf)


def expected_threshold(run, calls, row, level, share):
    """From every key of every layer and head one score, averaged over the real queries of the window."""
    pooled = []
    for layer, call in enumerate(calls):
        centroids, sizes, labels = levels_of(call.state, row, call.shape.kv_heads)[level]
        tokens = [t for t in range(run.prompt - WINDOW, run.prompt) if t >= run.first[row]]
        each = torch.stack(
            [log_scores(run.q[layer, row, :, t], centroids, sizes, run.policy.group_score).exp() for t in tokens]
        )
        pooled.append(key_scores(each.mean(0).log(), labels)[labels >= 0])
    scores = torch.cat(pooled).sort(descending=True).values
    passing = part_of(len(scores), share)
    return -torch.inf if passing == len(scores) else float(scores[passing])


def expected_output(run, layer, row, token, chosen):
    """Exact float64 attention to the chosen keys of the prefix, the window and everything later."""
    q, k, v = (x[layer, row].double() for x in (run.q, run.k, run.v))
    group = len(q) // len(k)
    out = torch.zeros(len(q), q.shape[-1], dtype=torch.float64)
    for head in range(len(q)):
        first, end, sinks = int(run.first[row]), run.prompt - WINDOW, run.policy.sink_tokens
        exact = [*range(first, min(first + sinks, end)), *range(max(first, end), token + 1)]
        kept = [sinks + i for i in torch.nonzero(chosen[head // group]).flatten().tolist()] + exact
        assert len(set(kept)) == len(kept)
        weights = torch.softmax(k[head // group, kept] @ q[head, token] * q.shape[-1] ** -0.5, 0)
        out[head] = weights @ v[head // group, kept]
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (8, 1)])
@pytest.mark.parametrize("chunks", [[90], [50, 37, 3]], ids=["whole", "chunked"])
@pytest.mark.parametrize(
    "text",
    [
        "keep=0.2",
        "keep=0.2,tier=ddr",
        "keep=0.2,group_score=max",
        "keep=0.2,group_score=mean,tier=ddr",
        "keep=0.05,tier=ddr",  # some heads choose more than is staged at once
        "keep=0.3,levels=2,coarse_share=0.06,coarse_keep=0.5",
        "keep=0.3,levels=2,coarse_share=0.06,coarse_keep=0.5,tier=ddr",
        "budget_tokens=11",
        "budget_tokens=11,tier=ddr",
        "budget_tokens=11,levels=2,coarse_share=0.06,coarse_keep=0.5,tier=ddr",
    ],
)
def test_every_step_is_that_of_the_oracle(text, chunks, heads, kv_heads):
    policy = parse_policy(
        f"squeezed-attention:observation_tokens={WINDOW},sink_tokens={SINKS},centroid_share=0.25,{text}"
    )
    assert isinstance(policy, SqueezedAttention)
    shape, steps, first = model(heads, kv_heads), 5, torch.tensor([0, 17])
    run = Run(policy, shape, *draw(shape, sum(chunks), steps, 2, seed=heads), sum(chunks), first)
    calls, end = run.prefill(chunks), sum(chunks) - WINDOW
    for row in range(2):
        for call, keys in zip(calls, run.k[:, row, :, SINKS:end], strict=True):
            check_index(levels_of(call.state, row, kv_heads), keys, int(first[row]))
        for index, level in enumerate(policy.calibrated):
            share = policy.keep if level == "fine" else policy.coarse_keep
            expected = expected_threshold(run, calls, row, level, share)
            got = {float(call.state["thresholds"][row, index, 0]) for call in calls}
            assert len(got) == 1  # one scalar for all layers
            assert got.pop() == pytest.approx(expected, abs=1e-5)
    counts = set()
    for token in range(sum(chunks), sum(chunks) + steps):
        for layer in range(LAYERS):
            call = run.step(layer, token, 1)
            for row in range(2):
                chosen = expected_choice(policy, call, row, run.q[layer, row, :, token])
                listed = call.state["chosen"][row].unflatten(0, (kv_heads, -1))[..., 0]
                for kv in range(kv_heads):
                    ids = listed[kv][listed[kv] >= 0].tolist()
                    assert ids == torch.nonzero(chosen[kv]).flatten().tolist()
                    if policy.budget_tokens is None:
                        assert int(call.counts["keep"][row, kv]) == len(ids)
                        counts.add(len(ids))
                expected = expected_output(run, layer, row, token, chosen)
                assert torch.allclose(call.out[row, :, 0].double(), expected, atol=2e-5)
    if policy.budget_tokens is None:
        assert len(counts) > 3  # selections are ragged
    if text.startswith("keep=0.05"):
        assert max(counts) > 2 * part_of(end - SINKS, 0.05)


def check_index(levels, keys, first):
    """Stored centroids are the means of the original keys below them, on either level; padding is in no cluster."""
    for centroids, sizes, labels in levels.values():
        assert (labels[:, :first] == -1).all()
        assert (labels[:, first:] >= 0).all()
        for kv, of in enumerate(labels):
            for cluster, size in enumerate(sizes[kv].tolist()):
                members = keys[kv][of == cluster].double()
                assert size == len(members)
                mean = members.mean(0) if size else torch.zeros(keys.shape[-1], dtype=torch.float64)
                assert torch.allclose(centroids[kv, cluster].double(), mean, atol=1e-5)


def expected_choice(policy, call, row, q):
    """Bool (kv_heads, keys) from the stored clusters and thresholds."""
    levels = levels_of(call.state, row, call.shape.kv_heads)
    centroids, sizes, labels = levels["fine"]
    alive = None
    if "coarse" in levels:
        coarse_centroids, coarse_sizes, _ = levels["coarse"]
        limit = float(call.state["thresholds"][row, policy.calibrated.index("coarse"), 0])
        passed = log_scores(q, coarse_centroids, coarse_sizes, policy.group_score) > limit
        above = call.state["coarse_labels"][row].long()
        alive = passed.gather(1, above.clamp(min=0)) & (above >= 0)
        assert call.counts["survive"][row].tolist() == alive.sum(1).tolist()
    scores = key_scores(log_scores(q, centroids, sizes, policy.group_score, alive), labels)
    if policy.budget_tokens is None:
        return scores > float(call.state["thresholds"][row, policy.calibrated.index("fine"), 0])
    chosen = torch.zeros(scores.shape, dtype=torch.bool)
    for kv, row_scores in enumerate(scores.tolist()):
        ranked = sorted(range(len(row_scores)), key=lambda t: (-row_scores[t], t))
        for token in ranked[: policy.budget_tokens]:
            chosen[kv, token] = row_scores[token] > -torch.inf
    return chosen


@pytest.mark.parametrize("tier", ["hbm", "ddr"])
def test_waves_and_exact_rows_merge_at_logits_of_200(tier):
    """One softmax in float64, whatever was staged apart."""
    policy = parse_policy(
        f"squeezed-attention:observation_tokens={WINDOW},sink_tokens={SINKS},centroid_share=0.25,keep=0.1,tier={tier}"
    )
    shape, prompt, steps = model(8, 2), 90, 6
    q, k, v = draw(shape, prompt, steps, 1, seed=3, size=8.0)
    run = Run(policy, shape, q, k, v, prompt)
    run.prefill([prompt])
    largest = 0.0
    for token in range(prompt, prompt + steps):
        call = run.step(1, token, 1)
        largest = max(largest, float((k[1, 0, 0, :prompt] @ q[1, 0, :4, token].mT * SCALE).abs().max()))
        listed = call.state["chosen"][0].unflatten(0, (2, -1))[..., 0]
        chosen = torch.zeros(2, prompt - WINDOW - SINKS, dtype=torch.bool)
        for kv in range(2):
            chosen[kv, listed[kv][listed[kv] >= 0].long()] = True
        assert torch.allclose(call.out[0, :, 0].double(), expected_output(run, 1, 0, token, chosen), atol=1e-4)
    assert largest > 100


def test_keys_of_one_direction_stay_together_at_any_length():
    """Keys in a few directions at any length: the clusters are the directions."""
    generator, dim, directions, each = torch.Generator().manual_seed(5), 32, 12, 20
    shape = model(2, 2, dim, layers=1)
    axes = torch.nn.functional.normalize(torch.randn(2, directions, dim, generator=generator), dim=-1)
    which = torch.arange(directions * each) % directions
    lengths = torch.rand(2, directions * each, 1, generator=generator) * 5 + 0.5
    keys = (axes[:, which] + 0.02 * torch.randn(2, directions * each, dim, generator=generator)) * lengths
    prompt = directions * each + WINDOW
    q, k, v = draw(shape, prompt, 1, 1, seed=6)
    k[0, 0, :, : directions * each] = keys
    policy = SqueezedAttention(observation_tokens=WINDOW, centroid_share=0.2, keep=0.1, sink_tokens=0)
    run = Run(policy, shape, q, k, v, prompt)
    (call,) = run.prefill([prompt])
    for labels in call.state["labels"][0]:
        for cluster in labels.unique():
            assert len(which[labels == cluster].unique()) == 1  # no cluster spans two directions


@pytest.mark.parametrize("text", ["keep=0.1", "keep=0.1,levels=2,coarse_share=0.02", "budget_tokens=100,tier=ddr"])
def test_a_key_aligned_with_the_query_is_read(text):
    """One key among a thousand answers the query; its cluster passes wherever it stands, so it gets its weight."""
    dim, prompt = 32, 1000 + WINDOW
    shape = model(4, 2, dim, layers=1)
    policy = parse_policy(f"squeezed-attention:observation_tokens={WINDOW},centroid_share=0.05,sink_tokens=0,{text}")
    for seed in range(10):
        q, k, v = draw(shape, prompt, 1, 1, seed)
        place = int(torch.randint(0, 1000, (1,), generator=torch.Generator().manual_seed(seed)))
        q[0, 0, :, prompt] = q[0, 0, ::2, prompt].repeat_interleave(2, dim=0)  # a group asks for one thing
        k[0, 0, :, place] = q[0, 0, ::2, prompt] * 4
        run = Run(policy, shape, q, k, v, prompt)
        run.prefill([prompt])
        call = run.step(0, prompt, 1)
        listed = call.state["chosen"][0].unflatten(0, (2, -1))[..., 0]
        assert all(place in ids.tolist() for ids in listed)


TINY = {
    "vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(7)
    return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**TINY)).eval().float()


def padded(tokens, pads):
    ids = torch.randint(3, 101, (len(pads), tokens), generator=torch.Generator().manual_seed(8))
    mask = (torch.arange(tokens) >= torch.tensor(pads)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def generate(model, inputs, new=12, **options):
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options)


@pytest.mark.parametrize(
    "text",
    [
        "keep=0.3",
        "keep=0.05,tier=ddr",
        "keep=0.2,levels=2,coarse_share=0.1,tier=ddr",
        "budget_tokens=9,tier=ddr",
        "budget_tokens=9,levels=2,coarse_share=0.1",
    ],
)
def test_bytes_are_those_of_the_plans(llama, text):
    policy, prompt, room = parse_policy(f"squeezed-attention:observation_tokens=4,centroid_share=0.2,{text}"), 60, 40
    with offload(llama, policy, max_new_tokens=room) as kv:
        cache = kv.cache()
        generate(llama, padded(prompt, [0, 5, 57]), past_key_values=cache)
        assert kv.moved_bytes == replayed(kv)
        last = Step.decoding(prompt, room)
        stored = stored_bytes([plan_layer(policy, kv.shape, last, layer).buffers for layer in range(4)])
        assert kv.footprint_bytes == {tier: 3 * nbytes for tier, nbytes in stored.items() if nbytes}


def replayed(kv):
    """The plans of the recorded steps at the recorded counts."""
    moved, recording = Counter(), kv.counts
    for (_, layer, _, *at), totals in zip(recording.steps.tolist(), recording.totals(), strict=True):
        plan = plan_layer(kv.policy, kv.shape, Step(prompt_tokens=at[0], past_tokens=at[1], new_tokens=at[2]), layer)
        moved.update(moved_bytes(plan.ops, plan.buffers, totals))
    return Counter({link: nbytes for link, nbytes in moved.items() if nbytes})


@pytest.mark.parametrize("tier", ["hbm", "ddr"])
def test_a_chunked_prompt_and_a_later_turn_go_on_as_the_whole_does(llama, tier):
    """Chunks leave the same index; the tokens of a later turn are decoded against it, one by one."""
    policy = parse_policy(f"squeezed-attention:observation_tokens=8,centroid_share=0.2,keep=0.2,tier={tier}")
    ids, logits = padded(70, [0])["input_ids"], []
    for sizes in ([60, 1, 1, 1, 7], [20, 25, 13, 2, 3, 7]):
        with offload(llama, policy, max_new_tokens=16) as kv, torch.no_grad():
            cache, past = kv.cache(prompt_tokens=60), 0
            for size in sizes:
                out = llama(input_ids=ids[:, past : past + size], past_key_values=cache).logits
                past += size
            logits.append(out)
            assert cache.get_seq_length() == 70
    assert torch.allclose(*logits, atol=1e-5)
