"""SnapKV inside the runtime against a float64 oracle that votes, keeps and attends token by token."""

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from one_layer import OneLayer, attention, drawn  # noqa: E402

from policies import SnapKV, parse_policy  # noqa: E402
from runtime import offload  # noqa: E402

DIM, WINDOW, BUDGET = 8, 6, 17
POLICY = {
    per: SnapKV(budget_tokens=BUDGET, observation_tokens=WINDOW, kernel_tokens=3, per=per)
    for per in ("kv_head", "query_head")
}


def layer(policy, heads, kv_heads, prompt, steps, *, pads=None, seed=0, **options):
    q, k, v = drawn(len(pads) if pads else 1, heads, kv_heads, prompt + steps, DIM, seed)
    return OneLayer(policy, q * 2, k * 2, v, prompt=prompt, pads=pads, **options)


def kept_tokens(one, row):
    """For each query head the tokens of the prompt that are kept, ascending."""
    policy, prompt = one.policy, one.prompt
    pad = 0 if one.seen is None else int((~one.seen[row]).sum())
    group, first = one.q.shape[1] // one.k.shape[1], prompt - policy.observation_tokens
    votes = []
    for m in range(one.q.shape[1]):
        vote = [0.0] * first
        for t in range(max(pad, first), prompt):
            logits = one.k[row, m // group, pad : t + 1].double() @ one.q[row, m, t].double() * DIM**-0.5
            if one.softcap is not None:
                logits = one.softcap * torch.tanh(logits / one.softcap)
            if one.sinks is not None:
                logits = torch.cat([logits, one.sinks[m].double().view(1)])
            weights = torch.softmax(logits, 0).tolist()
            for token in range(pad, min(first, t + 1)):
                vote[token] += weights[token - pad]
        reach = policy.kernel_tokens // 2
        near = [vote[max(0, t - reach) : t + reach + 1] for t in range(first)]
        votes.append([max(v) if policy.pooling == "max" else sum(v) / policy.kernel_tokens for v in near])
    kept = []
    for m in range(len(votes)):
        voters = [m] if policy.per == "query_head" else range(m // group * group, (m // group + 1) * group)
        total = [sum(votes[v][t] for v in voters) for t in range(first)]
        order = sorted(range(pad, first), key=lambda t: (t - pad >= policy.sink_tokens, -total[t], t))
        chosen = sorted(order[: policy.budget_tokens - policy.observation_tokens])
        kept.append(chosen + list(range(max(pad, first), prompt)))
    return kept


def follow(one, *chunks):
    """Run all steps and compare each output with attention over what the oracle keeps; what it keeps."""
    kept = [kept_tokens(one, row) for row in range(one.batch)]
    one.prefill(*chunks)
    group = one.q.shape[1] // one.k.shape[1]
    for past, call in one.decode():
        for row in range(one.batch):
            for m in range(one.q.shape[1]):
                tokens = kept[row][m] + list(range(one.prompt, past + 1))
                k, v = one.k[row, m // group, tokens], one.v[row, m // group, tokens]
                sink = None if one.sinks is None else one.sinks[m]
                expected = attention(one.q[row, m, past], k, v, one.softcap, sink)
                torch.testing.assert_close(call.out[row, m, 0].double(), expected, atol=1e-5, rtol=0)
    return kept


@pytest.mark.parametrize("per", POLICY)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2), (8, 1)])
@pytest.mark.parametrize("prompt", [17, 18, 40])
def test_decode_follows_the_oracle(per, heads, kv_heads, prompt):
    kept = follow(layer(POLICY[per], heads, kv_heads, prompt, 5, seed=prompt + heads))
    assert all(len(tokens) == BUDGET for tokens in kept[0])
    if prompt == 40 and heads > kv_heads:  # heads of a group choose alike or each for itself
        assert (kept[0][0] == kept[0][1]) == (per == "kv_head")


# Padding before the window, into it, and all but one token; a row may have fewer tokens than the budget.
@pytest.mark.parametrize("per", POLICY)
@pytest.mark.parametrize("pads", [(0, 3, 22), (25, 36, 39)])
def test_padding_is_never_chosen_nor_attended(per, pads):
    one = layer(POLICY[per], 4, 2, 40, 4, pads=pads, seed=1)
    one.k[:, :, :40].masked_fill_(~one.seen[:, None, :40, None], 1e4)  # would draw all votes
    one.v[:, :, :40].masked_fill_(~one.seen[:, None, :40, None], 1e4)
    follow(one)


