"""Copies of caches, and batches that grow and shrink: each goes on as a fresh run of the same policy would."""

import copy
from importlib.util import find_spec

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvsim.cli.validate import COMPOSED, TRIED  # noqa: E402
from kvsim.plans.replay import replay_moved_bytes  # noqa: E402
from policies import parse_policy  # noqa: E402
from policies.plan import Tier  # noqa: E402
from runtime import offload  # noqa: E402

EXECUTED = [
    *(
        text
        for name, texts in {"full": ("full",), **TRIED}.items()
        if find_spec(f"runtime.methods.{name.replace('-', '_')}")
        for text in texts[:1]
    ),
    "retrieval-attention:sink_tokens=2,window_tokens=8,top_k=5,index=ivf,lists=9",
    *COMPOSED,
]
PREFIX, TURN, NEW = 150, 4, 5
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "eos_token_id": None,
}


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**SIZES)
    return transformers.AutoModelForCausalLM.from_config(config).eval().float()


@pytest.fixture(scope="module")
def gemma():
    """Sliding windows on two of three layers, which stay as Hugging Face has them."""
    torch.manual_seed(1)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Gemma3TextConfig(**SIZES, layer_types=kinds, sliding_window=16)
    return transformers.AutoModelForCausalLM.from_config(config).eval().float()


def some_ids(batch, tokens, seed):
    return torch.randint(3, 97, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def prefilled(model, kv, prefix):
    cache = kv.cache()
    with torch.no_grad():
        model(input_ids=prefix, past_key_values=cache)
    return cache


def go_on(model, cache, ids):
    mask = torch.ones_like(ids)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **options)[:, ids.shape[1] :]


@pytest.mark.parametrize("policy", EXECUTED)
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_a_prefix_is_forked(name, policy, request):
    """Two questions after one prefix, each on a copy, against a cache that has seen nothing else."""
    model, prefix = request.getfixturevalue(name), some_ids(1, PREFIX, 2)
    prompts = [torch.cat([prefix, some_ids(1, TURN, seed)], dim=1) for seed in (3, 4)]
    with offload(model, parse_policy(policy), max_new_tokens=2 * (TURN + NEW)) as kv:
        alone = [go_on(model, prefilled(model, kv, prefix), prompt) for prompt in prompts]
        original = prefilled(model, kv, prefix)
        forks = [copy.deepcopy(original) for _ in prompts]
        assert [
            torch.equal(go_on(model, *pair), tokens) for *pair, tokens in zip(forks, prompts, alone, strict=True)
        ] == [
            True,
            True,
        ]
        again = copy.deepcopy(forks[0])  # of a cache in the middle of its generation
        longer = torch.cat([prompts[0], alone[0], some_ids(1, 1, 5)], dim=1)
        assert torch.equal(go_on(model, again, longer), go_on(model, forks[0], longer))
        assert torch.equal(go_on(model, original, prompts[1]), alone[1])


@pytest.mark.parametrize("policy", EXECUTED)
def test_a_batch_is_repeated_and_selected(gemma, policy):
    prefix = some_ids(2, PREFIX, 2)
    with offload(gemma, parse_policy(policy), max_new_tokens=TURN + NEW) as kv:
        both = torch.cat([prefix, some_ids(2, TURN, 3)], dim=1)
        expected = go_on(gemma, prefilled(gemma, kv, prefix), both)
        cache = prefilled(gemma, kv, prefix)
        cache.batch_repeat_interleave(3)
        assert cache.arena.batch == 6
        cache.batch_select_indices(torch.tensor([5, 0, 1]))
        rows = torch.tensor([1, 0, 0])
        assert torch.equal(go_on(gemma, cache, both[rows]), expected[rows])


@pytest.mark.parametrize("policy", EXECUTED)
def test_a_prompt_is_forked_in_the_middle(llama, policy):
    """With what only a prompt needs, and the work on the whole model that follows its last chunk."""
    ids = some_ids(2, PREFIX + 1, 2)
    with offload(llama, parse_policy(policy), max_new_tokens=4) as kv, torch.no_grad():
        first = kv.cache(prompt_tokens=PREFIX)
        llama(ids[:, :100], past_key_values=first)
        second = copy.deepcopy(first)
        steps = []
        for cache in (first, second):
            chunk = llama(ids[:, 100:PREFIX], past_key_values=cache).logits
            steps.append(torch.cat([chunk, llama(ids[:, PREFIX:], past_key_values=cache).logits], dim=1))
        assert torch.equal(*steps)
        assert first.arena.allocated_bytes == second.arena.allocated_bytes


