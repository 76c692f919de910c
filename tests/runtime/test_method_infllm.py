"""InfLLM inside the runtime against a float64 oracle that streams token by token from plain keys."""

from collections import Counter

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from policies import InfLLM, Step, parse_policy, plan_layer  # noqa: E402
from policies.model import LayerShape, ModelShape  # noqa: E402
from policies.plan import Tier, moved_bytes, stored_bytes  # noqa: E402
from runtime import offload  # noqa: E402
from runtime.arena import Arena  # noqa: E402
from runtime.bound import Bound  # noqa: E402
from runtime.call import Call  # noqa: E402
from runtime.executor import Executor  # noqa: E402
from runtime.methods import method_of  # noqa: E402
from runtime.mover import Mover  # noqa: E402
from runtime.rotary import Rotary, Rotation  # noqa: E402

DIM = 8


def model(heads, kv_heads):
    sizes = {"qkv_params": 1, "out_params": 1, "mlp_params": 1, "mlp_active_params": 1}
    layer = LayerShape(kind="full", heads=heads, kv_heads=kv_heads, head_dim=DIM, v_head_dim=DIM, **sizes)
    return ModelShape(
        name="tiny", hidden_dim=16, vocab_size=8, max_positions=512, layers=(layer,), embedding_params=1,
        head_params=1, params=5, dtype="fp32", kv_dtype="fp32",
    )  # fmt: skip


