"""Sampling, beams, chunks, turns and lookups under a policy equal the same under Hugging Face's own cache."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from policies import parse_policy  # noqa: E402
from policies.plan import Tier  # noqa: E402
from runtime import offload  # noqa: E402

EXACT = [
    *("full", "offload-all", "sink-window", "quest:budget_tokens=96", "full@heads=4+offload-all@heads=4"),
    *("snapkv:budget_tokens=37,observation_tokens=8", "snapkv:budget_tokens=37,observation_tokens=8,per=query_head"),
    *("infllm", "infllm:execution_tokens=8,block_tokens=4"),
    "squeezed-attention:keep=1,observation_tokens=4,centroid_share=0.2",
    "squeezed-attention:keep=1,coarse_keep=1,levels=2,coarse_share=0.1,observation_tokens=4,centroid_share=0.2,tier=ddr",
    *(
        f"retrieval-attention:sink_tokens=2,window_tokens=8,top_k=27,{index}"
        for index in ("index=flat", "index=ivf,lists=9,probe_share=1", "scanned=1")
    ),
    "retroinfer:window_tokens=4,cluster_tokens=4,update_tokens=8,retrieval=1,estimation=0",
]


@pytest.fixture(scope="module")
def model():
    config = transformers.LlamaConfig(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    torch.manual_seed(11)
    return transformers.AutoModelForCausalLM.from_config(config).eval().float()


def prompts(batch=3, tokens=37, seed=12):
    ids = torch.randint(3, 101, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, pad in zip(range(batch), (0, 5, 19), strict=False):
        ids[row, :pad], mask[row, :pad] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, inputs, **options):
    torch.manual_seed(13)
    with torch.no_grad():
        return model.generate(**inputs, **{"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False} | options)


@pytest.mark.parametrize("policy", EXACT)
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_p": 0.9, "temperature": 1.5},
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=["sampling", "beams", "sequences"],
)
def test_ways_of_choosing_tokens(model, policy, options):
    expected = generate(model, prompts(), **options)
    with offload(model, parse_policy(policy), max_new_tokens=16) as kv:
        assert torch.equal(generate(model, prompts(), past_key_values=kv.cache(), **options), expected)


@pytest.mark.parametrize("policy", EXACT)
@pytest.mark.parametrize("chunk", [10, 36, 37])
def test_a_prompt_in_chunks(model, policy, chunk):
    expected = generate(model, prompts())
    with offload(model, parse_policy(policy), max_new_tokens=16) as kv:
        cache = kv.cache(prompt_tokens=37)
        assert torch.equal(generate(model, prompts(), past_key_values=cache, prefill_chunk_size=chunk), expected)


@pytest.mark.parametrize("policy", EXACT)
def test_turns_take_up_the_cache_of_those_before(model, policy):
    with offload(model, parse_policy(policy), max_new_tokens=64) as kv:
        cache, inputs = kv.cache(), prompts()
        for seed in (21, 22, 23):
            expected = generate(model, inputs)
            assert torch.equal(generate(model, inputs, past_key_values=cache), expected)
            question = prompts(tokens=9, seed=seed)["input_ids"].clamp(min=3)
            ids = torch.cat([expected, question], dim=1)
            new = torch.ones(3, ids.shape[1] - inputs["attention_mask"].shape[1], dtype=torch.int64)
            inputs = {"input_ids": ids, "attention_mask": torch.cat([inputs["attention_mask"], new], dim=1)}


@pytest.mark.parametrize("policy", ["full", "offload-all"])
def test_lookup_decoding_takes_tokens_back(model, policy):
    repeating = torch.tensor([5, 6, 7, 8, 9] * 8)[None]
    options = {"prompt_lookup_num_tokens": 4, "max_new_tokens": 24}
    expected = generate(model, {"input_ids": repeating}, max_new_tokens=24)
    with offload(model, parse_policy(policy), max_new_tokens=64) as kv:
        got = generate(model, {"input_ids": repeating}, past_key_values=kv.cache(), **options)
    assert torch.equal(got, expected)


def test_lookup_decoding_under_a_policy_that_forgets_is_refused(model):
    inputs = {"input_ids": torch.tensor([5, 6, 7, 8, 9] * 8)[None]}
    with (
        offload(model, parse_policy("sink-window"), max_new_tokens=64) as kv,
        pytest.raises(ValueError, match="sink-window cannot take tokens back; generate without assisted or lookup"),
    ):
        generate(model, inputs, past_key_values=kv.cache(), prompt_lookup_num_tokens=4)


def test_a_prompt_that_is_not_as_announced(model):
    with offload(model, parse_policy("full"), max_new_tokens=16) as kv:
        with pytest.raises(ValueError, match="announced with 20 tokens and its token 37 has come"):
            generate(model, prompts(), past_key_values=kv.cache(prompt_tokens=20))
        with pytest.raises(ValueError, match=r"give .* kv.cache\(prompt_tokens=...\)"):
            generate(model, prompts(), past_key_values=kv.cache(), prefill_chunk_size=10)
        with pytest.raises(ValueError, match="prompt_tokens=0 must be at least 1"):
            kv.cache(prompt_tokens=0)


def test_a_context_beyond_the_positions_is_refused(model):
    with offload(model, parse_policy("full"), max_new_tokens=400) as kv:
        with pytest.raises(ValueError, match="300 tokens exceed the 256 positions of llama; cut the prompt"):
            generate(model, prompts(tokens=300), past_key_values=kv.cache())
        with pytest.raises(ValueError, match="257 tokens exceed the 256 positions"):
            generate(model, prompts(tokens=250), past_key_values=kv.cache(), max_new_tokens=20)


def test_a_cache_that_does_not_fit_is_refused_before_anything_is_allocated(model, monkeypatch):
    monkeypatch.setattr("runtime.memory.free_host_bytes", lambda: 60_000)
    with offload(model, parse_policy("offload-all"), max_new_tokens=16) as kv:
        # 53 tokens of 2 x 2 x 8 fp32 on three layers of three sequences in DDR; two staging buffers in HBM.
        cache = kv.cache()
        with pytest.raises(MemoryError, match=f"needs {53 * 2 * 2 * 8 * 4 * 3 * 3:,} bytes of host memory"):
            generate(model, prompts(), past_key_values=cache)
        assert not kv.footprint_bytes


def test_every_step_is_recorded(model):
    with offload(model, parse_policy("offload-all"), max_new_tokens=16) as kv:
        generate(model, prompts(), past_key_values=kv.cache())
        steps = kv.counts.steps
    # Three sequences, three layers, the prompt and the eleven tokens that are fed back.
    assert len(steps) == 3 * 3 * 12
    assert {tuple(row) for row in steps[:, 2:].tolist()} == {
        (37, 37, 0, 37),
        *((37, 37, 37 + i, 1) for i in range(11)),
    }
    assert sorted(set(steps[:, 0].tolist())) == [0, 1, 2]


@pytest.mark.parametrize(
    ("raised", "seen", "says"),
    [
        (KeyboardInterrupt("by hand"), KeyboardInterrupt, "by hand"),
        (torch.OutOfMemoryError("CUDA out of memory"), MemoryError, "out of GPU memory under offload-all .* fewer max"),
    ],
)
def test_what_breaks_off_leaves_nothing_behind(model, raised, seen, says):
    """Whatever ends a prefill early: memory is given back, host memory is erased, the model is as before."""
    calls = iter(range(2))
    inputs, hosts = prompts(), []
    with torch.no_grad():
        before = model(**inputs).logits

    def break_off(*_):
        if next(calls) == 1:
            hosts.extend(tensor for tier, tensor in cache.arena.held() if tier is Tier.DDR)
            raise raised

    hook = model.model.layers[2].register_forward_hook(break_off)
    with hook, pytest.raises(seen, match=says), offload(model, parse_policy("offload-all"), max_new_tokens=16) as kv:
        generate(model, inputs, past_key_values=(cache := kv.cache()))
    assert hosts
    assert not any(tensor.any() for tensor in hosts)
    assert not kv.footprint.now_bytes
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)


def test_a_prompt_below_the_minimum_is_left_dense_and_said_so_once(model, caplog):
    expected = generate(model, prompts())
    with (
        caplog.at_level("WARNING", logger="runtime"),
        offload(model, parse_policy("snapkv:budget_tokens=40,observation_tokens=8"), max_new_tokens=16) as kv,
    ):
        assert torch.equal(generate(model, prompts(), past_key_values=kv.cache()), expected)
    assert [r.getMessage() for r in caplog.records] == ["snapkv leaves a prompt of 37 tokens dense: it begins at 40"]


@pytest.mark.parametrize(
    "policy", ["full", "sink-window:window_tokens=32", "sink-window:window_tokens=32,positions=original"]
)
def test_a_padded_row_is_as_if_it_were_alone(model, policy):
    """Also while its window is not full, and the buffer is as large as that of a longer row asks."""
    inputs = prompts(batch=3, tokens=45)  # the last row has 26 tokens
    asked = {"output_logits": True, "return_dict_in_generate": True}
    with offload(model, parse_policy(policy), max_new_tokens=12) as kv:
        together = generate(model, inputs, past_key_values=kv.cache(), **asked).logits
        for row in range(3):
            real = inputs["attention_mask"][row].bool()
            own = {"input_ids": inputs["input_ids"][row : row + 1, real]}
            alone = generate(model, own, past_key_values=kv.cache(), **asked).logits
            for step, logits in enumerate(alone):
                torch.testing.assert_close(together[step][row], logits[0], atol=2e-6, rtol=2e-6)
