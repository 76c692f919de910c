"""The same promises beside a real GPU: tokens, bytes, pinned memory, streams."""

from collections import Counter

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from policies import Step, parse_policy, plan_layer  # noqa: E402
from policies.plan import Tier, moved_bytes, stored_bytes  # noqa: E402
from runtime import offload  # noqa: E402

pytestmark = pytest.mark.gpu
LAYERS, PROMPT, NEW, ROOM = 6, 700, 24, 64
EXACT = [
    *("full", "offload-all", "offload-all:write_back=all", "sink-window:positions=original"),
    *("snapkv:budget_tokens=700,observation_tokens=16", "snapkv:budget_tokens=700,per=query_head"),
    *("infllm", "squeezed-attention:keep=1", "squeezed-attention:keep=1,tier=ddr,levels=2,coarse_keep=1"),
    "squeezed-attention:budget_tokens=1Ki,tier=ddr",
    *(
        f"retrieval-attention:sink_tokens=16,window_tokens=84,top_k=600,{index}"
        for index in ("index=flat", "index=ivf,lists=24,probe_share=1", "scanned=1")
    ),
    "retroinfer:update_tokens=16,retrieval=1,estimation=0",
]
SELECTIVE = [
    "snapkv:budget_tokens=128",
    "shadowkv:budget_tokens=128,rank=48,outlier_chunks=6",
    "shadowkv:chunk_tokens=4,budget_tokens=64,rank=16",
    "infllm:window_tokens=128,sink_tokens=16,block_tokens=32,top_k=4,cache_blocks=6,execution_tokens=128",
    "squeezed-attention:keep=0.1",
    "squeezed-attention:keep=0.1,tier=ddr,levels=2",
    "squeezed-attention:budget_tokens=64,tier=ddr",
    *(
        f"retrieval-attention:sink_tokens=16,window_tokens=84,top_k=32,{index}"
        for index in ("index=flat", "index=ivf,lists=24", "scanned=0.2,scan_factor=1")
    ),
    "retroinfer:update_tokens=16,retrieval=0.1",
]


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
@pytest.mark.parametrize("policy", EXACT)
def test_tokens_equal_stock_generate(model, policy, batch):
    expected = generate(model, batch)
    for _ in range(2):  # a race between streams would not fail every time, so more than once
        with offload(model, parse_policy(policy), max_new_tokens=ROOM) as kv:
            got = generate(model, batch, past_key_values=kv.cache())
        assert torch.equal(got, expected)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("policy", SELECTIVE)
def test_streams_change_nothing(model, policy, batch, monkeypatch):
    """With every lane on the stream of the model, one operation after the other, the tokens are the same."""
    with offload(model, parse_policy(policy), max_new_tokens=ROOM) as kv:
        at_once = [generate(model, batch, past_key_values=kv.cache()) for _ in range(3)]
        monkeypatch.setattr("runtime.executor.Executor._stream", lambda *_: torch.cuda.current_stream())
        in_turn = generate(model, batch, past_key_values=kv.cache())
    assert all(torch.equal(tokens, in_turn) for tokens in at_once)


def test_shadowkv_rebuilds_keys_and_fetches_values_on_the_gpu(model):
    """At full rank, with a budget of every chunk that is not padding, and slots that are emptied after the prompt.

    80 chunks of 8 tokens; each row has a chunk or more of padding, so that a budget of 79 leaves nothing out.
    """
    given = {name: tensor[1:] for name, tensor in inputs(3).items()}
    policy = parse_policy("shadowkv:budget_tokens=632,rank=64,outlier_chunks=0,sink_tokens=0")
    mask = torch.cat([given["attention_mask"], given["attention_mask"].new_ones(2, 1)], dim=1)
    ids = torch.cat([given["input_ids"], given["input_ids"].new_full((2, 1), 77)], dim=1)
    position = mask.cumsum(1).sub(1).clamp(min=0)
    prompt, new = slice(0, PROMPT), slice(PROMPT, None)
    with torch.no_grad():
        stock = model(input_ids=ids, attention_mask=mask, position_ids=position).logits[:, -1]
        with offload(model, policy, max_new_tokens=ROOM) as kv:
            cache = kv.cache()
            model(**given, position_ids=position[:, prompt], past_key_values=cache)
            for layer in range(LAYERS):
                kept = cache.arena.kept(layer)
                kept["slot_ids"].fill_(-1)
                kept["k_slots"].fill_(torch.nan)
                kept["v_slots"].fill_(torch.nan)
            out = model(
                input_ids=ids[:, new], attention_mask=mask, position_ids=position[:, new], past_key_values=cache
            )
            # Padding of 31 and 62 tokens: 3 and 7 whole chunks.
            assert [set(row) for row in kv.counts.counts["miss"].value[-2:].tolist()] == [{77}, {73}]
    # fp32, six layers: a few roundings of 6e-8 on logits of about 1 in each.
    torch.testing.assert_close(out.logits[:, -1], stock, atol=1e-5, rtol=0)


@pytest.mark.parametrize("policy", [*EXACT[:3], *SELECTIVE])
def test_bytes_and_where_they_are(model, policy):
    with offload(model, parse_policy(policy), max_new_tokens=ROOM) as kv:
        before = torch.cuda.memory_allocated()
        cache = kv.cache()
        generate(model, 2, past_key_values=cache)
        assert len(kv.counts.steps) >= 2 * LAYERS * NEW  # InfLLM's prompt is several
        expected: Counter[tuple[Tier, Tier]] = Counter()
        for (_, layer, _, *at), drawn in zip(kv.counts.steps.tolist(), kv.counts.totals(), strict=True):
            step = Step(prompt_tokens=at[0], past_tokens=at[1], new_tokens=at[2])
            plan = plan_layer(kv.policy, kv.shape, step, layer)
            expected.update(moved_bytes(plan.ops, plan.buffers, drawn))
        assert kv.moved_bytes == expected
        last = Step.decoding(PROMPT, ROOM)
        stored = stored_bytes([plan_layer(kv.policy, kv.shape, last, layer).buffers for layer in range(LAYERS)])
        assert +kv.footprint_bytes == +Counter({tier: 2 * nbytes for tier, nbytes in stored.items()})
        # The allocator rounds each tensor up to 512 bytes; generate's own leftovers are small beside the cache.
        held = torch.cuda.memory_allocated() - before
        assert held >= 2 * stored[Tier.HBM]
        for layer in range(LAYERS):
            tiers = {buffer.name: buffer.tier for buffer in plan_layer(kv.policy, kv.shape, last, layer).buffers}
            for name, tensor in cache.arena.kept(layer).items():
                on_host = tiers[name] is Tier.DDR
                assert tensor.is_cuda is not on_host
                assert tensor.is_pinned() is on_host
