"""What surrounds a forward: right under every policy, or refused in words."""

from importlib.util import find_spec

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from policies import parse_policy  # noqa: E402
from runtime import offload  # noqa: E402

EXACT = [
    *("full", "offload-all", "sink-window", "quest:budget_tokens=64", "full@heads=4+offload-all@heads=4"),
    *("snapkv:budget_tokens=37,observation_tokens=8", "infllm:window_tokens=57,block_tokens=4,execution_tokens=8"),
    "squeezed-attention:keep=1,observation_tokens=4,centroid_share=0.2",
    "retrieval-attention:sink_tokens=2,window_tokens=8,top_k=27,index=flat",
    "retroinfer:window_tokens=4,cluster_tokens=4,update_tokens=8,retrieval=1,estimation=0",
]
LOSSY = ["shadowkv:chunk_tokens=2,budget_tokens=6,rank=8,outlier_chunks=3", "quest:budget_tokens=16,page_tokens=4"]
ANYWHERE = ("full", "offload-all", "quest", "snapkv", "shadowkv")  # know padding behind real tokens
ANY_MASK = ("full", "offload-all")
NEW = 8


def tiny(kind="Llama", **options):
    config = getattr(transformers, f"{kind}Config")(
        **{
            "vocab_size": 101,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": None,
        }
        | options
    )
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(config).eval().float()


@pytest.fixture(scope="module")
def model():
    return tiny()


def some_ids(tokens=37, batch=1, seed=2):
    return torch.randint(3, 101, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def generate(model, ids, mask=None, **options):
    given = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **given)


def positions(mask):
    return mask.cumsum(1).sub(1).clamp(min=0)


# -- gradients, inference mode, autocast -----------------------------------------------------------------------------


@pytest.mark.parametrize("policy", EXACT + LOSSY)
def test_inference_mode_and_gradients_change_no_token(model, policy):
    """A cache may even be begun under one and go on under another."""
    ids = some_ids()
    with offload(model, parse_policy(policy), max_new_tokens=40) as kv:
        expected = generate(model, ids, past_key_values=(plain := kv.cache()))
        longer = torch.cat([expected, some_ids(5, seed=3)], dim=1)
        after = generate(model, longer, past_key_values=plain)
        with torch.inference_mode():
            cache = kv.cache()
            assert torch.equal(generate(model, ids, past_key_values=cache), expected)
        assert torch.equal(generate(model, longer, past_key_values=cache), after)
        with_gradients = kv.cache()
        logits = model(ids, past_key_values=with_gradients).logits
        assert logits.requires_grad
        for _, held in with_gradients.arena.held():
            assert held.grad_fn is None
        with torch.no_grad():
            assert torch.equal(logits, model(ids, past_key_values=kv.cache()).logits)
        with pytest.raises(ValueError, match="no gradient passes through a kvsim cache"):
            logits.sum().backward()
        with torch.inference_mode():
            generate(model, ids, num_beams=2, past_key_values=kv.cache())


@pytest.mark.parametrize("policy", EXACT)
def test_autocast_is_right(model, policy):
    """Keys are stored as they come; stock attention rounds its queries and keys to bf16, 2**-9 of values below 1."""
    ids = some_ids()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(ids).logits
        with offload(model, parse_policy(policy), max_new_tokens=16) as kv:
            cache = kv.cache()
            got = [model(ids[:, :36], past_key_values=cache).logits, model(ids[:, 36:], past_key_values=cache).logits]
    torch.testing.assert_close(torch.cat(got, dim=1).float(), expected.float(), atol=2e-2, rtol=0)


def test_a_dtype_that_the_cache_cannot_hold_is_refused():
    half = tiny().to(torch.float16)
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
        offload(half, parse_policy("full")) as kv,
        pytest.raises(ValueError, match=r"stores torch.float16, as the model was loaded; leave out torch.autocast"),
    ):
        half(some_ids(), past_key_values=kv.cache())


# -- masks -----------------------------------------------------------------------------------------------------------


def two_steps(model, cache, ids, mask, extra):
    """Logits of a prompt and of one token after it, at the real tokens."""
    longer = torch.cat([mask, torch.ones(len(ids), 1, dtype=mask.dtype)], dim=1)
    at = positions(longer)
    with torch.no_grad():
        one = model(ids, attention_mask=mask, position_ids=at[:, :-1], past_key_values=cache).logits
        two = model(extra, attention_mask=longer, position_ids=at[:, -1:], past_key_values=cache).logits
    return torch.cat([one, two], dim=1)[longer.bool()]


@pytest.mark.parametrize("policy", [*EXACT, "shadowkv:budget_tokens=4096"])
@pytest.mark.parametrize("where", ["front", "middle", "end"])
def test_padding_is_honoured_or_refused(model, policy, where):
    ids, extra = some_ids(batch=2), some_ids(1, 2, seed=4)
    mask = torch.ones_like(ids)
    mask[1, {"front": slice(0, 5), "middle": slice(12, 19), "end": slice(33, 37)}[where]] = 0
    expected = two_steps(model, transformers.DynamicCache(), ids, mask, extra)
    with offload(model, parse_policy(policy), max_new_tokens=16) as kv:
        name = "full" if policy.startswith("shadowkv") else policy.partition(":")[0].partition("@")[0]
        if where == "front" or name in ANYWHERE:
            got = two_steps(model, kv.cache(), ids, mask, extra)
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
            return
        with pytest.raises(ValueError, match=f"padding behind real tokens, and {name} knows it only before them"):
            two_steps(model, kv.cache(), ids, mask, extra)


