"""A save that fails, is killed or meets another one leaves the old file or the new one, whole, and nothing beside."""

import fcntl
import json
import os
import resource
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from policies import parse_policy  # noqa: E402
from runtime import offload, saved  # noqa: E402

KILLS = int(os.environ.get("KVSIM_KILLS", "5"))  # as many as one has patience for


@pytest.fixture(scope="module")
def model():
    config = transformers.LlamaConfig(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(5)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def kv(model):
    with offload(model, parse_policy("full"), max_new_tokens=64) as kv, torch.no_grad():
        yield kv


def prefilled(kv, tokens=32):
    kv.model(torch.arange(tokens)[None] % 101, past_key_values=(cache := kv.cache()))
    return cache


def fails_and_leaves_all(folder, attempt, kind, says):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(kind, match=says):
        attempt()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("old", [False, True])
def test_a_save_that_fails_leaves_what_was_there(kv, old, tmp_path, monkeypatch):
    cache, path = prefilled(kv), tmp_path / "prefix"
    if old:
        kv.save(cache, path)
    _, most = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, most))  # as a disk that is full
    try:
        fails_and_leaves_all(tmp_path, lambda: kv.save(cache, path), OSError, "prefix could not be written .*too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    write = saved.save_file

    def interrupted(tensors, new, metadata):
        write(tensors, new, metadata)
        raise KeyboardInterrupt("by hand")

    monkeypatch.setattr(saved, "save_file", interrupted)
    fails_and_leaves_all(tmp_path, lambda: kv.save(cache, path), KeyboardInterrupt, "by hand")
    monkeypatch.undo()
    cache.arena.kept(1)["kv"][0, 3, 0, 0, 0] = torch.nan
    fails_and_leaves_all(tmp_path, lambda: kv.save(cache, path), ValueError, "1.kv of the cache has numbers .* NaN")
    kv.release()
    fails_and_leaves_all(tmp_path, lambda: kv.save(cache, path), ValueError, "given back|ended")


def test_after_the_context_nothing_is_saved(model, tmp_path):
    with offload(model, parse_policy("full"), max_new_tokens=64) as kv, torch.no_grad():
        cache = prefilled(kv)
    with pytest.raises(ValueError, match=r"given back|ended"):
        kv.save(cache, tmp_path / "x")
    with (
        offload(model, parse_policy("full"), max_new_tokens=64) as another,
        pytest.raises(ValueError, match="a TieredCache of another context cannot be saved here"),
    ):
        another.save(cache, tmp_path / "x")
    with pytest.raises(ValueError, match="a DynamicCache of another context cannot be saved here"):
        kv.save(transformers.DynamicCache(), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_forward_that_broke_off_is_not_saved(kv, tmp_path):
    cache = prefilled(kv)

    def fail(*_):
        raise RuntimeError("by hand")

    with kv.model.model.layers[0].mlp.register_forward_pre_hook(fail), pytest.raises(RuntimeError, match="by hand"):
        kv.model(torch.arange(3)[None], past_key_values=cache)
    with pytest.raises(ValueError, match="has not come to its end"):
        kv.save(cache, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_model_without_layers_of_the_policy_is_refused(tmp_path):
    config = transformers.MistralConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=16,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with offload(model, parse_policy("full"), max_new_tokens=64) as kv, torch.no_grad():
        cache = prefilled(kv)
        with pytest.raises(ValueError, match="no layer of this model keeps its cache under a policy"):
            kv.save(cache, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_only_files_are_replaced_and_links_stay(kv, tmp_path):
    cache = prefilled(kv)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name in ("folder", "fifo"):
        with pytest.raises(ValueError, match=f"{name} is no file"):
            kv.save(cache, tmp_path / name)
    with pytest.raises(FileNotFoundError):
        kv.save(cache, tmp_path / "none" / "x")
    (tmp_path / "link").symlink_to("folder/file")
    kv.save(cache, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["file"]
    name = "é" * 120  # 240 bytes of the 255 that a name may have
    kv.save(cache, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["fifo", "folder", "link", name])


def test_what_the_dead_left_is_removed_and_what_lives_stays(kv, tmp_path):
    cache, path = prefilled(kv), tmp_path / "prefix"
    dead, alive = tmp_path / ".prefix.dead.kvsim-part", tmp_path / ".prefix.alive.kvsim-part"
    others = [tmp_path / ".prefix.part", tmp_path / ".other.dead.kvsim-part", tmp_path / ".prefix.file.kvsim-part"]
    for folder in (dead, alive, *others[:2]):
        folder.mkdir()
        (folder / "prefix").write_text("half of it")
    others[2].write_text("a file of somebody else")
    lock = os.open(alive, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    kv.save(cache, path)
    assert {*tmp_path.iterdir()} == {path, alive, *others}
    os.close(lock)
    kv.save(cache, path)
    assert {*tmp_path.iterdir()} == {path, *others}


SCRIPT = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch, transformers
from policies import parse_policy
from runtime import offload

what, count, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
path, rng = folder / "prefix", random.Random(count)
config = transformers.LlamaConfig(
    vocab_size=101, hidden_size=256, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4
)
model = transformers.AutoModelForCausalLM.from_config(config).eval()


def forked(work):
    child = os.fork()
    if child:
        return child
    while True:
        work()


def seen():
    return kv.load(path).ids[0, 0].item()  # ValueError where the file is neither the old nor the new one


with offload(model, parse_policy("full"), max_new_tokens=64) as kv, torch.no_grad():
    caches = [kv.cache(), kv.cache()]
    for number, cache in enumerate(caches):
        model(number + torch.zeros(1, 512, dtype=torch.int64), past_key_values=cache)
    began_s = time.monotonic()
    kv.save(caches[0], path)
    save_s = time.monotonic() - began_s
    found, left = [], 0
    if what == "kills":
        turn = iter(range(10**9))
        for _ in range(count):
            child = forked(lambda: kv.save(caches[next(turn) % 2], path))
            time.sleep(rng.random() * 3 * save_s)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            left += len([*folder.iterdir()]) > 1
            found.append(seen())
    else:
        children = [forked(lambda: kv.save(cache, path)) for cache in caches]
        found = [seen() for _ in range(count)]
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    kv.save(caches[1], path)
    names = [each.name for each in folder.iterdir()]
    print(json.dumps({"found": found, "left": left, "at_last": seen(), "names": names}))
"""


def run(what, count, folder):
    # One thread, so that the process may fork; the children inherit the caches.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, what, str(count), str(folder)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return json.loads(done.stdout)


def test_a_save_that_is_killed_leaves_the_old_file_or_the_new_one(tmp_path):
    told = run("kills", KILLS, tmp_path)
    assert len(told["found"]) == KILLS
    assert {*told["found"]} <= {0, 1}
    assert told["left"] or KILLS < 20  # some were killed while they wrote, or the test would show nothing
    assert (told["at_last"], told["names"]) == (1, ["prefix"])


def test_two_processes_that_save_to_one_file_do_not_mix(tmp_path):
    told = run("both", 15, tmp_path)
    assert {*told["found"]} <= {0, 1}
    assert (told["at_last"], told["names"]) == (1, ["prefix"])
