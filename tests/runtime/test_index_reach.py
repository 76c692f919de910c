"""A search of the graph comes to every key: walks along its links, key by key, on keys of every kind."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.models.llama.modeling_llama import apply_rotary_pos_emb  # noqa: E402

from runtime.index import Graph, GraphParameters, link  # noqa: E402
from runtime.index.reach import connect  # noqa: E402
from runtime.needle import expand, load_evals  # noqa: E402

N, HEAD_DIM = 240, 16
FEW = GraphParameters(degree=4, entries=4, nearest=8, candidates=8, alike=3, train_queries=300)


def walked(links: list[list[int]], entries: list[int]) -> set[int]:
    """The keys that links lead to from the entries, themselves among them."""
    seen, front = set(entries), list(entries)
    while front:
        new = set(links[front.pop()]) - seen
        seen |= new
        front += new
    return seen


def drawn(kind: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (1, N, d) and queries (2, 260, d), of which the first 200 are to build from."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    keys, queries = normal(1, N, HEAD_DIM), normal(2, 260, HEAD_DIM) + 2 * normal(HEAD_DIM)
    if kind == "duplicated":  # most are one key, the others twice
        keys[:, : N // 2] = keys[:, :1]
        keys[:, -N // 4 :] = keys[:, N // 2 : N // 2 + N // 4]
    elif kind == "all the same":
        keys[:] = keys[:, :1]
    elif kind == "clustered":  # far apart: the nearest of a key are of its own cluster
        keys = 0.01 * keys + 50 * normal(6, HEAD_DIM)[torch.randint(6, (1, N), generator=random)]
    elif kind == "one dominates":
        keys[:, N // 3] = 300 * queries.mean((0, 1))
    elif kind == "on a line":
        keys = torch.linspace(-1, 1, N)[None, :, None] * normal(HEAD_DIM)
    elif kind == "of unequal length":
        keys *= torch.exp(3 * normal(1, N, 1))
    elif kind == "no length":
        keys[:] = 0
    return keys, queries


@pytest.fixture(scope="module")
def needle(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, torch.Tensor]:
    """Of layer 7 of the shipped model: keys (4, n, 64), queries (8, n, 64), rotated, of 400 tokens of a prompt."""
    folder: Path = expand(tmp_path_factory.mktemp("needle") / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    kept = []

    def keep(layer: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        normed = layer.input_layernorm(given[0])
        q, k = (
            project(normed).unflatten(2, (-1, 64)).transpose(1, 2)
            for project in (layer.self_attn.q_proj, layer.self_attn.k_proj)
        )
        angles = model.model.rotary_emb(normed, torch.arange(normed.shape[1])[None])
        kept.extend(x[0] for x in apply_rotary_pos_emb(q, k, *angles))

    model.model.layers[7].register_forward_pre_hook(keep)
    with torch.no_grad():
        model.model(torch.from_numpy(load_evals(("niah_multiquery",))[0].prompt[:400])[None], use_cache=False)
    return kept[1], kept[0]


def every_key_is_reached_and_found(keys: torch.Tensor, queries: torch.Tensor, parameters: GraphParameters) -> None:
    """By the links alone; and a search that may scan everything finds the exact best, whichever of equal ones."""
    n = keys.shape[1]
    links, entries = link(keys, queries[:, :-60], parameters)
    assert links.shape == (len(keys), n, parameters.degree)
    for head in range(len(keys)):
        assert walked(links[head].tolist(), entries[head].tolist()) == set(range(n))
    index = Graph(keys.contiguous(), links, entries, GraphParameters(degree=parameters.degree, scanned=1.0))
    group = len(queries) // len(keys)
    for q in queries[:, -60::20].unbind(1):
        found = index.search(q.contiguous(), min(100, n))
        assert found.scanned.tolist() == [n] * len(queries)
        for head in range(len(queries)):
            assert len(set(found.ids[head].tolist())) == min(100, n)
            scores = np.sort(keys[head // group].double().numpy() @ q[head].double().numpy())[::-1][: min(100, n)]
            own = (keys[head // group, found.ids[head]].double() @ q[head].double()).numpy()
            np.testing.assert_allclose(np.sort(own)[::-1], scores, rtol=1e-4, atol=1e-4)


KINDS = (
    "random",
    "duplicated",
    "all the same",
    "clustered",
    "one dominates",
    "on a line",
    "of unequal length",
    "no length",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "parameters", [FEW, GraphParameters(degree=2, entries=1, candidates=3, alike=1), GraphParameters()]
)
def test_every_key_is_reached(kind: str, parameters: GraphParameters) -> None:
    every_key_is_reached_and_found(*drawn(kind, 0), parameters)


@pytest.mark.parametrize("parameters", [FEW, GraphParameters()])
def test_every_key_of_a_model_is_reached(
    needle: tuple[torch.Tensor, torch.Tensor], parameters: GraphParameters
) -> None:
    every_key_is_reached_and_found(*needle, parameters)


@given(
    data=st.data(),
    n=st.integers(1, 40),
    degree=st.integers(2, 6),
    width=st.integers(1, 5),
    spread=st.sampled_from([1, 3, 40]),
)
@settings(max_examples=150, deadline=None)
def test_whatever_the_links_they_are_made_to_lead_everywhere(
    data: st.DataObject, n: int, degree: int, width: int, spread: int
) -> None:
    """Links, entries and neighbours are any at all; what was reached still is, by no more links than there were."""
    key = st.integers(0, min(n, spread) - 1)

    def table(rows: int, columns: int) -> torch.Tensor:
        flat = data.draw(st.lists(key, min_size=rows * columns, max_size=rows * columns))
        return torch.tensor(flat).view(rows, columns)

    links, near, entries = table(n, degree), table(n, width), table(1, 2)[0]
    before = links.clone()
    whole = walked(links.tolist(), entries.tolist()) == set(range(n))
    made = connect(links, entries, near)
    assert torch.equal(links, before)
    assert made.shape == links.shape
    assert walked(made.tolist(), entries.tolist()) == set(range(n))
    assert torch.equal(made, before) == whole


def test_a_lost_key_is_linked_from_the_nearest_that_is_reached_in_place_of_a_link_to_itself() -> None:
    links = torch.tensor([[1, 0], [2, 1], [1, 0], [4, 4], [3, 3]])  # 3 and 4 lead to each other alone
    near = torch.tensor([[1], [2], [1], [4], [1]])
    assert connect(links, torch.tensor([0]), near).tolist() == [[1, 0], [2, 4], [1, 0], [4, 4], [3, 3]]


def test_equal_keys_are_found_by_a_search_of_few() -> None:
    """One of 300 equal keys among 600 leads to the others: no more need be scanned than twice what is sought."""
    keys, queries = drawn("random", 3)
    keys = torch.cat([keys, -keys, keys.roll(1, 2)], dim=1)[:, :600]
    keys[:, ::2] = 3 * queries.mean((0, 1))
    index = Graph.build(keys, queries[:, :-60], GraphParameters(scanned=1 / 3))
    found = index.search(queries[:, -1].contiguous(), 100)
    equal = queries[:, -1] @ keys[0, 0] > (queries[:, -1] @ keys[0, 1::2].T).amax(1)
    assert equal.any()
    for head in equal.nonzero()[:, 0].tolist():
        assert (found.ids[head] % 2 == 0).all()
