"""Captured decode steps: tokens, counts and bytes are those of steps that are not, and what cannot be says why."""

import copy
import gc
import weakref

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from policies import Step, parse_policy  # noqa: E402
from runtime import offload  # noqa: E402
from runtime.call import CapturedStep  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
POLICIES = [
    "full",
    "shadowkv:budget_tokens=32,rank=16,outlier_chunks=2",
    "shadowkv:budget_tokens=48,rank=24,chunk_tokens=4,sink_tokens=0",
    "full@layers=0+shadowkv:budget_tokens=32,rank=16",
    "full@heads=4+shadowkv:budget_tokens=32,rank=16@heads=4",
    "sink-window:window_tokens=32",
    "sink-window:window_tokens=400,positions=original",  # which the sequence does not fill
    "snapkv:budget_tokens=48,observation_tokens=8",
    "snapkv:budget_tokens=48,observation_tokens=8,per=query_head",
    "quest:budget_tokens=64",
    "quest:budget_tokens=240",  # which is everything at first
    "quest:budget_tokens=48,per=query_head,sink_tokens=0",
    "squeezed-attention:observation_tokens=16",
    "squeezed-attention:observation_tokens=16,tier=ddr,levels=2",
    "squeezed-attention:observation_tokens=16,tier=ddr,budget_tokens=64",
    "retroinfer:window_tokens=16,update_tokens=64,segment_tokens=64,retrieval=0.1",
    "retroinfer:sink_tokens=0,window_tokens=0,update_tokens=64,cluster_tokens=4,retrieval=0.3,estimation=0",
]
NOT_CAPTURED = {
    "offload-all": "takes lengths from the host",
    "infllm:sink_tokens=4,window_tokens=32,block_tokens=8,top_k=2,cache_blocks=4": "takes lengths from the host",
    "retrieval-attention:sink_tokens=2,window_tokens=8,top_k=9,index=flat": "takes lengths from the host",
    "full@heads=4+offload-all@heads=4": "takes lengths from the host",
    "retroinfer:window_tokens=16,update_tokens=1,cluster_tokens=1": "takes lengths from the host",
}
PROMPT, NEW = 237, 20


@pytest.fixture(params=DEVICES)
def model(request):
    config = transformers.LlamaConfig(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    torch.manual_seed(11)
    return transformers.AutoModelForCausalLM.from_config(config).eval().float().to(request.param)


def prompts(model, batch=3, *, padded=True, tokens=PROMPT):
    ids = torch.randint(3, 101, (batch, tokens), generator=torch.Generator().manual_seed(12))
    mask = torch.ones_like(ids)
    for row, pad in zip(range(batch), (0, 5, 19), strict=False):
        if padded:
            ids[row, :pad], mask[row, :pad] = 0, 0
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


def generate(model, kv, cache=None, inputs=None, **options):
    torch.manual_seed(13)
    asked = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False} | options
    with torch.no_grad():
        return model.generate(**(inputs or prompts(model)), past_key_values=cache or kv.cache(), **asked)


def both(model, policy, run):
    """What `run(kv)` gives with and without capture, and how the steps of the former ran."""
    found = []
    for capture in (False, True):
        with offload(model, parse_policy(policy), max_new_tokens=200, capture=capture) as kv:
            got = run(kv)
            recording = kv.counts
            counts = {name: drawn.value.tolist() for name, drawn in recording.counts.items()}
            found.append((got, recording.steps.tolist(), counts, kv.moved_bytes))
    return *found, kv.replays


def was_replayed(model, replays, steps):
    assert replays.prepared == steps
    assert not replays.eager
    assert (replays.replayed > 0) == (model.device.type == "cuda")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_tokens_counts_and_bytes_are_those_of_other_steps(model, policy, padded):
    def run(kv):
        out = generate(
            model, kv, inputs=prompts(model, padded=padded), output_logits=True, return_dict_in_generate=True
        )
        return out.sequences, torch.stack(out.logits)

    (eager, *noted), (captured, *again), replays = both(model, policy, run)
    assert torch.equal(eager[0], captured[0])
    torch.testing.assert_close(eager[1], captured[1], atol=2e-5, rtol=2e-5)
    assert noted == again
    was_replayed(model, replays, NEW - 1)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_loop_of_one_s_own_and_later_turns(model, policy):
    def run(kv):
        cache, fed = kv.cache(), []
        ids = prompts(model, padded=False)["input_ids"]
        with torch.inference_mode():
            for _ in range(3):  # turns
                token = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
                for _ in range(6):
                    fed.append(token)
                    token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
                ids = torch.cat([token, ids[:, :11]], dim=1)
        return torch.cat(fed, dim=1), cache.tokens

    (eager, *noted), (captured, *again), replays = both(model, policy, run)
    assert torch.equal(eager[0], captured[0])
    assert (eager[1], noted) == (captured[1], again)
    was_replayed(model, replays, 18)


@pytest.mark.parametrize("policy", POLICIES[:2])
@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"do_sample": True}, {"num_return_sequences": 2, "do_sample": True}]
)
def test_beams_and_samples(model, policy, options):
    (eager, *_), (captured, *_), replays = both(model, policy, lambda kv: generate(model, kv, **options))
    assert torch.equal(eager, captured)
    assert replays.prepared > 0