def test_copies_have_memory_of_their_own_and_are_counted(llama):
    with offload(llama, parse_policy("offload-all"), max_new_tokens=16) as kv:
        cache = prefilled(llama, kv, some_ids(2, 20, 1))
        one = kv.footprint_bytes
        twin = copy.deepcopy(cache)
        assert kv.footprint_bytes == {tier: 2 * nbytes for tier, nbytes in one.items()} == kv.peak_footprint_bytes
        assert kv.caches == [cache, twin]
        hosts = [held.arena.kept(0)["kv_host"] for held in (cache, twin)]
        assert torch.equal(*hosts)
        cache.reset()
        assert not hosts[0].any()
        assert hosts[1].any()
        assert kv.footprint_bytes == one
    assert not hosts[1].any()
    assert not kv.footprint.now_bytes
    assert kv.footprint_bytes == one
    for gone in (cache, twin):
        with pytest.raises(ValueError, match=r"offload\(\) context of this cache has ended"):
            copy.deepcopy(gone)


def test_a_copy_is_new_sequences_that_begin_after_the_prefix(llama):
    """The recording replays to the bytes that were moved: the prefix once, the questions once each."""
    prefix = some_ids(1, 40, 1)
    with offload(llama, parse_policy("offload-all"), max_new_tokens=16) as kv:
        cache = prefilled(llama, kv, prefix)
        for seed in (2, 3):
            go_on(llama, copy.deepcopy(cache), torch.cat([prefix, some_ids(1, TURN, seed)], dim=1))
        recording, moved, shape = kv.counts, +kv.moved_bytes, kv.shape
    first = {row[0]: row[4] for row in reversed(recording.steps.tolist())}
    assert first == {0: 0, 1: 40, 2: 40}
    assert replay_moved_bytes(recording, parse_policy("offload-all"), shape) == moved


def test_a_copy_that_does_not_fit_is_refused(llama, monkeypatch):
    with offload(llama, parse_policy("full"), max_new_tokens=16) as kv:
        cache = prefilled(llama, kv, some_ids(1, 20, 1))
        monkeypatch.setattr("runtime.memory.free_host_bytes", lambda: 10_000)
        with pytest.raises(MemoryError, match="the cache needs 13,824 bytes"):  # 36 tokens, 3 layers, 2 x 2 x 8 fp32
            copy.deepcopy(cache)
        with pytest.raises(MemoryError, match="the cache needs 27,648 bytes"):
            cache.batch_repeat_interleave(2)
        monkeypatch.undo()
        assert len(kv.caches) == 1
        assert go_on(llama, cache, some_ids(1, 25, 1)).shape == (1, NEW)


def test_an_empty_cache_and_a_single_layer(llama):
    with offload(llama, parse_policy("full"), max_new_tokens=16) as kv:
        ids = some_ids(1, 20, 1)
        assert torch.equal(go_on(llama, copy.deepcopy(kv.cache()), ids), go_on(llama, kv.cache(), ids))
        with pytest.raises(ValueError, match="copy the cache"):
            copy.deepcopy(kv.cache().layers[0])
        with pytest.raises(ValueError, match="select at least one"):
            prefilled(llama, kv, ids).batch_select_indices(torch.zeros(1, dtype=torch.bool))


def test_a_footprint_outlives_its_caches(llama):
    """A cache that nobody names is gone when `generate` returns; what it held is told all the same."""
    with offload(llama, parse_policy("full"), max_new_tokens=16) as kv:
        assert not kv.footprint_bytes
        go_on(llama, kv.cache(), some_ids(2, 20, 1))
        assert not kv.caches
        assert not kv.footprint.now_bytes
        last = 2 * 36 * 3 * 2 * 2 * 8 * 4  # two sequences of 20 + 16 tokens, three layers, keys and values, 2 x 8 fp32
        assert kv.footprint_bytes == kv.peak_footprint_bytes == {Tier.HBM: last}
        go_on(llama, kv.cache(), some_ids(1, 20, 1))
    assert kv.footprint_bytes == {Tier.HBM: last // 2}
    assert kv.peak_footprint_bytes == {Tier.HBM: last}
