"""Plans bound once: at every step they say what `plan_layer` says, and they are bound anew when a structure changes."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from one_layer import one_layer_model  # noqa: E402

import runtime.derived  # noqa: E402
from kvsim.models import load_model  # noqa: E402
from policies import Full, Step, parse_policy, plan_layer, settle  # noqa: E402
from policies.plan import Rows  # noqa: E402
from runtime import offload  # noqa: E402
from runtime.arena import Arena  # noqa: E402
from runtime.bound import BoundLayer  # noqa: E402
from runtime.derived import COST_STEPS, PIECES, Derived, Plans, counted  # noqa: E402
from runtime.methods import method_of  # noqa: E402

VARIANTS = [
    "full",
    "offload-all",
    "offload-all:write_back=all,staging_layers=3",
    "sink-window:window_tokens=60",
    "sink-window:positions=original,window_tokens=60",
    "snapkv:budget_tokens=64",
    "snapkv:budget_tokens=64,per=query_head",
    "quest:budget_tokens=96,page_tokens=8",
    "quest:budget_tokens=96,page_tokens=8,per=query_head,dense_layers=0",
    "infllm:window_tokens=50,block_tokens=8,execution_tokens=16,top_k=4,sink_tokens=3,cache_blocks=5",
    "squeezed-attention:observation_tokens=8",
    "squeezed-attention:observation_tokens=8,levels=2,tier=ddr,coarse_share=0.02",
    "squeezed-attention:observation_tokens=8,budget_tokens=20,tier=ddr",
    "shadowkv:budget_tokens=32,rank=8",
    "shadowkv:budget_tokens=32,rank=8,outlier_chunks=3,sink_tokens=0",
    "retrieval-attention:sink_tokens=4,window_tokens=16,top_k=5",
    "retrieval-attention:sink_tokens=4,window_tokens=16,top_k=5,index=flat",
    "retrieval-attention:sink_tokens=4,window_tokens=16,top_k=5,index=ivf,lists=8,scan_per=query_head",
    "retroinfer:window_tokens=12,cluster_tokens=4,update_tokens=20,retrieval=0.1",
    "full@heads=1+shadowkv:budget_tokens=32,rank=8@heads=1",
    "infllm:window_tokens=50,block_tokens=8,execution_tokens=16,top_k=4,cache_blocks=5@heads=1+offload-all@heads=1",
    "full@layers=0-1+quest:budget_tokens=96,page_tokens=8",
    "full@below=200+snapkv:budget_tokens=64",
]
ONE = one_layer_model(4, 2, 8)
MODEL = replace(ONE, layers=ONE.layers * 3)
LAYER = 2  # where quest is not dense
LLAMA = load_model("llama-3.1-8b")


@pytest.mark.parametrize("text", VARIANTS)
@given(prompt=st.integers(1, 700), first=st.integers(1, 300), steps=st.integers(1, 40))
@settings(max_examples=10, deadline=None)
def test_what_is_derived_says_what_the_plan_says(text: str, prompt: int, first: int, steps: int) -> None:
    policy = settle(parse_policy(text), MODEL, prompt, LAYER)
    plans = Plans(MODEL).of(policy, LAYER)
    for generated in range(first, first + steps):
        step = Step.decoding(prompt, generated)
        piece, fresh = plans.piece(step), plan_layer(policy, MODEL, step, LAYER)
        assert piece is not None, "planned afresh, as if deriving did not pay"
        assert piece.plan(step) == fresh
        assert piece.at(step) == counted(fresh)
        assert (piece.policy, list(map(type, fresh.ops))) == (fresh.policy, list(map(type, piece.plan(step).ops)))


@pytest.mark.parametrize("text", VARIANTS)
@given(prompts=st.lists(st.integers(64, 600), min_size=2, max_size=4), batch=st.integers(1, 3))
@settings(max_examples=4, deadline=None)
def test_a_bound_layer_has_what_the_fresh_plan_and_the_arena_have(text: str, prompts: list[int], batch: int) -> None:
    plans = Plans(MODEL)
    for prompt in prompts:  # several caches, whose layers share what was derived
        policy = settle(parse_policy(text), MODEL, prompt, LAYER)
        arena, method = Arena(torch.device("cpu"), batch), method_of(policy)
        arena.allocate(LAYER, plan_layer(policy, MODEL, Step.decoding(prompt, 50), LAYER).buffers)
        layer = BoundLayer(plans.of(policy, LAYER), method, LAYER)
        for generated in range(1, 51):
            step = Step.decoding(prompt, generated)
            fresh, bound = plan_layer(policy, MODEL, step, LAYER), layer.at(step, arena)
            assert bound.counted == counted(fresh)
            assert [op.name for op in bound.ops] == [op.name for op in fresh.ops]
            tensors = arena.tensors(LAYER, fresh.buffers)
            assert bound.state.keys() == tensors.keys()
            for name, tensor in tensors.items():
                assert bound.state[name].data_ptr() == tensor.data_ptr()
                assert bound.state[name].shape == tensor.shape


def test_a_binding_lasts_until_its_structure_changes() -> None:
    """Quest begins to choose at the 13th page of 8 tokens; InfLLM closes a block at every 8th token."""

    def bindings(text: str, prompt: int, steps: int) -> list[int]:
        policy = parse_policy(text)
        arena = Arena(torch.device("cpu"), 1)
        arena.allocate(LAYER, plan_layer(policy, MODEL, Step.decoding(prompt, steps), LAYER).buffers)
        layer, met = BoundLayer(Plans(MODEL).of(policy, LAYER), method_of(policy), LAYER), []
        bound = [layer.at(Step.decoding(prompt, generated), arena) for generated in range(1, steps + 1)]
        for one in bound:
            if one not in met:
                met.append(one)
        return [met.index(one) for one in bound]

    assert bindings("quest:budget_tokens=96,page_tokens=8,dense_layers=0", 90, 20) == [0] * 6 + [1] * 14
    infllm = "infllm:window_tokens=50,block_tokens=8,execution_tokens=16,top_k=4,sink_tokens=3,cache_blocks=5"
    found = bindings(infllm, 50 + 3 + 10 * 8, 32)
    assert found == [*[found[0]] * 7, found[7]] * 4
    assert found[0] != found[7]
    assert bindings("full", 90, 300) == [0] * 300


def test_tensors_that_came_or_went_are_bound_anew() -> None:
    policy, arena = Full(), Arena(torch.device("cpu"), 1)
    layer = BoundLayer(Plans(MODEL).of(policy, LAYER), method_of(policy), LAYER)
    buffers = plan_layer(policy, MODEL, Step.decoding(20, 9), LAYER).buffers
    arena.allocate(LAYER, buffers)
    before = layer.at(Step.decoding(20, 1), arena)
    assert layer.at(Step.decoding(20, 2), arena) is before
    other = Arena(torch.device("cpu"), 1)
    other.allocate(LAYER, buffers)
    assert layer.at(Step.decoding(20, 3), other).state["kv"] is other.kept(LAYER)["kv"]
    other.release()
    other.allocate(LAYER, buffers)
    assert layer.at(Step.decoding(20, 4), other).state["kv"] is other.kept(LAYER)["kv"]


def test_layers_that_are_alike_share_what_they_derive() -> None:
    plans, policy, step = Plans(LLAMA), parse_policy("quest"), Step.decoding(9000, 3)
    pieces = [plans.of(policy, layer).piece(step) for layer in range(LLAMA.n_layers)]
    assert pieces[0] is pieces[1]  # dense
    assert all(piece is pieces[2] for piece in pieces[2:])
    assert pieces[0] is not pieces[2]
    assert plans.of(policy, 2).piece(Step.decoding(20_000, 3)) is pieces[2]  # of another prompt too


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads(Full):
    """Tells its token counts by looking at them, in a way of the user's own."""

    name: ClassVar[str] = "reads"
    way: str

    def decode(self, model, step, layer):
        *before, attend = Full.decode(self, model, step, layer)
        if self.way == "pinned":
            rows = Rows(len(range(step.past_tokens)))
        elif self.way == "type":
            rows = Rows(step.past_tokens if isinstance(step.past_tokens, int) else 7)
        else:
            rows = Rows(step.past_tokens.bit_length())
        return (*before, replace(attend, rows=rows))


