"""Contexts that nest, end in any order or belong to threads: tokens of stock inside, a clear error outside."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

from policies import parse_policy  # noqa: E402
from runtime import offload  # noqa: E402

EXACT = [
    *("full", "offload-all", "sink-window", "quest:budget_tokens=64", "full@heads=4+offload-all@heads=4"),
    *("snapkv:budget_tokens=30,observation_tokens=8", "infllm:window_tokens=57,block_tokens=4,execution_tokens=8"),
    "squeezed-attention:keep=1,observation_tokens=4,centroid_share=0.2",
    "retrieval-attention:sink_tokens=2,window_tokens=8,top_k=20,index=flat",
    "retroinfer:window_tokens=4,cluster_tokens=4,update_tokens=8,retrieval=1,estimation=0",
    "shadowkv:budget_tokens=4096",
]
NEW = 8


def tiny(seed=1, layers=2, **options):
    config = transformers.LlamaConfig(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=None,
        **options,
    )
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config).eval().float()


@pytest.fixture(scope="module")
def model():
    return tiny()


def some_ids(seed, tokens=30):
    return torch.randint(3, 101, (1, tokens), generator=torch.Generator().manual_seed(seed))


def generate(model, ids, **options):
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **options)


def is_as_before(model):
    modules = [model, *model.modules()]
    hooks = [m for m in modules if m._forward_pre_hooks or m._forward_hooks]
    own = "prepare_inputs_for_generation" in vars(model)
    return model.config._attn_implementation == "sdpa" and not hooks and not own


def test_policies_nest_on_one_model(model):
    """Each cache has terms of its own; the outer one goes on when the inner context has ended."""
    one, two = some_ids(1), some_ids(2)
    expected, other = generate(model, one), generate(model, two)
    with offload(model, parse_policy("offload-all")) as outer:
        cache = outer.cache()
        with offload(model, parse_policy("sink-window")) as inner:
            assert torch.equal(generate(model, two, past_key_values=inner.cache()), other)
            assert torch.equal(generate(model, one, past_key_values=cache), expected)
            assert not inner.moved_bytes
        longer = torch.cat([expected, some_ids(3, 4)], dim=1)
        assert torch.equal(generate(model, longer, past_key_values=cache), generate(model, longer))
        assert outer.moved_bytes
    assert is_as_before(model)


def test_contexts_end_in_any_order(model):
    ids = some_ids(1)
    expected = generate(model, ids)
    first, second = (offload(model, parse_policy(policy)) for policy in ("offload-all", "full"))
    one, two = first.__enter__(), second.__enter__()
    ended, cache = one.cache(), two.cache()
    first.__exit__(None, None, None)
    with pytest.raises(ValueError, match="context of this cache has ended"):
        generate(model, ids, past_key_values=ended)
    with pytest.raises(ValueError, match="context of this cache has ended"):
        one.cache()
    assert torch.equal(generate(model, ids, past_key_values=cache), expected)
    second.__exit__(None, None, None)
    assert is_as_before(model)


def test_a_cache_is_refused_where_its_attention_is_not(model):
    ids, other = some_ids(1), tiny(seed=2)
    with offload(model, parse_policy("full")) as kv:
        cache = kv.cache()
        generate(model, ids, past_key_values=cache)
        with pytest.raises(ValueError, match=r"given to a model that is not under its offload\(\)"):
            generate(other, ids, past_key_values=kv.cache())
        with pytest.raises(ValueError, match=r"made for another model"), offload(other, parse_policy("full")):
            generate(other, ids, past_key_values=kv.cache())
        fresh = kv.cache()
        model.set_attn_implementation("eager")
        with pytest.raises(ValueError, match="attention implementation was set to 'eager' inside"):
            generate(model, ids, past_key_values=fresh)
    assert is_as_before(model)
    for used in (cache, fresh):
        with pytest.raises(ValueError, match="context of this cache has ended"), torch.no_grad():
            model(ids, past_key_values=used)


def test_a_single_step_whose_attention_went_elsewhere_gives_no_logits(model):
    """With one layer one forward is the last chance to notice."""
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
    for used in (tiny(layers=1), model):
        with offload(used, parse_policy("full")) as kv, torch.no_grad():
            transformers.AttentionInterface.register("kvsim_tiers", stock)  # until the next context
            cache = kv.cache()
            with pytest.raises(ValueError, match="attention of layer 0 did not come through the runtime"):
                used(some_ids(1), past_key_values=cache)
            with pytest.raises(ValueError, match="not come to its end"):
                used(some_ids(1), past_key_values=cache)


@pytest.mark.parametrize("policy", EXACT)
def test_threads_share_a_model_and_a_context(model, policy):
    prompts = [some_ids(seed, 26 + seed) for seed in range(4)]
    expected = [generate(model, ids) for ids in prompts]
    with offload(model, parse_policy(policy), max_new_tokens=16) as kv, ThreadPoolExecutor(4) as pool:
        caches = [kv.cache() for _ in prompts]
        got = list(pool.map(lambda ids, cache: generate(model, ids, past_key_values=cache), prompts, caches))
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
        steps = kv.counts.steps
        assert sorted(set(steps[:, 0].tolist())) == [0, 1, 2, 3]
        new = {s: int(steps[steps[:, 0] == s, -1].sum()) for s in range(4)}  # on two layers
        assert sorted(new.values()) == [2 * (ids.shape[1] + NEW - 1) for ids in prompts]


def test_a_thread_has_a_context_of_its_own(model):
    """On one model, under different policies, with bytes of their own; then the model is as before."""
    ids = some_ids(1)
    expected = generate(model, ids)
    policies = [parse_policy(text) for text in ("full", "offload-all", "sink-window", "quest:budget_tokens=64")]
    together = threading.Barrier(len(policies))

    def run(policy):
        together.wait()
        with offload(model, policy, max_new_tokens=16) as kv:
            out = [generate(model, ids, past_key_values=kv.cache()) for _ in range(2)]
        return out, +kv.moved_bytes

    with offload(model, policies[1], max_new_tokens=16) as kv:
        for _ in range(2):
            generate(model, ids, past_key_values=kv.cache())
    with ThreadPoolExecutor(len(policies)) as pool:
        done = list(pool.map(run, policies))
    assert all(torch.equal(out, expected) for outs, _ in done for out in outs)
    assert [moved for _, moved in done] == [{}, +kv.moved_bytes, {}, {}]
    assert is_as_before(model)


def test_a_stream_that_outlives_the_context_ends_in_an_error(model):
    """The thread may finish its step, and never gets logits of memory that was given back."""
    failed, ids, expected = [], some_ids(1), generate(model, some_ids(1))

    class Streamer:
        def __init__(self):
            self.came, self.enough, self.ended = [], threading.Event(), threading.Event()

        def put(self, value):
            self.came += value.flatten().tolist()
            if len(self.came) == ids.shape[1] + 3:
                self.enough.set()
                self.ended.wait(60)

        def end(self):
            pass

    def run(cache, streamer):
        try:
            generate(model, ids, past_key_values=cache, streamer=streamer)
        except ValueError as error:
            failed.append(str(error))

    streamer = Streamer()
    with offload(model, parse_policy("offload-all"), max_new_tokens=16) as kv:
        thread = threading.Thread(target=run, args=(kv.cache(), streamer))
        thread.start()
        assert streamer.enough.wait(60)
    streamer.ended.set()
    thread.join()
    assert [message[:28] for message in failed] == ["the offload() context of thi"]
    assert streamer.came == expected[0, : ids.shape[1] + 3].tolist()
    assert is_as_before(model)


def test_a_streamer_inside_the_context(model, tiny_llama):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    used = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    ids = torch.randint(3, 8192, (1, 20), generator=torch.Generator().manual_seed(3))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = tokenizer.decode(used.generate(ids, **options)[0, 20:])
    with offload(used, parse_policy("offload-all"), max_new_tokens=16) as kv:
        streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        given = {"past_key_values": kv.cache(), "streamer": streamer, **options}
        thread = threading.Thread(target=used.generate, args=(ids,), kwargs=given)
        thread.start()
        assert "".join(streamer) == expected
        thread.join()


def test_what_is_copied_or_shared_of_a_model_is_as_before(model):
    """A config that two models share, and a model that is copied inside a context."""
    twin = type(model)(model.config).eval()
    ids = some_ids(1)
    expected = generate(model, ids)
    with offload(model, parse_policy("full")) as one, offload(twin, parse_policy("full")) as two:
        assert torch.equal(generate(model, ids, past_key_values=one.cache()), expected)
        generate(twin, ids, past_key_values=two.cache())
        inside = copy.deepcopy(model)
    assert is_as_before(model)
    assert is_as_before(twin)
    assert torch.equal(generate(inside, ids), expected)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_a_forward_without_a_cache_of_ours_is_that_of_stock(kind):
    """To the bit, also in a thread that has begun it before the context and ends it after."""
    used = tiny()
    used.set_attn_implementation(kind)
    ids = torch.randint(3, 101, (2, 30), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with torch.no_grad():
        expected = used(ids, attention_mask=mask).logits
        with offload(used, parse_policy("offload-all")):
            assert torch.equal(used(ids, attention_mask=mask).logits, expected)
    context = offload(used, parse_policy("offload-all"))
    for act in (context.__enter__, lambda: context.__exit__(None, None, None)):

        def meanwhile(*_, act=act):
            act()

        with used.model.layers[1].register_forward_pre_hook(meanwhile), torch.no_grad():
            got = used(ids, attention_mask=mask).logits
        torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=2e-5, rtol=0)
    assert used.config._attn_implementation == kind
