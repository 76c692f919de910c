"""The same promises beside a real GPU: tokens, bytes, pinned memory, streams."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from policies import Step, parse_policy, plan_layer  # noqa: E402
from policies.plan import Tier, moved_bytes, stored_bytes  # noqa: E402
from runtime import offload  # noqa: E402

pytestmark = pytest.mark.gpu
LAYERS, PROMPT, NEW, ROOM = 6, 700, 24, 64
POLICIES = ["full", "offload-all", "offload-all:write_back=all", "sink-window:positions=original"]


@pytest.fixture(scope="module")
def model():
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(5)
    return transformers.AutoModelForCausalLM.from_config(config).eval().float().cuda()


def inputs(batch):
    ids = torch.randint(3, 512, (batch, PROMPT), generator=torch.Generator().manual_seed(6))
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        ids[row, : 31 * row], mask[row, : 31 * row] = 0, 0
    return {"input_ids": ids.cuda(), "attention_mask": mask.cuda()}


def generate(model, batch, **options):
    with torch.no_grad():
        return model.generate(**inputs(batch), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **options)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_tokens_equal_stock_generate(model, policy, batch):
    expected = generate(model, batch)
    for _ in range(2):  # a race between streams would not fail every time, so more than once
        with offload(model, parse_policy(policy), max_new_tokens=ROOM) as kv:
            got = generate(model, batch, past_key_values=kv.cache())
        assert torch.equal(got, expected)


@pytest.mark.parametrize("policy", POLICIES[:3])
def test_bytes_and_where_they_are(model, policy):
    with offload(model, parse_policy(policy), max_new_tokens=ROOM) as kv:
        before = torch.cuda.memory_allocated()
        cache = kv.cache()
        generate(model, 2, past_key_values=cache)
        steps = [Step(prompt_tokens=PROMPT, past_tokens=0, new_tokens=PROMPT)]
        steps += [Step.decoding(PROMPT, g) for g in range(1, NEW)]
        expected: dict[tuple[Tier, Tier], int] = {}
        for step in steps:
            for layer in range(LAYERS):
                plan = plan_layer(kv.policy, kv.shape, step, layer)
                for link, nbytes in moved_bytes(plan.ops, plan.buffers, {}).items():
                    expected[link] = expected.get(link, 0) + 2 * nbytes
        assert dict(kv.moved_bytes) == expected
        last = Step.decoding(PROMPT, ROOM)
        stored = stored_bytes([plan_layer(kv.policy, kv.shape, last, layer).buffers for layer in range(LAYERS)])
        assert kv.footprint_bytes == {tier: 2 * nbytes for tier, nbytes in stored.items()}
        # The allocator rounds each tensor up to 512 bytes; generate's own leftovers are small beside the cache.
        held = torch.cuda.memory_allocated() - before
        assert held >= 2 * stored[Tier.HBM]
        for layer in range(LAYERS):
            for name, tensor in cache.arena.kept(layer).items():
                on_host = name.endswith("_host")
                assert tensor.is_cuda is not on_host
                assert tensor.is_pinned() is on_host
