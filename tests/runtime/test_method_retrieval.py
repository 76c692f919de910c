"""RetrievalAttention inside the runtime against a float64 oracle that ranks, keeps and attends token by token."""

import math
from collections import Counter
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from one_layer import OneLayer, attention, drawn  # noqa: E402

from policies import RetrievalAttention, Step, parse_policy, plan_layer  # noqa: E402
from policies.plan import moved_bytes, stored_bytes  # noqa: E402
from policies.retrieval_index import ENTRIES, TRAIN_QUERIES  # noqa: E402
from runtime import offload  # noqa: E402
from runtime.index import Graph, GraphParameters  # noqa: E402

DIM, SINKS, WINDOW, TOP_K, PROMPT = 8, 3, 6, 7, 60
POLICY = {
    "flat": RetrievalAttention(sink_tokens=SINKS, window_tokens=WINDOW, top_k=TOP_K, index="flat"),
    "ivf": RetrievalAttention(
        sink_tokens=SINKS, window_tokens=WINDOW, top_k=TOP_K, index="ivf", lists=10, probe_share=0.3
    ),
    "graph": RetrievalAttention(
        sink_tokens=SINKS, window_tokens=WINDOW, top_k=TOP_K, degree=4, scanned=0.3, scan_factor=1
    ),
}
EVERYTHING = {
    "flat": POLICY["flat"],
    "ivf": replace(POLICY["ivf"], probe_share=1),
    "graph": replace(POLICY["graph"], scanned=1),
}
# No padding; into the sinks, past them, all but a few keys, all keys, into the window, all but one token.
PADS = (0, 2, 20, PROMPT - SINKS - WINDOW - 4, PROMPT - SINKS - WINDOW, PROMPT - 2, PROMPT - 1)


def layer(policy, heads, kv_heads, steps, *, pads=None, seed=0, prompt=PROMPT, **options):
    q, k, v = drawn(len(pads) if pads else 1, heads, kv_heads, prompt + steps, DIM, seed)
    one = OneLayer(policy, q * 2, k * 2, v, prompt=prompt, pads=pads, **options)
    if pads:
        padding = ~one.seen[:, None, :, None]
        one.k.masked_fill_(padding, 1e4)  # would be found by every other query, and outweigh all
        one.v.masked_fill_(padding, torch.nan)
    return one


def first_token(one, row):
    return 0 if one.seen is None else int((~one.seen[row]).sum())


def searched(one, row):
    """The tokens that an index holds: neither padding, nor among the first real ones, nor in the window."""
    return list(range(first_token(one, row) + one.policy.sink_tokens, one.prompt - one.policy.window_tokens))


def near(one, row, past):
    """All other tokens so far."""
    kept = set(range(first_token(one, row), past + 1)) - set(searched(one, row))
    return sorted(kept)


def best(one, row, head, past, top_k):
    """The tokens of largest inner product among those searched, best first."""
    q, k = one.q[row, head, past].double(), one.k[row, head // (one.q.shape[1] // one.k.shape[1])].double()
    return sorted(searched(one, row), key=lambda t: -float(k[t] @ q))[:top_k]


def found(one, call, row, head):
    """The tokens that the runtime has found, best first."""
    ids = call.state["found"].view(torch.int32)[row, head, :, 1].tolist()
    return [i + one.policy.sink_tokens for i in ids if i >= 0]


def check(one, call, past, row, head, far):
    tokens, kv_head = near(one, row, past) + far, head // (one.q.shape[1] // one.k.shape[1])
    sink = None if one.sinks is None else one.sinks[head]
    expected = attention(
        one.q[row, head, past], one.k[row, kv_head, tokens], one.v[row, kv_head, tokens], one.softcap, sink
    )
    torch.testing.assert_close(call.out[row, head, 0].double(), expected, atol=1e-5, rtol=0)


def follow(one, *chunks):
    """Run all steps; each output is the oracle's over near tokens and the exact best of the others."""
    one.prefill(*chunks)
    for past, call in one.decode():
        for row in range(one.batch):
            for head in range(one.q.shape[1]):
                far = best(one, row, head, past, one.policy.top_k)
                assert found(one, call, row, head) == far
                check(one, call, past, row, head, far)


@pytest.mark.parametrize("index", EVERYTHING)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2), (8, 1)])
def test_a_search_of_everything_follows_the_oracle(index, heads, kv_heads):
    follow(layer(EVERYTHING[index], heads, kv_heads, 5, seed=heads + kv_heads))


@pytest.mark.parametrize("index", EVERYTHING)
def test_padding_is_never_found_nor_attended(index):
    follow(layer(EVERYTHING[index], 4, 2, 4, pads=PADS, seed=1))


@pytest.mark.parametrize("index", EVERYTHING)
@pytest.mark.parametrize(("softcap", "sinks"), [(3.0, None), (4.0, torch.tensor([0.5, -2.0, 4.0, 1.0]))])
def test_softcap_and_sinks(index, softcap, sinks):
    follow(layer(EVERYTHING[index], 4, 2, 4, pads=(0, 7), seed=2, softcap=softcap, sinks=sinks))