@pytest.mark.parametrize("policy", POLICIES[:2])
def test_a_copy_goes_on_by_itself(model, policy):
    def run(kv):
        first = kv.cache()
        start = generate(model, kv, first)
        second, mask = copy.deepcopy(first), prompts(model)["attention_mask"]
        inputs = {"input_ids": start, "attention_mask": torch.nn.functional.pad(mask, (0, NEW), value=1)}
        return [generate(model, kv, cache, inputs, max_new_tokens=9, min_new_tokens=9) for cache in (first, second)]

    (eager, *_), (captured, *_), _ = both(model, policy, run)
    assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))
    assert torch.equal(captured[0], captured[1])


def test_a_saved_cache_has_what_captured_steps_wrote(model, tmp_path):
    def run(kv):
        cache = kv.cache()
        start = generate(model, kv, cache)
        kv.save(cache, tmp_path / "cache.safetensors")
        mask = torch.nn.functional.pad(prompts(model)["attention_mask"], (0, NEW), value=1)
        inputs = {"input_ids": start, "attention_mask": mask}
        return generate(model, kv, kv.load(tmp_path / "cache.safetensors"), inputs)

    (eager, *_), (captured, *_), _ = both(model, POLICIES[1], run)
    assert torch.equal(eager, captured)


@pytest.mark.parametrize("policy", NOT_CAPTURED)
def test_what_cannot_be_captured_says_why_and_runs(model, policy, caplog):
    (eager, *noted), (captured, *again), replays = both(model, policy, lambda kv: generate(model, kv))
    assert torch.equal(eager, captured)
    assert noted == again
    (why,) = replays.eager
    assert NOT_CAPTURED[policy] in why
    assert replays.eager[why] == NEW - 1
    assert caplog.text.count("decode steps are not captured") == 1


def test_what_cannot_be_captured_any_more_says_so_and_goes_on(model):
    """Generated tokens are clustered at the eighth step, and again at the sixteenth."""
    policy = "retroinfer:window_tokens=16,update_tokens=8,cluster_tokens=4,segment_tokens=64,retrieval=0.1"
    (eager, *noted), (captured, *again), replays = both(model, policy, lambda kv: generate(model, kv))
    assert torch.equal(eager, captured)
    assert noted == again
    assert replays.prepared == 7
    assert replays.eager == {"retroinfer takes lengths from the host once it has generated more than 7 tokens": NEW - 8}


def test_a_hook_on_a_module_is_not_passed_over(model):
    called = []
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: called.append(1))
    _, _, replays = both(model, "full", lambda kv: generate(model, kv))
    handle.remove()
    assert len(called) == 2 * NEW + 1  # and when the model was looked at
    assert "a hook of layers.1.mlp" in next(iter(replays.eager))


@pytest.mark.parametrize(
    ("family", "more", "why"),
    [
        ("Gemma2", {"sliding_window": 64, "head_dim": 8}, "Hugging Face's own cache"),
        (
            "Phi3",
            {
                "original_max_position_embeddings": 64,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 10000.0,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                    "original_max_position_embeddings": 64,
                },
            },
            "LongRoPE",
        ),
    ],
)
def test_models_whose_steps_change_are_not_captured(family, more, why):
    sizes = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512}
    config = getattr(transformers, f"{family}Config")(**sizes, **heads, **more, pad_token_id=0, eos_token_id=None)
    torch.manual_seed(11)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    inputs = prompts(model, padded=False, tokens=100)
    (eager, *_), (captured, *_), replays = both(model, "full", lambda kv: generate(model, kv, inputs=inputs))
    assert torch.equal(eager, captured)
    (reason,) = replays.eager
    assert why in reason


def test_gradients_masks_and_other_outputs_are_left_to_the_model(model):
    with offload(model, parse_policy("full"), max_new_tokens=50, capture=True) as kv:
        cache, ids = kv.cache(), prompts(model, padded=False)["input_ids"]
        token = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        model(token, past_key_values=cache)
        assert "gradients" in next(iter(kv.replays.eager))
        with torch.no_grad():
            hidden = model(token, past_key_values=cache, output_hidden_states=True).hidden_states
            assert len(hidden) == 4
            mask = torch.ones(3, cache.tokens + 1, dtype=torch.int64, device=model.device)
            mask[0, 3] = 0
            model(token, past_key_values=cache, attention_mask=mask)
            assert kv.replays.prepared == 0
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            model(token, past_key_values=cache, attention_mask=mask)
        assert kv.replays.prepared == 1
        assert any("output_hidden_states" in why for why in kv.replays.eager)
        assert any("attention mask" in why for why in kv.replays.eager)


def test_a_model_is_let_go_when_nobody_has_it_any_more():
    made = transformers.LlamaConfig(vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    model = transformers.AutoModelForCausalLM.from_config(made).eval()
    with offload(model, parse_policy("full"), max_new_tokens=50, capture=True) as kv:
        generate(model, kv, inputs=prompts(model, padded=False))
        assert kv.replays.prepared == NEW - 1
    gone = weakref.ref(model)
    del model, kv
    gc.collect()
    assert gone() is None


def test_a_cache_that_is_full_says_so(model):
    with offload(model, parse_policy("full"), max_new_tokens=4, capture=True) as kv, torch.no_grad():
        cache, ids = kv.cache(), prompts(model, padded=False)["input_ids"]
        token = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        for _ in range(4):
            model(token, past_key_values=cache)
        with pytest.raises(ValueError, match="the cache holds 241 tokens"):
            model(token, past_key_values=cache)


def test_a_captured_step_has_no_length():
    step = CapturedStep(100)
    assert (step.prompt_tokens, step.new_tokens, step.prefilling) == (100, 1, False)
    assert isinstance(step, Step)
    for asked in ("past_tokens", "tokens", "generated_tokens", "last_chunk"):
        with pytest.raises(RuntimeError, match=r"Call\.rows"):
            getattr(step, asked)