def turned(x, position):
    """x (..., head_dim) rotated to a position, as complex numbers: pairs (i, i + head_dim / 2)."""
    x = torch.as_tensor(x, dtype=torch.float64)
    angle = torch.as_tensor(position, dtype=torch.float64)[..., None] * 10000.0 ** (-torch.arange(0, DIM, 2) / DIM)
    z = torch.complex(x[..., : DIM // 2], x[..., DIM // 2 :]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], dim=-1)


class Oracle:
    """One sequence in float64; its first real token is number `first`, and all before it are padding."""

    def __init__(self, policy, q, k, v, first):
        self.policy, self.first = policy, first
        self.q, self.k, self.v = (x.double() for x in (q, k, v))  # plain, (heads, tokens, head_dim)
        self.group, position = len(q) // len(k), torch.arange(q.shape[1]) - first
        self.q_turned, self.k_turned = turned(q, position), turned(k, position)
        self.mass = torch.zeros(q.shape[:2], dtype=torch.float64)
        self.vectors = []  # of each closed block (heads, head_dim), None where it is all padding
        self.slots = [(None, 0)] * policy.cache_blocks  # block and when it was last chosen

    def block(self, token):
        """The block that a token belongs to once it has closed; None for sinks, in whatever place they lie."""
        if token < self.first + self.policy.sink_tokens:
            return None
        return (token - self.policy.sink_tokens) // self.policy.block_tokens

    def step(self, past, new):
        """Outputs (heads, new_tokens, head_dim) and blocks missed."""
        p, out = self.policy, torch.zeros(len(self.q), new, DIM, dtype=torch.float64)
        queries = range(max(past, self.first), past + new)
        far = {i: turned(self.q[:, i], p.window_tokens - 1) for i in queries}
        chosen = self.lookup(far)
        missed = self.use(chosen, past + new)
        for i in queries:
            near = [j for j in range(self.first, i + 1) if j > i - p.window_tokens]
            distant = [j for j in range(self.first, i - p.window_tokens + 1) if self.reached(j, chosen)]
            for h in range(len(self.q)):
                kv = h // self.group
                logits = [self.k_turned[kv, near] @ self.q_turned[h, i], self.k[kv, distant] @ far[i][h]]
                weights = torch.softmax(torch.cat(logits) * DIM**-0.5, 0)
                out[h, i - past] = weights @ self.v[kv, near + distant]
                self.mass[h, near] += weights[: len(near)]
        self.close(past + new)
        return out, missed

    def reached(self, token, chosen):
        block = self.block(token)
        return block is None or block >= len(self.vectors) or block in chosen

    def lookup(self, far):
        if not far or not self.vectors:
            return []
        mean = torch.stack(list(far.values())).mean(0)
        scores = {b: float((mean * vector).sum()) for b, vector in enumerate(self.vectors) if vector is not None}
        return sorted(sorted(scores, key=lambda b: (-scores[b], b))[: self.policy.top_k])

    def use(self, chosen, now):
        """A cache that gives up the slot used longest ago, the lower of two."""
        missed = [b for b in chosen if b not in [block for block, _ in self.slots]]
        self.slots = [(block, now if block in chosen else last) for block, last in self.slots]
        for block in missed:
            worst = min(range(len(self.slots)), key=lambda slot: (self.slots[slot][1], slot))
            self.slots[worst] = (block, now)
        return len(missed)

    def close(self, tokens):
        p = self.policy
        while p.sink_tokens + (len(self.vectors) + 1) * p.block_tokens <= tokens - p.window_tokens:
            start = p.sink_tokens + len(self.vectors) * p.block_tokens
            real = [j for j in range(start, start + p.block_tokens) if self.block(j) is not None]
            if not real:
                self.vectors.append(None)
                continue
            rows = []
            for h in range(len(self.q)):
                best = sorted(real, key=lambda j: (-float(self.mass[h, j]), j))[: p.representative_tokens]
                rows.append(self.k[h // self.group, best].mean(0))
            self.vectors.append(torch.stack(rows))


class Run:
    """A batch of one layer through executor and arena; q, k, v are plain, (batch, heads, tokens, head_dim)."""

    def __init__(self, policy, shape, q, k, v, prompt, first):
        self.policy, self.shape, self.v, self.prompt, self.first = policy, shape, v, prompt, first
        batch, _, total, _ = q.shape
        position = torch.arange(total) - first[:, None]
        self.q, self.k = (turned(x, position[:, None]).float() for x in (q, k))
        angle = position.clamp(min=0)[..., None].double() * 10000.0 ** (-torch.arange(0, DIM, 2) / DIM)
        self.angles = torch.cat([angle, angle], dim=-1)
        self.rotary = Rotary(total, Rotation())
        self.arena, self.mover = Arena(torch.device("cpu"), batch), Mover()
        self.executor, self.method = Executor(torch.device("cpu"), self.mover), method_of(policy)
        self.arena.allocate(0, plan_layer(policy, shape, Step.decoding(prompt, total - prompt), 0).buffers)

    def step(self, past, new):
        self.rotary.extend(
            self.angles[:, past : past + new].cos().float(), self.angles[:, past : past + new].sin().float()
        )
        step = Step(prompt_tokens=self.prompt, past_tokens=past, new_tokens=new)
        plan, at = plan_layer(self.policy, self.shape, step, 0), slice(past, past + new)
        self.arena.allocate(0, [b for b in plan.buffers if b.ring])
        mask = (torch.arange(past + new) >= self.first[:, None])[:, None, None] if self.first.any() else None
        call = Call(
            shape=self.shape.layers[0], step=step, state=self.arena.tensors(0, plan.buffers), q=self.q[:, :, at],
            new_k=self.k[:, :, at], new_v=self.v[:, :, at], mask=mask, scale=DIM**-0.5, rotary=self.rotary,
        )  # fmt: skip
        self.executor.run(Bound(plan, self.method, self.arena, 0), call)
        return call


def draw(heads, kv_heads, total, batch, seed, size=1.5):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((heads, size), (kv_heads, size), (kv_heads, 1.0))
    return [torch.randn(batch, h, total, DIM, generator=generator) * scale for h, scale in sizes]


SMALL = (
    "sink_tokens=3,window_tokens=10,block_tokens=4,top_k=2,representative_tokens=2,cache_blocks=3,execution_tokens=8"
)
NARROW = (
    "sink_tokens=0,window_tokens=5,block_tokens=3,top_k=2,representative_tokens=3,cache_blocks=2,execution_tokens=9"
)
SINGLE = (
    "sink_tokens=5,window_tokens=4,block_tokens=1,top_k=3,representative_tokens=1,cache_blocks=9,execution_tokens=7"
)
PROMPTS = [10, 13, 16, 17, 18, 41]  # at the window's edge, at window + sinks, when a block closes, before and after


def compare(policy, heads, kv_heads, prompt, steps, first, size, tolerance):
    """Each step of a batch beside each sequence's oracle; returns what was missed, how often and of how many."""
    shape, total = model(heads, kv_heads), prompt + steps
    q, k, v = draw(heads, kv_heads, total, len(first), prompt * heads, size)
    run = Run(policy, shape, q, k, v, prompt, first)
    oracles = [Oracle(policy, q[b], k[b], v[b], int(first[b])) for b in range(len(first))]
    unit, missed = policy.execution_tokens, 0
    spans = [(past, min(unit, prompt - past)) for past in range(0, prompt, unit)]
    for past, new in [*spans, *((prompt + i, 1) for i in range(steps))]:
        call = run.step(past, new)
        for row, oracle in enumerate(oracles):
            expected, misses = oracle.step(past, new)
            real = slice(max(0, oracle.first - past), None)
            assert torch.allclose(call.out[row].double()[:, real], expected[:, real], atol=tolerance)
            if "miss" in call.counts:
                assert int(call.counts["miss"][row]) == misses
            missed += misses
    for row, oracle in enumerate(oracles):  # what the next lookups will go by
        for block, vector in enumerate(oracle.vectors):
            got = call.state["representatives"][row, block].double()
            if vector is not None:
                assert torch.allclose(got, vector, atol=1e-5)
            first_token = policy.sink_tokens + block * policy.block_tokens
            padding = max(0, oracle.first - first_token)
            held = call.state["blocks"][row, block, padding:]
            tokens = slice(first_token + padding, first_token + policy.block_tokens)
            assert torch.allclose(held[:, 0], k[row, :, tokens].transpose(0, 1), atol=1e-5)
            assert torch.equal(held[:, 1], v[row, :, tokens].transpose(0, 1))
    return missed


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (8, 1)])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("text", [SMALL, NARROW, SINGLE])
def test_every_step_is_that_of_the_oracle(text, prompt, heads, kv_heads):
    policy = parse_policy(f"infllm:{text}")
    assert isinstance(policy, InfLLM)
    assert compare(policy, heads, kv_heads, prompt, 24, torch.tensor([0, 0]), 1.5, 2e-5) > 0


@pytest.mark.parametrize("text", [SMALL, NARROW, SINGLE])
def test_padding_is_never_seen_and_sinks_are_the_first_real_tokens(text):
    policy = parse_policy(f"infllm:{text}")
    assert compare(policy, 8, 2, 41, 20, torch.tensor([0, 2, 19, 40]), 1.5, 2e-5) > 0


def test_five_parts_merge_at_logits_of_200():
    """The vector of a block is the mean of all its keys here, so that no mass that underflows decides anything."""
    policy = parse_policy(f"infllm:{SMALL},representative_tokens=4".replace("representative_tokens=2,", ""))
    q, k, _ = draw(8, 2, 61, 1, 41 * 8, 9.0)
    assert float((q[0, 0] @ k[0, 0].mT).abs().max() * DIM**-0.5) > 200
    compare(policy, 8, 2, 41, 20, torch.tensor([0]), 9.0, 2e-4)


def needles_read(before):
    """Of 12 places, in how many a key along the last query is read; queries before it lie along it `before` times.

    The direction hardly turns (10000^(-3/4) of a radian a token), so that it is one wherever a key stands.
    """
    policy, shape, prompt, along, read = parse_policy(f"infllm:{SMALL}"), model(8, 2), 61, torch.eye(DIM)[3], 0
    places = range(3, 51, 4)  # the first token of each block that has closed
    for place in places:
        q, k, v = draw(8, 2, prompt + 1, 1, seed=place, size=0.4)
        q[:, :, :prompt], q[:, :, prompt:] = along * before, along * 16
        k[:, :, place] = along * 8
        run = Run(policy, shape, q, k, v, prompt, torch.tensor([0]))
        for past, new in [*((past, min(8, prompt - past)) for past in range(0, prompt, 8)), (prompt, 1)]:
            call = run.step(past, new)
        expected = v[0, :, place].repeat_interleave(4, 0)
        read += torch.allclose(call.out[0, :, 0], expected, atol=1e-3)
    return read, len(places)


def test_a_planted_needle_is_read_where_queries_near_it_asked_for_it():
    """A block is found by the keys that later queries weighed most: one that they turn from does not speak for it.

    Its block is then one of 12 like the others, and 2 are looked up for all heads: 7 of 12 needles are missed here.
    """
    assert needles_read(before=16) == (12, 12)
    read, places = needles_read(before=-16)
    assert read < places


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


def generate(model, inputs, new=30, **options):
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options)


@pytest.mark.parametrize("text", [SMALL, NARROW, SINGLE, "window_tokens=200"])
def test_bytes_are_those_of_the_plans(llama, text):
    policy, prompt, room = parse_policy(f"infllm:{text}"), 60, 40
    with offload(llama, policy, max_new_tokens=room) as kv:
        cache = kv.cache()
        generate(llama, padded(prompt, [0, 5, 57]), past_key_values=cache)
        expected, recording = Counter(), kv.counts
        for (_, layer, _, *at), totals in zip(recording.steps.tolist(), recording.totals(), strict=True):
            step = Step(prompt_tokens=at[0], past_tokens=at[1], new_tokens=at[2])
            plan = plan_layer(policy, kv.shape, step, layer)
            expected.update(moved_bytes(plan.ops, plan.buffers, totals))
        assert kv.moved_bytes == Counter({link: nbytes for link, nbytes in expected.items() if nbytes})
        closed = (60 + 29 - policy.window_tokens - policy.sink_tokens) // policy.block_tokens  # 29 tokens fed back
        down = 3 * 4 * max(0, closed) * policy.block_tokens * 2 * 2 * 8 * 4
        assert kv.moved_bytes[Tier.HBM, Tier.DDR] >= down  # and the ids
        last = Step.decoding(prompt, room)
        stored = stored_bytes([plan_layer(policy, kv.shape, last, layer).buffers for layer in range(4)])
        assert kv.footprint_bytes == {tier: 3 * nbytes for tier, nbytes in stored.items() if nbytes}


def test_chunks_of_execution_blocks_and_a_later_turn_are_one_stream(llama):
    """A prompt in chunks that are whole execution blocks, and turns that begin at one, leave nothing different."""
    policy, ids, logits = parse_policy(f"infllm:{SMALL}"), padded(72, [0])["input_ids"], []
    for sizes, prompt in (([72], 72), ([24, 8, 40], 72), ([48, 16, 8], 48)):
        with offload(llama, policy, max_new_tokens=32) as kv, torch.no_grad():
            cache, past = kv.cache(prompt_tokens=prompt), 0
            for size in sizes:
                out = llama(input_ids=ids[:, past : past + size], past_key_values=cache).logits
                past += size
            logits.append(out[:, -1])
    assert torch.allclose(logits[0], logits[1], atol=1e-5)
    assert torch.allclose(logits[0], logits[2], atol=1e-5)


def test_a_window_that_covers_everything_is_exact_and_one_that_does_not_is_not(llama):
    inputs = padded(60, [0, 5])
    expected = generate(llama, inputs)
    for window, same in ((90, True), (89, True), (20, False)):
        policy = parse_policy(f"infllm:sink_tokens=2,window_tokens={window},block_tokens=4,execution_tokens=16,top_k=2")
        with offload(llama, policy, max_new_tokens=30) as kv:
            got = generate(llama, inputs, past_key_values=kv.cache())
        assert torch.equal(got, expected) is same