@pytest.mark.parametrize("per", POLICY)
@pytest.mark.parametrize(("softcap", "sinks"), [(3.0, None), (4.0, torch.tensor([0.5, -2.0, 4.0, 1.0]))])
def test_softcap_and_sinks(per, softcap, sinks):
    follow(layer(POLICY[per], 4, 2, 40, 4, pads=(0, 7), seed=2, softcap=softcap, sinks=sinks))


@pytest.mark.parametrize("chunks", [(30, 10), (34, 6), (35, 5), (39, 1), (20, 16, 1, 1, 2), (36, 1, 3)])
def test_the_window_observes_the_same_however_a_prompt_is_cut(chunks):
    """The last chunk has more queries than the window, as many, or fewer; then earlier chunks have left theirs."""
    follow(layer(POLICY["kv_head"], 4, 2, 40, 2, pads=(0, 9), seed=3, chunked=True), *chunks)


@pytest.mark.parametrize("per", POLICY)
def test_max_pooling_keeps_what_stands_around_a_peak(per):
    """Plateaus tie within a head, and the first of their tokens win; over a group's mean they hardly ever do."""
    policy = replace(POLICY[per], pooling="max", kernel_tokens=5)
    one = layer(policy, 4, 2, 40, 3, pads=(0, 6), seed=9)
    one.k[0, :, 20] = one.q[0, ::2, 34:40].mean(1) * 4  # draws the votes of each group's first head
    kept = follow(one)
    assert all({18, 19, 20, 21, 22} <= set(kept[0][m]) for m in (0, 2))


@pytest.mark.parametrize("per", POLICY)
def test_a_budget_of_the_whole_prompt_is_full_attention(per):
    policy = SnapKV(budget_tokens=40, observation_tokens=WINDOW, per=per)
    kept = follow(layer(policy, 8, 2, 40, 6, seed=4))
    assert kept[0] == [list(range(40))] * 8


def test_generation_longer_than_128_tokens():
    follow(layer(POLICY["kv_head"], 4, 1, 40, 150, seed=5))


def test_a_needle_is_kept_when_the_window_asks_for_it_and_lost_when_only_a_later_question_does():
    """Keys along the last queries of the prompt survive; a key along a query that comes after it does not."""
    asked, later = torch.eye(DIM)[0] * 6, torch.eye(DIM)[1] * 6
    for place in (0, 1, 20, 52, 53):
        one = layer(POLICY["kv_head"], 4, 2, 60, 1, seed=6 + place)
        lost = (place + 27) % 54
        one.k[..., 0] *= 0.02  # nothing else lies along either
        one.k[..., 1] = 0
        one.k[0, :, place], one.k[0, :, lost] = asked, later - asked / 10  # of all keys the window looks least at this
        one.q[0, :, 54:60], one.q[0, :, 60] = asked, later
        kept = follow(one)
        assert all(place in tokens and lost not in tokens for tokens in kept[0])
        full = attention(later, one.k[0, 0], one.v[0, 0])
        torch.testing.assert_close(full, one.v[0, 0, lost].double(), atol=0.01, rtol=0)  # what should have been read


def test_a_later_turn_is_decoded_token_by_token():
    """Feeding several tokens at once to a built cache gives the logits of feeding them one by one."""
    config = transformers.LlamaConfig(
        vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    ids = torch.randint(3, 101, (2, 79), generator=torch.Generator().manual_seed(8))
    policy, logits = parse_policy("snapkv:budget_tokens=24,observation_tokens=8"), []
    with torch.no_grad(), offload(model, policy, max_new_tokens=32) as kv:
        for sizes in ((9,), (1,) * 9):
            cache, past = kv.cache(), 70
            model(input_ids=ids[:, :70], past_key_values=cache)
            parts = []
            for size in sizes:
                parts.append(model(input_ids=ids[:, past : past + size], past_key_values=cache).logits)
                past += size
            logits.append(torch.cat(parts, dim=1))
        assert kv.footprint_bytes
        stock = model(input_ids=ids, use_cache=False).logits[:, 70:]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=0)
    assert (logits[0] - stock).abs().max() > 1e-4  # something was left out
