"""Quest inside the runtime against a float64 oracle that selects and attends token by token."""

import pytest

torch = pytest.importorskip("torch")

from policies import Quest, Step, plan_layer  # noqa: E402
from policies.model import LayerShape, ModelShape  # noqa: E402
from runtime.arena import Arena  # noqa: E402
from runtime.bound import Bound  # noqa: E402
from runtime.call import Call  # noqa: E402
from runtime.executor import Executor  # noqa: E402
from runtime.methods import method_of  # noqa: E402
from runtime.mover import Mover  # noqa: E402

PAGE, BUDGET, DIM = 4, 12, 8


def model(heads, kv_heads):
    sizes = {"qkv_params": 1, "out_params": 1, "mlp_params": 1, "mlp_active_params": 1}
    layer = LayerShape(kind="full", heads=heads, kv_heads=kv_heads, head_dim=DIM, v_head_dim=DIM, **sizes)
    return ModelShape(
        name="tiny", hidden_dim=16, vocab_size=8, max_positions=512, layers=(layer,), embedding_params=1,
        head_params=1, params=5, dtype="fp32", kv_dtype="fp32",
    )  # fmt: skip


def oracle(q, keys, values, per, sinks):
    """The sinks' pages, others by bound, the largest over a group or of each query head, the last always.

    Attention over them is exact.

    Returns the output and for each KV head how many pages beside the last one its group reads.
    """
    heads, kv_heads, tokens = q.shape[0], keys.shape[0], keys.shape[1]
    out, read = torch.zeros(heads, DIM, dtype=torch.float64), []
    pages = -(-tokens // PAGE)
    for kv in range(kv_heads):
        group = range(kv * heads // kv_heads, (kv + 1) * heads // kv_heads)
        bound = {h: [] for h in group}
        for page in range(pages - 1):
            block = keys[kv, page * PAGE : (page + 1) * PAGE]
            low, high = block.amin(0), block.amax(0)
            for h in group:
                bound[h].append(float(torch.maximum(q[h] * low, q[h] * high).sum()))
                # The bound is one: no key of the page scores higher.
                assert float((block @ q[h]).max()) <= bound[h][-1] + 1e-9
        if per == "kv_head":
            largest = [max(b) for b in zip(*bound.values(), strict=True)]
            bound = dict.fromkeys(group, largest)
        union = set()
        for h in group:
            order = sorted(range(pages - 1), key=lambda p, h=h: (p * PAGE >= sinks, -bound[h][p], p))[
                : BUDGET // PAGE - 1
            ]
            union |= set(order)
            kept = [t for p in [*sorted(order), pages - 1] for t in range(p * PAGE, min(tokens, (p + 1) * PAGE))]
            weights = torch.softmax(keys[kv, kept] @ q[h] / DIM**0.5, 0)
            out[h] = weights @ values[kv, kept]
        read.append(len(union))
    return out, read


def steps(policy, shape, q, k, v, prompt):
    """The prompt and each later token through executor and arena: past tokens and the call."""
    arena, executor = Arena(torch.device("cpu"), 1), Executor(torch.device("cpu"), Mover())
    count = q.shape[2] - prompt
    arena.allocate(0, plan_layer(policy, shape, Step.decoding(prompt, count), 0).buffers)
    for past, new in [(0, prompt), *((prompt + i, 1) for i in range(count))]:
        step = Step(prompt_tokens=prompt, past_tokens=past, new_tokens=new)
        plan, at = plan_layer(policy, shape, step, 0), slice(past, past + new)
        call = Call(
            shape=shape.layers[0], step=step, state=arena.tensors(0, plan.buffers), q=q[:, :, at], new_k=k[:, :, at],
            new_v=v[:, :, at], mask=None, scale=DIM**-0.5,
        )  # fmt: skip
        executor.run(Bound(plan, method_of(policy), arena, 0), call)
        yield past, plan, call


@pytest.mark.parametrize("per", ["kv_head", "query_head"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (8, 1)])
@pytest.mark.parametrize("prompt", [16, 17, 30, 45])
@pytest.mark.parametrize("sinks", [0, 1, 4])
def test_decode_reads_what_the_oracle_reads(heads, kv_heads, prompt, per, sinks):
    generator = torch.Generator().manual_seed(prompt * heads)
    policy, count = Quest(page_tokens=PAGE, budget_tokens=BUDGET, dense_layers=0, per=per, sink_tokens=sinks), 9
    draw = lambda h: torch.randn(1, h, prompt + count, DIM, generator=generator) * 3  # noqa: E731
    q, k, v = draw(heads), draw(kv_heads), draw(kv_heads)
    for past, plan, call in steps(policy, model(heads, kv_heads), q, k, v, prompt):
        if past:
            keys, values = (x[0, :, : past + 1].double() for x in (k, v))
            expected, read = oracle(q[0, :, past].double(), keys, values, per, sinks)
            assert torch.allclose(call.out[0, :, 0].double(), expected, atol=1e-5)
            if plan.counts:  # pages that the group adds to those of one head
                assert call.counts["added"].tolist() == [[n - (BUDGET // PAGE - 1) for n in read]]


@pytest.mark.parametrize("per", ["kv_head", "query_head"])
def test_a_planted_needle_is_read_wherever_it_stands(per):
    """One key along the query, in a page of keys that are not: its page's bound is at least its score of 64 * 64 / 8.

    A page without it is bounded by 64 times the largest number that any other key holds in that direction, below 2.
    """
    policy, heads, prompt = Quest(page_tokens=PAGE, budget_tokens=BUDGET, dense_layers=0, per=per), 8, 101
    for place in (0, 3, 4, 50, 95, 96, 99, 100):
        generator = torch.Generator().manual_seed(place)
        q, k, v = (torch.randn(1, h, prompt + 1, DIM, generator=generator) * 0.4 for h in (heads, 2, 2))
        q[..., prompt, :], k[:, :, place] = torch.eye(DIM)[2] * 64, torch.eye(DIM)[2] * 8
        assert k[:, :, [t for t in range(prompt) if t != place], 2].max() < 2
        *_, (past, _, call) = steps(policy, model(heads, 2), q, k, v, prompt)
        assert past == prompt
        expected = v[0, :, place].repeat_interleave(heads // 2, 0).double()
        torch.testing.assert_close(call.out[0, :, 0].double(), expected, atol=1e-5, rtol=0)
