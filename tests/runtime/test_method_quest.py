"""Quest inside the runtime against a float64 oracle that selects and attends token by token."""

import pytest

torch = pytest.importorskip("torch")

from policies import Quest, Step, plan_layer  # noqa: E402
from policies.model import LayerShape, ModelShape  # noqa: E402
from runtime.arena import Arena  # noqa: E402
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


def oracle(q, keys, values):
    """Pages by the largest bound over a group's query heads, the last always; exact attention over their tokens."""
    heads, kv_heads, tokens = q.shape[0], keys.shape[0], keys.shape[1]
    out = torch.zeros(heads, DIM, dtype=torch.float64)
    pages = -(-tokens // PAGE)
    for kv in range(kv_heads):
        group = range(kv * heads // kv_heads, (kv + 1) * heads // kv_heads)
        bound = []
        for page in range(pages - 1):
            block = keys[kv, page * PAGE : (page + 1) * PAGE]
            low, high = block.amin(0), block.amax(0)
            bound.append(max(float(torch.maximum(q[h] * low, q[h] * high).sum()) for h in group))
            for h in group:  # the bound is one: no key of the page scores higher
                assert float((block @ q[h]).max()) <= bound[-1] + 1e-9
        chosen = [*sorted(range(pages - 1), key=lambda p: (-bound[p], p))[: BUDGET // PAGE - 1], pages - 1]
        kept = [t for p in sorted(chosen) for t in range(p * PAGE, min(tokens, (p + 1) * PAGE))]
        for h in group:
            weights = torch.softmax(keys[kv, kept] @ q[h] / DIM**0.5, 0)
            out[h] = weights @ values[kv, kept]
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (8, 1)])
@pytest.mark.parametrize("prompt", [16, 17, 30, 45])
def test_decode_reads_what_the_oracle_reads(heads, kv_heads, prompt):
    generator = torch.Generator().manual_seed(prompt * heads)
    shape, policy, steps = model(heads, kv_heads), Quest(page_tokens=PAGE, budget_tokens=BUDGET, dense_layers=0), 9
    total = prompt + steps
    draw = lambda h: torch.randn(1, h, total, DIM, generator=generator) * 3  # noqa: E731
    q, k, v = draw(heads), draw(kv_heads), draw(kv_heads)
    arena, executor = Arena(torch.device("cpu"), 1), Executor(torch.device("cpu"), Mover())
    arena.allocate(0, plan_layer(policy, shape, Step.decoding(prompt, steps), 0).buffers)
    for past, new in [(0, prompt), *((prompt + i, 1) for i in range(steps))]:
        step = Step(prompt_tokens=prompt, past_tokens=past, new_tokens=new)
        plan, at = plan_layer(policy, shape, step, 0), slice(past, past + new)
        call = Call(
            shape=shape.layers[0], step=step, state=arena.tensors(0, plan.buffers), q=q[:, :, at], new_k=k[:, :, at],
            new_v=v[:, :, at], mask=None, scale=DIM**-0.5,
        )  # fmt: skip
        executor.run(plan, method_of(policy), call)
        if new == 1:
            expected = oracle(q[0, :, past].double(), k[0, :, : past + 1].double(), v[0, :, : past + 1].double())
            assert torch.allclose(call.out[0, :, 0].double(), expected, atol=1e-5)