@pytest.mark.parametrize("index", EVERYTHING)
@pytest.mark.parametrize("chunks", [(30, 30), (59, 1), (20, 36, 1, 1, 2)])
def test_chunks_of_a_prompt_leave_what_the_whole_leaves(index, chunks):
    """The graph too: every query of the prompt has waited for its end."""
    policy, states = POLICY[index], []
    for parts in ((), chunks):
        one = layer(policy, 4, 2, 2, pads=(0, 9), seed=3, chunked=bool(parts))
        one.prefill(*parts)
        states.append(one.arena.kept(0))
    kept = {b.name for b in plan_layer(policy, one.shape, Step.decoding(PROMPT, 2), 0).buffers} & states[0].keys()
    assert kept >= {"index_keys", "index_values", "padding_host", "k_near", "v_near"}
    for name in kept:
        torch.testing.assert_close(states[0][name], states[1][name], atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("index", ["ivf", "graph"])
def test_what_a_search_in_part_finds_is_attended_with_the_weights_of_one_softmax(index):
    """Distinct keys of the row's own index, best first; the output is exact attention over them and what is near."""
    one = layer(POLICY[index], 8, 2, 6, pads=PADS, seed=4)
    one.prefill()
    hits = total = 0
    for past, call in one.decode():
        for row in range(one.batch):
            for head in range(8):
                far, exact = found(one, call, row, head), best(one, row, head, past, PROMPT)
                assert len(set(far)) == len(far) <= TOP_K
                assert far == [token for token in exact if token in far]
                check(one, call, past, row, head, far)
                hits, total = hits + len(set(far) & set(exact[:TOP_K])), total + len(exact[:TOP_K])
    assert hits > 0.45 * total  # 0.3 of the keys are scanned: chance finds 0.3


@pytest.mark.parametrize("index", EVERYTHING)
def test_as_many_keys_as_there_are_is_full_attention(index):
    policy = replace(EVERYTHING[index], top_k=PROMPT - SINKS - WINDOW)
    one = layer(policy, 8, 2, 6, pads=PADS, seed=5)
    one.prefill()
    for past, call in one.decode():
        for row in range(one.batch):
            for head in range(8):
                check(one, call, past, row, head, searched(one, row))


@pytest.mark.parametrize("index", POLICY)
def test_a_planted_needle_is_read_wherever_it_stands(index):
    """One key along the question among 400 that are not: its value is the answer.

    The prompt ends in three queries like the question, from which the graph may learn.
    """
    policy = replace(POLICY[index], scanned=0.1, degree=8)
    for place in (SINKS, 57, 200, 391, 400 - WINDOW - 1):
        one = layer(policy, 4, 2, 1, prompt=400, seed=6 + place)
        one.k[..., 0] *= 0.05
        one.q[0, :, 397:] = torch.eye(DIM)[0] * 8
        one.k[0, :, place] = torch.eye(DIM)[0] * 8
        one.prefill()
        ((_, call),) = one.decode()
        for head in range(4):
            assert found(one, call, 0, head)[0] == place
            expected = one.v[0, head // 2, place].double()
            torch.testing.assert_close(call.out[0, head, 0].double(), expected, atol=1e-3, rtol=0)


def test_lists_hold_every_key_once_and_lie_where_they_say():
    """Each key beside its id; the keys of a list are those nearest its centroid."""
    pads = PADS[:4]
    one = layer(POLICY["ivf"], 4, 2, 1, pads=pads, seed=7)
    one.prefill()
    state = {name: tensor.unflatten(1, (2, -1)) for name, tensor in one.arena.kept(0).items() if name != "padding_host"}
    for row in range(len(pads)):
        real = searched(one, row)
        for kv_head in range(2):
            keys, ids, starts = (state[name][row, kv_head] for name in ("index_keys", "list_ids", "list_starts"))
            places = [i for i, key in enumerate(ids.flatten().tolist()) if key >= 0]
            tokens = [ids[i].item() + SINKS for i in places]
            assert sorted(tokens) == real
            assert torch.equal(keys[places], one.k[row, kv_head, tokens])
            centroids = state["list_centroids"][row, kv_head, : min(10, len(real))]
            nearest = torch.cdist(keys[places].double(), centroids.double()).argmin(1)
            bounds = starts.flatten()
            assert torch.equal(bounds[:-1].repeat_interleave(bounds.diff()), bounds[nearest])
            assert (bounds[0], bounds[-1]) == (len(ids) - len(real), len(ids))


@pytest.mark.parametrize("scanned", [0.2, 0.5, 1])
def test_visits_are_what_the_index_scanned(scanned):
    """A search goes on to its allowance, a share of all keys for each query head, or to the last of the row's own."""
    policy, pads = replace(POLICY["graph"], scanned=scanned), PADS[:4]
    one = layer(policy, 8, 2, 3, pads=pads, seed=8)
    one.prefill()
    apart = Graph.build(
        one.k[0, :, SINKS : PROMPT - WINDOW], one.q[0, :, :PROMPT], GraphParameters(degree=4, scanned=scanned)
    )
    for past, call in one.decode():
        allowance = max(TOP_K, math.ceil(scanned * (PROMPT - SINKS - WINDOW)))
        own = [min(allowance, len(searched(one, row))) for row in range(len(pads))]
        assert call.counts["visited"].tolist() == [[4 * n, 4 * n] for n in own]
        alone = apart.search(one.q[0, :, past], TOP_K)
        for name, of in (("visited", alone.scanned), ("followed", alone.followed)):
            assert of.view(2, 4).sum(1).tolist() == call.counts[name][0].tolist()
        assert (alone.ids + SINKS).tolist() == [found(one, call, 0, head) for head in range(8)]


@pytest.mark.parametrize("scan_factor", [1, 3, 100])
def test_a_search_scans_so_many_keys_for_each_it_returns_where_the_share_is_small(scan_factor):
    """0.1 of 51 keys are 6, fewer than the 7 that a search returns; the plan's count has the same bounds."""
    policy = replace(POLICY["graph"], scanned=0.1, scan_factor=scan_factor)
    one = layer(policy, 8, 2, 3, seed=8)
    one.prefill()
    keys = PROMPT - SINKS - WINDOW
    expected = min(keys, scan_factor * TOP_K)
    for past, call in one.decode():
        assert call.counts["visited"].tolist() == [[4 * expected, 4 * expected]]
        visited, followed = policy.counts(one.shape, Step(prompt_tokens=PROMPT, past_tokens=past, new_tokens=1), 0)
        assert visited.expected() == 2 * 4 * expected
        assert visited.minimum <= 4 * expected <= visited.maximum
        assert (call.counts["followed"] <= followed.maximum).all()


def test_the_plan_and_the_graph_have_the_same_sizes():
    parameters = GraphParameters()
    assert parameters.entries == ENTRIES
    assert parameters.train_queries == TRAIN_QUERIES
    assert parameters.degree == RetrievalAttention().degree
    assert parameters.scanned == RetrievalAttention().scanned


@pytest.fixture(scope="module")
def model():
    config = transformers.LlamaConfig(
        vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(7)
    return transformers.AutoModelForCausalLM.from_config(config).eval().float()


IDS = torch.randint(3, 101, (2, 79), generator=torch.Generator().manual_seed(8))
TEXTS = [
    f"retrieval-attention:sink_tokens=4,window_tokens=16,top_k=8,{index}"
    for index in ("index=flat", "index=ivf,lists=8", "degree=4,scanned=0.7,scan_factor=1")
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_later_turn_is_decoded_token_by_token(model, text):
    logits = []
    with torch.no_grad(), offload(model, parse_policy(text), max_new_tokens=32) as kv:
        for sizes in ((9,), (1,) * 9):
            cache, past = kv.cache(), 70
            model(input_ids=IDS[:, :70], past_key_values=cache)
            parts = []
            for size in sizes:
                parts.append(model(input_ids=IDS[:, past : past + size], past_key_values=cache).logits)
                past += size
            logits.append(torch.cat(parts, dim=1))
        stock = model(input_ids=IDS, use_cache=False).logits[:, 70:]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-6, rtol=0)  # products of another shape
    assert (logits[0] - stock).abs().max() > 1e-4  # something was left out


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_and_visits_of_two_runs_are_the_same_and_those_of_the_plans(model, text):
    """Padded by 0 and 11 tokens. A search of the graph visits as many keys in each row, of 50 or of 39."""
    inputs = {"input_ids": IDS[:, :70].clone(), "attention_mask": torch.ones(2, 70, dtype=torch.int64)}
    inputs["input_ids"][1, :11] = inputs["attention_mask"][1, :11] = 0
    runs = []
    for _ in range(2):
        with torch.no_grad(), offload(model, parse_policy(text), max_new_tokens=12) as kv:
            cache = kv.cache()
            tokens = model.generate(**inputs, past_key_values=cache, max_new_tokens=12, do_sample=False)
            recording, expected = kv.counts, Counter()
            for (*_, prompt, past, new), drawn_ in zip(recording.steps.tolist(), recording.totals(), strict=True):
                plan = plan_layer(kv.policy, kv.shape, Step(prompt_tokens=prompt, past_tokens=past, new_tokens=new), 0)
                expected.update(moved_bytes(plan.ops, plan.buffers, drawn_))
                if plan.counts:  # 0.7 of 50 keys, for each of four heads
                    assert drawn_["visited"] == 2 * 4 * 35
                    (search,) = (op for op in plan.ops if op.name == "search")
                    read = {access.buffer: access.rows.at(drawn_) for access in search.reads}
                    assert read["index_keys"] == drawn_["visited"]
                    assert 0 < read["graph"] == drawn_["followed"] <= drawn_["visited"]
            assert kv.moved_bytes == expected
            last = [plan_layer(kv.policy, kv.shape, Step.decoding(70, 12), i).buffers for i in range(3)]
            assert kv.footprint_bytes == {tier: 2 * n for tier, n in stored_bytes(last).items()}
            runs.append((tokens, kv.moved_bytes, cache.arena.kept(1)))
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    assert all(torch.equal(tensor, runs[1][2][name]) for name, tensor in runs[0][2].items() if tensor.numel())