@pytest.mark.parametrize("policy", EXACT)
def test_what_follows_the_end_of_a_text_turns_out_to_be_padding(model, policy):
    """One text of a batch ends early; in the next turn what was generated behind its end is masked."""
    ids = some_ids(batch=2)
    with offload(model, parse_policy(policy), max_new_tokens=40) as kv:
        cache = kv.cache()
        out = generate(model, ids, past_key_values=cache)
        longer = torch.cat([out, some_ids(4, 2, seed=4)], dim=1)
        mask = torch.ones_like(longer)
        mask[1, 41:45] = 0
        if policy.partition(":")[0].partition("@")[0] in ANYWHERE:
            got = generate(model, longer, mask, past_key_values=cache)
            reference = transformers.DynamicCache()
            generate(model, ids, past_key_values=reference)
            assert torch.equal(got, generate(model, longer, mask, past_key_values=reference))
        else:
            with pytest.raises(ValueError, match="has padding behind real tokens"):
                generate(model, longer, mask, past_key_values=cache)


@pytest.mark.parametrize("policy", EXACT)
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_a_mask_of_four_dimensions_is_honoured_or_refused(model, policy, kind):
    ids = some_ids(batch=2)
    causal = torch.ones(37, 37, dtype=torch.bool).tril()
    padded = causal.expand(2, 1, 37, 37).clone()
    padded[1, :, :, :5] = False
    packed = causal & (torch.arange(37)[:, None] // 20 == torch.arange(37) // 20)  # two texts that see their own alone
    as_given = lambda mask: mask if kind == torch.bool else torch.zeros(mask.shape).masked_fill_(~mask, float("-inf"))  # noqa: E731
    name = policy.partition(":")[0].partition("@")[0]
    for mask, honoured in ((padded, True), (packed.expand(2, 1, 37, 37), name in ANY_MASK)):
        real = mask[:, 0].diagonal(dim1=1, dim2=2)
        with torch.no_grad(), offload(model, parse_policy(policy), max_new_tokens=16) as kv:
            if honoured:
                got = model(ids, attention_mask=as_given(mask), past_key_values=kv.cache()).logits
                break_nan = as_given(mask | ~mask.any(-1, keepdim=True))  # stock gives NaN for padding
            else:
                with pytest.raises(ValueError, match=f"says more than which tokens are padding, and {name} honours"):
                    model(ids, attention_mask=as_given(mask), past_key_values=kv.cache())
                continue
        with torch.no_grad():
            expected = model(ids, attention_mask=break_nan).logits
        torch.testing.assert_close(got[real], expected[real], atol=2e-5, rtol=0)


@pytest.mark.parametrize("policy", EXACT)
def test_masks_that_cannot_be_meant_are_refused(model, policy):
    ids = some_ids(batch=2)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    bias = torch.zeros(2, 1, 37, 37)
    bias[0, 0, 3, 1] = -0.5
    with torch.no_grad(), offload(model, parse_policy(policy), max_new_tokens=16) as kv:
        with pytest.raises(ValueError, match=r"adds -0\.5 to scores"):
            model(ids, attention_mask=bias, past_key_values=kv.cache())
        cache = kv.cache()
        model(ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(ValueError, match=r"does not fit 38 tokens \(37 cached, 1 new\) of 2 sequences"):
            model(ids[:, :1], attention_mask=mask[:, :1], past_key_values=cache)
        if policy.partition(":")[0].partition("@")[0] in ANY_MASK:
            return
        cache = kv.cache()
        model(ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(ValueError, match="mask has changed for tokens that are cached"):
            model(ids[:, :1], past_key_values=cache)


# -- uses that have no answer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", EXACT)
def test_a_cache_that_does_not_fit_its_inputs(model, policy):
    ids = some_ids()
    with offload(model, parse_policy(policy), max_new_tokens=40) as kv:
        cache = kv.cache()
        out = generate(model, ids, past_key_values=cache)
        with pytest.raises(ValueError, match="the cache has 44 tokens and the prompt 44: nothing is new"):
            generate(model, out[:, :44], past_key_values=cache)
        with pytest.raises(ValueError, match="the cache has 44 tokens and the prompt 37: nothing is new"):
            generate(model, ids, past_key_values=cache)
        with pytest.raises(ValueError, match="no token is new: the cache has 44 already"), torch.no_grad():
            model(ids[:, :0], past_key_values=cache)
        with pytest.raises(ValueError, match="the cache holds 1 sequences and 2 are given"):
            generate(model, some_ids(50, 2), past_key_values=cache)
        assert torch.equal(generate(model, out, past_key_values=cache), generate(model, out))  # nothing was lost


@pytest.mark.parametrize("policy", EXACT)
@pytest.mark.parametrize("at", ["prompt", "step"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_cache_is_refused_until_it_is_reset(model, policy, at, error):
    ids, expected, calls = some_ids(), generate(model, some_ids()), iter(range(99))

    def break_off(*_):
        if next(calls) == (0 if at == "prompt" else 3):
            raise error("by hand")

    with offload(model, parse_policy(policy), max_new_tokens=40) as kv:
        cache = kv.cache()
        with model.model.layers[1].register_forward_pre_hook(break_off), pytest.raises(error, match="by hand"):
            generate(model, ids, past_key_values=cache)
        with pytest.raises(ValueError, match="a forward with this cache has not come to its end"):
            generate(model, ids, past_key_values=cache)
        cache.reset()
        assert torch.equal(generate(model, ids, past_key_values=cache), expected)


def test_what_cannot_be_executed_is_refused(model):
    ids = some_ids()
    with (
        offload(model, parse_policy("full"), max_new_tokens=40) as kv,
        pytest.raises(ValueError, match="a policy does not compute all weights"),
    ):
        generate(model, ids, past_key_values=kv.cache(), output_attentions=True, return_dict_in_generate=True)
    compiled_in_place, by_hand = tiny(), tiny()
    compiled_in_place.compile()
    by_hand.model.layers[0].forward = torch.compile(by_hand.model.layers[0].forward)
    for compiled in (torch.compile(model), compiled_in_place, by_hand):
        with (
            pytest.raises(ValueError, match=r"the model is compiled \(torch.compile\)"),
            offload(compiled, parse_policy("full")),
        ):
            pass
    dropping = tiny(attention_dropout=0.5)
    with offload(dropping, parse_policy("full")) as kv, torch.no_grad():
        dropping.train()
        with pytest.raises(ValueError, match=r"attention dropout of 0.5 is not executed under offload\(\)"):
            dropping(ids, past_key_values=kv.cache())
    with (
        pytest.raises(ValueError, match=r"with dropout in its attention; call model.eval\(\)"),
        offload(dropping, parse_policy("full")),
    ):
        pass


def test_attention_of_another_kind_is_refused():
    """DiffLlama attends twice and subtracts: what keeps every key hands them back to it, what selects cannot."""
    diff, ids = tiny("DiffLlama"), some_ids()
    with pytest.raises(ValueError, match="diffllama"), offload(diff, parse_policy("quest")):
        pass
    with offload(diff, parse_policy("full"), max_new_tokens=40) as kv:
        assert torch.equal(generate(diff, ids, past_key_values=kv.cache()), generate(diff, ids))


def test_what_would_be_silent_is_said(model, caplog):
    ids = some_ids()
    with caplog.at_level("WARNING", logger="runtime"):
        with offload(model, parse_policy("offload-all")) as kv:
            generate(model, ids)  # forgot the cache
            generate(model, ids)
        assert not kv.moved_bytes
        assert [r.getMessage()[:39] for r in caplog.records] == ["a forward inside offload() has no cache"]
        caplog.clear()
        with offload(tiny("Mistral", sliding_window=8), parse_policy("quest")):
            pass
        assert [r.getMessage() for r in caplog.records] == [
            "quest applies to no layer of this model: mistral has 2, none has full attention"
        ]
        caplog.clear()
        for policy in ("quest", "full@layers=0-1+offload-all"):  # Quest leaves the first two layers dense
            with offload(model, parse_policy(policy)):
                pass
        assert [r.getMessage().partition(": ")[2] for r in caplog.records] == [
            "llama has 2, all 2 that hold all tokens stay dense"
        ] * 2
        caplog.clear()
        for policy in (*EXACT, *LOSSY):
            if not policy.startswith("quest"):
                with offload(model, parse_policy(policy)):
                    pass
        with offload(model, parse_policy("quest:dense_layers=1")):
            pass
        assert not caplog.records


@pytest.mark.parametrize("policy", ["full", "sink-window", "shadowkv:budget_tokens=4096"])
def test_a_switch_of_long_rope_is_refused(policy):
    """Up to 40 positions keys are rotated by short factors, beyond them by long ones."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 40,
    }
    phi = tiny("Phi3", rope_parameters=rope, original_max_position_embeddings=40)
    with offload(phi, parse_policy(policy), max_new_tokens=32) as kv:
        with pytest.raises(ValueError, match="LongRoPE"):
            generate(phi, some_ids(37), past_key_values=kv.cache())
        cache = kv.cache()
        with torch.no_grad():
            phi(some_ids(37), past_key_values=cache)
            with pytest.raises(ValueError, match="LongRoPE"):
                phi(some_ids(5), past_key_values=cache)
        for ids in (some_ids(30), some_ids(45)):  # all short, all long
            assert torch.equal(generate(phi, ids, past_key_values=kv.cache()), generate(phi, ids))


def test_every_executed_policy_is_tried_here():
    from policies import POLICIES

    tried = {text.partition(":")[0].partition("@")[0] for text in EXACT + LOSSY}
    assert tried == {name for name in POLICIES if find_spec(f"runtime.methods.{name.replace('-', '_')}")}
