"""Saved caches: what goes on from a file is what would have gone on without it, and other files are refused."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import save_file  # noqa: E402

from kvsim.cli.validate import COMPOSED, TRIED  # noqa: E402
from policies import parse_policy  # noqa: E402
from runtime import offload  # noqa: E402
from runtime.loading import load_model  # noqa: E402

EXECUTED = [
    *(
        text
        for name, texts in {"full": ("full",), **TRIED}.items()
        if find_spec(f"runtime.methods.{name.replace('-', '_')}")
        for text in texts
    ),
    *COMPOSED,
    "shadowkv:budget_tokens=4096",  # dense: the prompt is too short for it
]
PREFIX, TURN, NEW = 260, 5, 6
ROOM = TURN + NEW


@pytest.fixture(scope="module")
def model(tiny_llama: Path):
    return load_model(tiny_llama, "cpu")


@pytest.fixture(scope="module")
def gemma():
    """Sliding windows on two of three layers, full attention on the other."""
    config = transformers.Gemma3TextConfig(
        vocab_size=8192,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
        eos_token_id=None,
    )
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(config).eval().float()


def ids(tokens: int = PREFIX + TURN, batch: int = 2):
    return torch.randint(3, 8192, (batch, tokens), generator=torch.Generator().manual_seed(7))


def go_on(model, cache, given):
    """What is generated for all ids, of which the cache has some."""
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(given)
    return model.generate(given, attention_mask=mask, past_key_values=cache, **options)[:, given.shape[1] :]


def prefilled(model, kv, given):
    cache = kv.cache()
    with torch.no_grad():
        model(input_ids=given[:, :PREFIX], past_key_values=cache)
    return cache


@pytest.mark.parametrize("policy", EXECUTED)
def test_it_goes_on_as_the_original_does(model, policy: str, tmp_path: Path) -> None:
    check(model, policy, tmp_path)


@pytest.mark.parametrize("policy", ["offload-all", "sink-window:window_tokens=8"])
def test_sliding_windows_are_saved_too(gemma, policy: str, tmp_path: Path) -> None:
    check(gemma, policy, tmp_path)


def check(model, policy: str, tmp_path: Path) -> None:
    given = ids()
    with offload(model, parse_policy(policy), max_new_tokens=ROOM) as kv:
        cache = prefilled(model, kv, given)
        kv.save(cache, tmp_path / "prefix.safetensors")
        before = [{name: t.clone() for name, t in cache.arena.kept(i).items()} for i in range(3)]
        expected = go_on(model, cache, given)
    with offload(model, parse_policy(policy), max_new_tokens=ROOM) as kv:
        loaded = kv.load(tmp_path / "prefix.safetensors")
        assert loaded.get_seq_length() == PREFIX
        for index, kept in enumerate(before):
            restored = loaded.arena.kept(index)
            assert restored.keys() == kept.keys()
            assert all(torch.equal(restored[name], kept[name]) for name in kept)
        assert torch.equal(go_on(model, loaded, given), expected)
        # No part of the prefix went through the model again.
        assert kv.counts.steps[:, -1].max() <= TURN
    assert list(tmp_path.iterdir()) == [tmp_path / "prefix.safetensors"]


def test_another_process_goes_on(model, tiny_llama: Path, tmp_path: Path) -> None:
    given, policy, path = ids(), "shadowkv:budget_tokens=128,rank=8,outlier_chunks=4", tmp_path / "prefix.safetensors"
    with offload(model, parse_policy(policy), max_new_tokens=ROOM) as kv:
        cache = prefilled(model, kv, given)
        kv.save(cache, path)
        expected = go_on(model, cache, given)
    code = f"""
import json, torch
from policies import parse_policy
from runtime import offload
from runtime.loading import load_model
model = load_model({str(tiny_llama)!r}, "cpu")
ids = torch.tensor({given.tolist()})
with offload(model, parse_policy({policy!r}), max_new_tokens={ROOM}) as kv:
    out = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=kv.load({str(path)!r}),
                         max_new_tokens={NEW}, min_new_tokens={NEW}, do_sample=False, pad_token_id=0)
print(json.dumps(out[:, ids.shape[1]:].tolist()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == expected.tolist()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "prefix.safetensors"
    with offload(model, parse_policy("quest"), max_new_tokens=ROOM) as kv:
        kv.save(prefilled(model, kv, ids()), path)
    return path


@pytest.mark.parametrize(
    ("policy", "room", "message"),
    [
        ("full", ROOM, "was saved with the policy quest, and here it is full"),
        ("quest:budget_tokens=64", ROOM, "was saved with the policy quest, and here it is quest:budget_tokens=64"),
        ("quest", ROOM + 1, "has room for 11 tokens after the prompt, and 12 are wanted; use offload"),
    ],
)
def test_another_policy_or_room_is_refused(model, saved: Path, policy: str, room: int, message: str) -> None:
    with offload(model, parse_policy(policy), max_new_tokens=room) as kv:
        with pytest.raises(ValueError, match=message) as error:
            kv.load(saved)
        assert str(error.value).startswith(str(saved))
        assert not kv.footprint_bytes


def test_less_room_takes_what_was_saved(model, saved: Path) -> None:
    with offload(model, parse_policy("quest"), max_new_tokens=1) as kv:
        assert kv.load(saved).max_tokens == PREFIX + ROOM


def test_another_model_or_dtype_is_refused(model, gemma, tiny_llama: Path, saved: Path) -> None:
    def refused(other, message: str) -> None:
        with (
            offload(other, parse_policy("quest"), max_new_tokens=ROOM) as kv,
            pytest.raises(ValueError, match=message),
        ):
            kv.load(saved)

    refused(load_model(tiny_llama, "cpu", "bf16"), "was saved with the dtype fp32, and here it is bf16")
    refused(gemma, r"was saved with the model llama \(\w{12}, weights \w{12}\), and here it is gemma3_text \(")
    trained = load_model(tiny_llama, "cpu")
    with torch.no_grad():
        trained.model.layers[1].mlp.up_proj.weight += 0.01
    refused(trained, r"was saved with the model llama \(.*\), and here it is llama \(")


def test_files_that_are_no_saved_cache_are_refused(model, saved: Path, tmp_path: Path) -> None:
    content = saved.read_bytes()
    (tmp_path / "truncated").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("not tensors at all")
    save_file({"weight": torch.ones(2)}, tmp_path / "foreign")
    with offload(model, parse_policy("quest"), max_new_tokens=ROOM) as kv:
        for name in ("truncated", "empty", "text"):
            with pytest.raises(ValueError, match=f"{name}: no saved cache, or not all of it \\("):
                kv.load(tmp_path / name)
        with pytest.raises(ValueError, match=r"foreign: no saved cache; write one with kv\.save"):
            kv.load(tmp_path / "foreign")
        with pytest.raises(FileNotFoundError):
            kv.load(tmp_path / "none")


def test_half_a_prompt_is_not_saved(model, tmp_path: Path) -> None:
    with offload(model, parse_policy("quest"), max_new_tokens=ROOM) as kv, torch.no_grad():
        cache = kv.cache(prompt_tokens=PREFIX)
        with pytest.raises(ValueError, match="layer 0 has not finished its prompt"):
            kv.save(cache, tmp_path / "x")
        model(input_ids=ids()[:, :100], past_key_values=cache)
        with pytest.raises(ValueError, match="layer 0 has not finished its prompt"):
            kv.save(cache, tmp_path / "x")
    assert not list(tmp_path.iterdir())