@pytest.mark.parametrize("way", ["pinned", "type", "no symbol"])
def test_a_policy_that_symbols_cannot_follow_is_planned_afresh_and_right(way: str) -> None:
    policy, derived = Reads(way=way), 0
    plans, arena = Plans(MODEL).of(policy, LAYER), Arena(torch.device("cpu"), 1)
    arena.allocate(LAYER, plan_layer(policy, MODEL, Step.decoding(20, 200), LAYER).buffers)
    for generated in range(1, 200):
        step = Step.decoding(20, generated)
        piece, fresh = plans.piece(step), plan_layer(policy, MODEL, step, LAYER)
        derived += piece is not None
        assert piece is None or piece.plan(step) == fresh
        assert BoundLayer(plans, method_of(Full()), LAYER).at(step, arena).counted == counted(fresh)
    assert derived <= (PIECES + 2 * 199 / COST_STEPS + 1 if way == "pinned" else 0)


def test_a_prompt_is_planned_as_it_comes() -> None:
    plans = Plans(MODEL).of(Full(), LAYER)
    assert plans.piece(Step(prompt_tokens=20, past_tokens=0, new_tokens=20)) is None
    assert plans.piece(Step(prompt_tokens=20, past_tokens=19, new_tokens=1)) is None
    assert (
        Derived(Full(), MODEL, Step.decoding(20, 1), LAYER).at(Step(prompt_tokens=20, past_tokens=25, new_tokens=2))
        is None
    )


def test_a_decode_step_plans_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first step of a structure, `plan_layer` is not called any more."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, eos_token_id=None,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    asked: list[Step] = []

    def planned(policy, shape, step, layer):
        asked.append(step)
        return plan_layer(policy, shape, step, layer)

    monkeypatch.setattr(runtime.derived, "plan_layer", planned)
    policy = parse_policy("quest:budget_tokens=32,page_tokens=8")
    with offload(model, policy, max_new_tokens=40) as kv, torch.inference_mode():
        cache = kv.cache()
        model(torch.arange(40)[None] % 64, past_key_values=cache)
        model(torch.tensor([[3]]), past_key_values=cache)
        asked.clear()
        for token in range(30):
            model(torch.tensor([[token]]), past_key_values=cache)
    assert asked == []
