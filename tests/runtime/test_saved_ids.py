"""A cache knows the ids that it holds: other ids, another padding or another batch are refused, never computed."""

import copy

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from policies import parse_policy  # noqa: E402
from runtime import offload  # noqa: E402

PREFIX, NEW = 40, 5
POLICIES = ["full", "quest:budget_tokens=32,page_tokens=8", "sink-window:window_tokens=8"]


@pytest.fixture(scope="module")
def model():
    config = transformers.LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=None,
    )
    torch.manual_seed(5)
    return transformers.AutoModelForCausalLM.from_config(config).eval().float()


def prompts(tokens=PREFIX, batch=2, seed=3):
    return torch.randint(3, 101, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def generate(model, ids, cache, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **options)


@pytest.fixture
def offloaded(model):
    with offload(model, parse_policy("full"), max_new_tokens=64) as kv, torch.no_grad():
        yield kv


def with_turn(ids, seed=9):
    return torch.cat([ids, prompts(6, len(ids), seed)], dim=1)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("built", ["forward", "generate", "chunks", "beams"])
def test_other_ids_are_refused_without_any_argument(model, policy, built, tmp_path):
    ids, path = prompts(), tmp_path / "prefix"
    with offload(model, parse_policy(policy), max_new_tokens=64) as kv, torch.no_grad():
        if built == "forward":
            cache, out = kv.cache(), ids
            model(ids, past_key_values=cache)
        elif built == "generate":
            out = generate(model, ids, cache := kv.cache())
        elif built == "chunks":
            out = generate(model, ids, cache := kv.cache(prompt_tokens=PREFIX), prefill_chunk_size=7)
        else:
            generate(model, ids, cache := kv.cache(), num_beams=2)
            out = cache.ids
        assert torch.equal(cache.ids, out[:, : cache.get_seq_length()])
        kv.save(cache, path)
        turn = with_turn(out)
        expected = generate(model, turn, cache)
        assert torch.equal(generate(model, turn, kv.load(path)), expected)
        for row, token in ((0, 0), (len(out) - 1, cache.ids.shape[1] - NEW - 8)):
            other = turn.clone()
            other[row, token] = 1 + turn[row, token] % 99
            there, here = turn[row, token], other[row, token]
            says = (
                rf"token {token} of sequence {row} has the id {there} in the cache and {here} here: .* another prompt"
            )
            with pytest.raises(ValueError, match=says):
                generate(model, other, kv.load(path))


def test_the_padding_belongs_to_the_ids(model, offloaded, tmp_path):
    ids, path = prompts(), tmp_path / "prefix"
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    generate(model, ids, cache := offloaded.cache(), mask, max_new_tokens=1)
    offloaded.save(cache, path)
    turn, longer = with_turn(ids), torch.cat([mask, torch.ones(2, 6, dtype=torch.int64)], dim=1)
    expected = generate(model, turn, cache, longer)
    padded = turn.clone()
    padded[1, :7] = 77  # what stands in padding is nothing
    assert torch.equal(generate(model, padded, offloaded.load(path), longer)[:, -NEW:], expected[:, -NEW:])
    with pytest.raises(ValueError, match="token 0 of sequence 1 is padding in the cache and real here"):
        generate(model, turn, offloaded.load(path))
    longer[0, 3] = 0
    with pytest.raises(ValueError, match="token 3 of sequence 0 is real in the cache and padding here"):
        generate(model, turn, offloaded.load(path), longer)


def test_what_followed_the_end_of_a_sequence_may_become_padding(model, offloaded):
    ids = prompts()
    out = generate(model, ids, cache := offloaded.cache())
    turn = with_turn(out)
    mask = torch.ones_like(turn)
    mask[0, PREFIX + 1 : PREFIX + NEW] = 0
    turn[0, PREFIX + 1 : PREFIX + NEW] = 0
    cache.heard.check(cache.get_seq_length(), turn, mask)
    mask[0, PREFIX + NEW - 2] = 1
    with pytest.raises(ValueError, match=f"token {PREFIX + 1} of sequence 0 is real in the cache and padding here"):
        cache.heard.check(cache.get_seq_length(), turn, mask)


def test_another_batch_is_refused(model, offloaded, tmp_path):
    model(prompts(), past_key_values=(cache := offloaded.cache()))
    offloaded.save(cache, tmp_path / "x")
    with pytest.raises(ValueError, match="the cache holds 2 sequences and 3 are given"):
        generate(model, with_turn(prompts(batch=3)), offloaded.load(tmp_path / "x"))
    with pytest.raises(ValueError, match="the cache holds 2 sequences and 4 are given"):
        generate(model, with_turn(prompts()), offloaded.load(tmp_path / "x"), num_beams=2)


def test_new_ids_alone_need_the_whole_mask(model, offloaded, tmp_path):
    ids = prompts()
    model(ids, past_key_values=(cache := offloaded.cache()))
    offloaded.save(cache, tmp_path / "x")
    turn = with_turn(ids)
    expected = generate(model, turn, cache)[:, -NEW:]
    new = turn[:, PREFIX:]
    loaded = offloaded.load(tmp_path / "x")
    assert torch.equal(generate(model, new, loaded, torch.ones_like(turn))[:, -NEW:], expected)
    mask = torch.ones_like(turn)
    mask[1, 2] = 0
    with pytest.raises(ValueError, match="token 2 of sequence 1 is real in the cache and padding here"):
        generate(model, new, offloaded.load(tmp_path / "x"), mask)


@pytest.mark.parametrize("given", [PREFIX, PREFIX - 1, 3])
def test_a_prompt_with_nothing_new_is_refused(model, offloaded, given):
    ids = prompts()
    model(ids, past_key_values=(cache := offloaded.cache()))
    with pytest.raises(ValueError, match=f"the cache (holds|has) {PREFIX} tokens"):
        generate(model, ids[:, :given], cache)
    assert cache.get_seq_length() == PREFIX


def test_chunks_do_not_go_on_from_a_cache(model, offloaded):
    model(ids := prompts(), past_key_values=(cache := offloaded.cache()))
    with pytest.raises(ValueError, match=r"the cache holds 40 tokens, and 8 ids .* without prefill_chunk_size"):
        generate(model, with_turn(ids), cache, prefill_chunk_size=8)


def test_a_forward_of_ones_own_is_checked_when_loading(model, offloaded, tmp_path):
    ids = prompts()
    model(ids, past_key_values=(cache := offloaded.cache()))
    offloaded.save(cache, path := tmp_path / "x")
    new = prompts(1, seed=8)
    expected = model(new, past_key_values=cache).logits
    for right in (ids, with_turn(ids), ids.int()):
        assert torch.equal(model(new, past_key_values=offloaded.load(path, ids=right)).logits, expected)
    with pytest.raises(ValueError, match=r"token 0 of sequence 0 has the id \d+ in the cache and \d+ here"):
        offloaded.load(path, ids=prompts(seed=4))
    with pytest.raises(ValueError, match="39 ids a sequence are given, and the cache holds 40"):
        offloaded.load(path, ids=ids[:, 1:])
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    with pytest.raises(ValueError, match="token 0 of sequence 1 is real in the cache and padding here"):
        offloaded.load(path, ids=ids, attention_mask=mask)
    with pytest.raises(ValueError, match="token 0 of sequence 1 is real in the cache and padding here"):
        model(new, past_key_values=offloaded.load(path), attention_mask=torch.cat([mask, torch.ones(2, 1)], dim=1))


def test_embeddings_are_saved_and_loaded_unbound(model, offloaded, tmp_path):
    ids = prompts()
    embedded = model.get_input_embeddings()(ids)
    model(inputs_embeds=embedded, past_key_values=(cache := offloaded.cache()))
    assert cache.ids is None
    with pytest.raises(ValueError, match=r"whose ids were never heard .* kv.save\(..., unbound=True\)"):
        offloaded.save(cache, tmp_path / "x")
    offloaded.save(cache, tmp_path / "x", unbound=True)
    with pytest.raises(ValueError, match=r"without token ids, .* use kv.load\(..., unbound=True\)"):
        offloaded.load(tmp_path / "x")
    expected = generate(model, with_turn(ids), cache)
    loaded = offloaded.load(tmp_path / "x", unbound=True)
    assert torch.equal(generate(model, with_turn(ids), loaded), expected)
    model(ids, past_key_values=(cache := offloaded.cache()))
    offloaded.save(cache, tmp_path / "x")
    options = {"max_new_tokens": 1, "pad_token_id": 0, "past_key_values": offloaded.load(tmp_path / "x")}
    with pytest.raises(ValueError, match="embeddings are given, which cannot be compared"):
        model.generate(inputs_embeds=model.get_input_embeddings()(with_turn(ids)), **options)
    with pytest.raises(ValueError, match="unbound=True compares nothing with ids"):
        offloaded.load(tmp_path / "x", ids=ids, unbound=True)


def test_a_turn_of_embeddings_ends_the_knowledge(model, offloaded, tmp_path):
    model(prompts(), past_key_values=(cache := offloaded.cache()))
    model(inputs_embeds=model.get_input_embeddings()(prompts(3)), past_key_values=cache)
    model(prompts(2), past_key_values=cache)
    assert cache.ids is None
    with pytest.raises(ValueError, match="whose ids were never heard"):
        offloaded.save(cache, tmp_path / "x")


def test_tokens_taken_back_are_forgotten(model, offloaded):
    ids = torch.tensor([5, 6, 7, 8, 9] * 8)[None]
    out = generate(model, ids, cache := offloaded.cache(), prompt_lookup_num_tokens=4, max_new_tokens=20)
    assert torch.equal(cache.ids, out[:, : cache.get_seq_length()])


def test_a_failed_forward_is_not_heard(model, offloaded):
    ids = prompts()
    model(ids, past_key_values=(cache := offloaded.cache()))

    def fail(*_):
        raise RuntimeError("by hand")

    with model.register_forward_pre_hook(fail), pytest.raises(RuntimeError, match="by hand"):
        model(prompts(3), past_key_values=cache)
    assert torch.equal(cache.ids, ids)
    model(inputs_embeds=model.get_input_embeddings()(prompts(3)), past_key_values=cache)
    assert cache.ids is None


def test_the_model_is_as_before(model):
    with offload(model, parse_policy("full")):
        assert "prepare_inputs_for_generation" in vars(model)
    assert "prepare_inputs_for_generation" not in vars(model)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    model.prepare_inputs_for_generation = mine = lambda *_args, **_given: {}
    try:
        with offload(model, parse_policy("full")):
            pass
        assert vars(model)["prepare_inputs_for_generation"] is mine
    finally:
        del model.prepare_inputs_for_generation


def test_a_copy_knows_ids_of_its_own(model, offloaded, tmp_path):
    ids = prompts()
    model(ids, past_key_values=(cache := offloaded.cache()))
    copied = copy.deepcopy(cache)
    expected = generate(model, with_turn(ids), cache)
    assert torch.equal(copied.ids, ids)
    offloaded.save(copied, tmp_path / "x")
    assert torch.equal(generate(model, with_turn(ids), offloaded.load(tmp_path / "x")), expected)
    copied.batch_select_indices(torch.tensor([1]))
    copied.batch_repeat_interleave(3)
    assert torch.equal(copied.ids, ids[[1, 1, 1]])
    with pytest.raises(ValueError, match="token 0 of sequence 0 has the id"):
        generate(model, with_turn(ids[[0, 1, 1]]), copied)


def test_what_was_built_and_loaded_in_inference_mode_goes_on_outside(model, offloaded, tmp_path):
    ids = prompts()
    with torch.inference_mode():
        model(ids, past_key_values=(cache := offloaded.cache()))
        offloaded.save(cache, tmp_path / "x")
        loaded = offloaded.load(tmp_path / "x")
    expected = generate(model, with_turn(ids), cache)
    assert torch.equal(generate(model, with_turn(ids), loaded), expected)
