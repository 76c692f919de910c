"""Policies inside Hugging Face `generate`: exact where they must be, byte for byte what their plans say."""

from collections import Counter

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from policies import Full, Step, parse_policy, plan_layer  # noqa: E402
from policies.plan import Tier, moved_bytes, stored_bytes  # noqa: E402
from runtime import offload  # noqa: E402

SIZES = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MODELS = {
    "llama": ("LlamaConfig", {}),
    "mha": ("LlamaConfig", {"num_key_value_heads": 8}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral-sliding": ("MistralConfig", {"sliding_window": 8}),
    "phi3": ("Phi3Config", {}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 8, "attn_implementation": "eager"}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 8}),
    "gpt-oss": (
        "GptOssConfig",
        {"head_dim": 16, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
}
EXACT = [
    "full",
    "offload-all",
    "offload-all:write_back=all",
    "sink-window:positions=original",
    "sink-window",
    "full@heads=4+offload-all@heads=4",
    "offload-all@heads=4+sink-window@heads=4",
    "full@layers=0-1+offload-all",
    "quest:budget_tokens=64",
    "quest:page_tokens=1,budget_tokens=64,dense_layers=0",
    "snapkv:budget_tokens=64",
    "snapkv:budget_tokens=37,observation_tokens=8",
    "snapkv:budget_tokens=37,observation_tokens=8,per=query_head",
    "infllm:window_tokens=57",
    "infllm:window_tokens=57,block_tokens=4,execution_tokens=8",
    "squeezed-attention:keep=1,observation_tokens=4,centroid_share=0.2",
    "squeezed-attention:keep=1,coarse_keep=1,levels=2,coarse_share=0.1,observation_tokens=4,centroid_share=0.2,tier=ddr",
    "squeezed-attention:budget_tokens=64,observation_tokens=4,centroid_share=0.2,tier=ddr",
    "squeezed-attention:keep=1,observation_tokens=4,centroid_share=0.2@heads=4+full@heads=4",
    *(
        f"retrieval-attention:sink_tokens=2,window_tokens=8,top_k=27,{index}"  # all keys between sinks and window
        for index in ("index=flat", "index=flat,scan_per=query_head", "index=ivf,lists=9,probe_share=1", "scanned=1")
    ),
    "retrieval-attention:sink_tokens=2,window_tokens=8,top_k=27,scanned=1@heads=4+offload-all@heads=4",
    "retroinfer:window_tokens=4,cluster_tokens=4,update_tokens=8,retrieval=1,estimation=0",
    "retroinfer:window_tokens=4,cluster_tokens=2,update_tokens=4,retrieval=1,estimation=0@heads=4+offload-all@heads=4",
]


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    name, options = MODELS[request.param]
    options = dict(options)
    implementation = options.pop("attn_implementation", "sdpa" if request.param != "gpt-oss" else "eager")
    config = getattr(transformers, name)(**{**SIZES, **options})
    torch.manual_seed(1)
    built = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    return built.eval().float()


@pytest.fixture(scope="module")
def stock(model):
    """What the model generates by itself, for each batch size."""
    return {batch: generate(model, prompts(batch)) for batch in (1, 3)}


def prompts(batch: int, tokens: int = 37, pads: tuple[int, ...] = (0, 5, 19)):
    """Ids and mask of `batch` prompts, left-padded by `pads`."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 101, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row, pad in zip(range(batch), pads, strict=False):
        ids[row, :pad], mask[row, :pad] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, inputs, new=20, **options):
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("policy", EXACT)
def test_tokens_equal_stock_generate(model, stock, policy, batch):
    inputs = prompts(batch)
    with offload(model, parse_policy(policy), max_new_tokens=32) as kv:
        got = generate(model, inputs, past_key_values=kv.cache())
    assert torch.equal(got, stock[batch])


def test_shadowkv_at_full_rank_that_selects_everything(model):
    """Rows of padding leave a budget of seven chunks nothing to leave out; then every slot is emptied and rebuilt.

    Greedy tokens are those of stock `generate`. Logits, smaller than 1, may differ by what turning keys back,
    decomposing and rebuilding them adds in each of four layers: some ten roundings of 6e-8, together 2.4e-6.
    """
    inputs = prompts(3, pads=(2, 5, 19))
    policy = parse_policy("shadowkv:chunk_tokens=2,budget_tokens=14,rank=36,outlier_chunks=0,sink_tokens=0")
    expected = generate(model, inputs)
    position = inputs["attention_mask"].cumsum(1).sub(1).clamp(min=0)
    longer = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.int64)], dim=1)
    new = {"input_ids": expected[:, 37:38], "position_ids": position[:, -1:] + 1, "attention_mask": longer}
    with torch.no_grad():
        both = torch.cat([position, new["position_ids"]], dim=1)
        stock = model(input_ids=expected[:, :38], attention_mask=longer, position_ids=both).logits[:, -1]
        with offload(model, policy, max_new_tokens=32) as kv:
            assert torch.equal(generate(model, inputs, past_key_values=kv.cache()), expected)
            cache = kv.cache()
            model(**inputs, position_ids=position, past_key_values=cache)
            for layer in cache.own:
                kept = cache.arena.kept(layer)
                kept["slot_ids"].fill_(-1)
                kept["k_slots"].fill_(torch.nan)
                kept["v_slots"].fill_(torch.nan)
            logits = model(**new, past_key_values=cache).logits[:, -1]
            if cache.own:  # a model may slide everywhere; of eight chunks 1, 2 and all 8 are padding
                assert [set(row) for row in kv.counts.counts["miss"].value[-3:].tolist()] == [{7}, {6}, {0}]
    torch.testing.assert_close(logits, stock, atol=2.4e-6, rtol=0)


@pytest.mark.parametrize(
    "policy",
    [
        *("full", "offload-all", "offload-all:write_back=all"),
        *(
            "snapkv:budget_tokens=20,observation_tokens=8",
            "snapkv:budget_tokens=20,observation_tokens=8,per=query_head",
        ),
        *(
            "shadowkv:chunk_tokens=1,budget_tokens=16,rank=8,outlier_chunks=3",
            "shadowkv:chunk_tokens=2,budget_tokens=6",
        ),
        *(
            f"retrieval-attention:sink_tokens=2,window_tokens=8,top_k=5,{index}"
            for index in ("index=flat", "index=ivf,lists=9", "scanned=0.4,scan_factor=1")
        ),
    ],
)
def test_bytes_are_those_of_the_plans(policy):
    """What the mover counted and what the arena allocated, against the plans of the very same steps."""
    config = transformers.LlamaConfig(**SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    batch, prompt, new, room = 3, 37, 11, 40
    with offload(model, parse_policy(policy), max_new_tokens=room) as kv:
        cache = kv.cache()
        generate(model, prompts(batch), new, past_key_values=cache)
        steps = [Step(prompt_tokens=prompt, past_tokens=0, new_tokens=prompt)]
        steps += [Step.decoding(prompt, g) for g in range(1, new)]
        recorded, totals = kv.counts.steps.tolist(), kv.counts.totals()
        of_plans = [(s.prompt_tokens, s.past_tokens, s.new_tokens) for s in steps]
        asked = [(row, layer, prompt, *s) for row in range(batch) for layer in range(4) for s in of_plans]
        assert sorted(map(tuple, recorded)) == asked
        expected: Counter[tuple[Tier, Tier]] = Counter()
        for (_, layer, _, prompt_tokens, past, new_tokens), drawn in zip(recorded, totals, strict=True):
            step = Step(prompt_tokens=prompt_tokens, past_tokens=past, new_tokens=new_tokens)
            plan = plan_layer(kv.policy, kv.shape, step, layer)
            assert set(drawn) == {count.name for count in plan.counts}
            expected.update(moved_bytes(plan.ops, plan.buffers, drawn))
        assert kv.moved_bytes == expected
        last = Step.decoding(prompt, room)
        stored = stored_bytes([plan_layer(kv.policy, kv.shape, last, layer).buffers for layer in range(4)])
        assert kv.footprint_bytes == {tier: batch * nbytes for tier, nbytes in stored.items()}
        held = kv.footprint_bytes
    assert not cache.arena.held()
    assert kv.footprint_bytes == held  # what was held last
    assert all(kv.peak_footprint_bytes[tier] >= nbytes for tier, nbytes in held.items())


def test_a_window_that_forgets_differs_and_one_that_covers_does_not():
    config = transformers.LlamaConfig(**SIZES)
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    inputs = prompts(1)
    expected = generate(model, inputs)

    def under(policy):
        with offload(model, parse_policy(policy)) as kv:
            return generate(model, inputs, past_key_values=kv.cache())

    assert torch.equal(under("sink-window:positions=original,sink_tokens=2,window_tokens=55"), expected)
    assert not torch.equal(under("sink-window:positions=original,sink_tokens=2,window_tokens=4"), expected)


@pytest.mark.parametrize(("sinks", "window"), [(0, 5), (2, 7), (4, 16), (3, 60)])
@pytest.mark.parametrize("chunk", [30, 11])
def test_slot_positions_are_those_of_a_rolling_cache(sinks, window, chunk):
    """Each token against a forward over exactly what its cache would hold, renumbered from 0 (StreamingLLM)."""
    config = transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 1})  # one layer: no state but the tokens
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    ids = prompts(1, 41)["input_ids"]
    expected = []
    with torch.no_grad():
        for t in range(41):
            kept = [i for i in range(t + 1) if i < sinks or i > t - window]
            expected.append(model(input_ids=ids[:, kept], use_cache=False).logits[:, -1])
        policy = parse_policy(f"sink-window:sink_tokens={sinks},window_tokens={window}")
        with offload(model, policy, max_new_tokens=40) as kv:
            cache = kv.cache()
            got = [model(input_ids=part, past_key_values=cache).logits for part in ids[:, :30].split(chunk, dim=1)]
            got += [model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for t in range(30, 41)]
    assert torch.allclose(torch.cat(got, dim=1), torch.stack(expected, dim=1), atol=2e-5)


@pytest.mark.parametrize(
    "policy",
    ["sink-window:sink_tokens=2,window_tokens=9", "sink-window:positions=original,sink_tokens=2,window_tokens=9"],
)
def test_a_padded_row_has_its_own_sinks_and_window(policy):
    config = transformers.LlamaConfig(**SIZES)
    torch.manual_seed(6)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    padded = prompts(3)
    with offload(model, parse_policy(policy), max_new_tokens=32) as kv:
        together = generate(model, padded, past_key_values=kv.cache())
        for row, pad in ((1, 5), (2, 19)):
            alone = {name: tensor[row : row + 1, pad:] for name, tensor in padded.items()}
            tokens = generate(model, alone, past_key_values=kv.cache())
            assert torch.equal(together[row, 37:], tokens[0, 37 - pad :])


@pytest.mark.parametrize(("sinks", "window"), [(0, 5), (2, 7), (4, 16)])
def test_a_window_sees_what_a_banded_mask_sees(sinks, window):
    """Logits of each step under a window against one stock forward under the band that the policy defines."""
    config = transformers.LlamaConfig(**SIZES)
    torch.manual_seed(4)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    ids = prompts(1, 41)["input_ids"]
    i = torch.arange(41)
    band = (i[None] <= i[:, None]) & ((i[None] < sinks) | (i[None] > i[:, None] - window))
    additive = torch.where(band, 0.0, float("-inf"))[None, None]
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=additive, use_cache=False).logits
        policy = parse_policy(f"sink-window:positions=original,sink_tokens={sinks},window_tokens={window}")
        with offload(model, policy, max_new_tokens=16) as kv:
            cache = kv.cache()
            got = [model(input_ids=ids[:, :30], past_key_values=cache).logits]
            got += [model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for t in range(30, 41)]
    assert torch.allclose(torch.cat(got, dim=1), expected, atol=2e-5)


def test_the_model_is_as_before():
    config = transformers.LlamaConfig(**SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    inputs = prompts(3)
    with torch.no_grad():
        before = model(**inputs).logits
        with offload(model, parse_policy("offload-all")) as kv:
            generate(model, inputs, past_key_values=kv.cache())
        assert model.config._attn_implementation == "sdpa"
        assert torch.equal(model(**inputs).logits, before)


def test_one_sequence_never_reads_what_another_left():
    """Host memory that a cache gives back is zero."""
    config = transformers.LlamaConfig(**SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    with offload(model, parse_policy("offload-all")) as kv:
        cache = kv.cache()
        generate(model, prompts(1), past_key_values=cache)
        host = cache.arena.kept(0)["kv_host"]
        assert host.abs().sum() > 0
        cache.reset()
        assert host.abs().sum() == 0


def test_what_cannot_be_done_says_so():
    llama = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES)).eval().float()
    with (
        pytest.raises(ValueError, match="does not execute policy 'locret' yet; it executes full, "),
        offload(llama, parse_policy("locret")),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"a function method\(policy\) stands beside its class.* unheard-of has none"),
        offload(llama, type("UnheardOf", (Full,), {"name": "unheard-of"})()),
    ):
        pass
    with (
        offload(llama, parse_policy("full"), max_new_tokens=4) as kv,
        pytest.raises(ValueError, match=r"token 42 has come; give offload\(\.\.\., max_new_tokens"),
    ):
        generate(llama, prompts(1), past_key_values=kv.cache())
    mla = transformers.DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 8},
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
    )
    deepseek = transformers.AutoModelForCausalLM.from_config(mla).eval().float()
    with pytest.raises(ValueError, match="MLA latent"), offload(deepseek, parse_policy("quest")):
        pass


def test_pages_of_padding_are_no_choice():
    """With a budget below the context a padded row still generates what it generates alone."""
    config = transformers.LlamaConfig(**SIZES)
    torch.manual_seed(6)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    padded, policy = prompts(3), parse_policy("quest:page_tokens=1,budget_tokens=16,dense_layers=0")
    with offload(model, policy, max_new_tokens=32) as kv:
        together = generate(model, padded, past_key_values=kv.cache())
        for row, pad in ((1, 5), (2, 19)):
            alone = {name: tensor[row : row + 1, pad:] for name, tensor in padded.items()}
            tokens = generate(model, alone, past_key_values=kv.cache())
            assert torch.equal(together[row, 37:], tokens[0, 37 - pad :])
