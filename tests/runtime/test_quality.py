"""Policies judged by trained attention: needle-28m still answers where a policy keeps what the question needs.

A fast part of `benchmarks/quality.py`: contexts of 2K, the question not seen when the cache is built. What
`docs/quality.md` finds at 8K to 32K must show here too: squeezed and retrieved keys answer, SnapKV's choice does not.
"""

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM  # noqa: E402

from policies import parse_policy  # noqa: E402
from runtime import offload  # noqa: E402
from runtime.needle import expand, load_evals  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = expand(tmp_path_factory.mktemp("needle") / "model")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def example():
    """A needle in the middle of its context: neither a sink nor near the question."""
    examples = load_evals(("niah_multikey",), max_tokens=2048)
    return min(examples, key=lambda e: abs(e.depth - 0.5))


@pytest.mark.parametrize(
    ("policy", "answers"),
    [
        ("full", True),
        ("squeezed-attention:keep=0.1", True),
        ("retrieval-attention:index=flat,sink_tokens=16,window_tokens=128", True),
        ("retroinfer", True),
        ("shadowkv:budget_tokens=512,rank=40,outlier_chunks=12", True),
        ("snapkv:budget_tokens=256", False),
    ],
)
def test_what_a_cache_built_before_the_question_answers(model, example, policy, answers):
    ids = torch.from_numpy(example.prompt)[None]
    new = len(example.answer)
    with torch.no_grad(), offload(model, parse_policy(policy), max_new_tokens=example.question_tokens + new) as kv:
        cache = kv.cache()
        model(input_ids=ids[:, : -example.question_tokens], past_key_values=cache, logits_to_keep=1)
        out = model.generate(
            input_ids=ids, past_key_values=cache, max_new_tokens=new, min_new_tokens=new, do_sample=False
        )
    assert example.correct(out[0, ids.shape[1] :].numpy()) is answers


def test_the_page_is_what_was_measured(monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    import quality

    assert quality.PAGE.read_text(encoding="utf-8") == quality.page(
        json.loads(quality.OUT.read_text()), json.loads(quality.REAL_TEXT.read_text())
    )
