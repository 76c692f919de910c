"""Files that are forged or damaged as saved caches: each is refused with one ValueError, before memory is taken."""

import os
import random
import resource
import struct
import time

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from fuzz import saved_caches  # noqa: E402
from fuzz.saved_caches import assembled, ground, refused, signed, whole  # noqa: E402

SAYS = {
    "no batch": lambda s: s.pop("batch"),
    "no tensors": lambda s: s.pop("digests"),
    "an unknown key": lambda s: s.update(extra=1),
    "an unknown key of the fingerprint": lambda s: s["fingerprint"].update(extra=1),
    "no config": lambda s: s["fingerprint"].pop("config"),
    "settings that are a list": lambda s: s["fingerprint"].update(settings=[]),
    "a weights digest that is a number": lambda s: s["fingerprint"].update(weights_digest=7),
    "a weights digest of other weights": lambda s: s["fingerprint"].update(weights_digest="0" * 64),
    "a fingerprint that is a text": lambda s: s.update(fingerprint="x"),
    "another policy": lambda s: s.update(policy="quest"),
    "a policy of 100,000 characters": lambda s: s.update(policy="x" * 100_000),
    "a policy that steers the terminal": lambda s: s.update(policy="\x1b[31m"),
    "a policy that is a number": lambda s: s.update(policy=1),
    "a lone surrogate": lambda s: s.update(policy="\ud800"),
    "another dtype": lambda s: s.update(dtype="bf16"),
    "batch 0": lambda s: s.update(batch=0),
    "batch -1": lambda s: s.update(batch=-1),
    "batch 1": lambda s: s.update(batch=1),
    "batch 10^9": lambda s: s.update(batch=10**9),
    "batch 10^400": lambda s: s.update(batch=10**400),
    "a batch of 2.0": lambda s: s.update(batch=2.0),
    "a batch that is true": lambda s: s.update(batch=True),
    "a batch that is NaN": lambda s: s.update(batch=float("nan")),
    "a batch that is infinite": lambda s: s.update(batch=float("inf")),
    "a batch that is a text": lambda s: s.update(batch="2"),
    "no tokens": lambda s: s.update(tokens=0),
    "fewer tokens than the prompt": lambda s: s.update(tokens=56),
    "one token too many": lambda s: s.update(tokens=58),
    "tokens beyond the room": lambda s: s.update(tokens=66),
    "2^63 tokens": lambda s: s.update(tokens=2**63),
    "a first prompt of 2^40": lambda s: s.update(first_prompt_tokens=2**40),
    "a first prompt of one": lambda s: s.update(first_prompt_tokens=1),
    "room for one token": lambda s: s.update(max_new_tokens=1),
    "room for 2^40 tokens": lambda s: s.update(max_new_tokens=2**40),
    "room for 10^9 tokens": lambda s: s.update(max_new_tokens=10**9),
    "layer 2 of 2": lambda s: s["prompt_tokens"].update({"2": 57}),
    "layer -1": lambda s: s["prompt_tokens"].update({"-1": 57}),
    "layer 00": lambda s: s["prompt_tokens"].update({"00": 57}),
    "a layer in other digits": lambda s: s["prompt_tokens"].update({"٣": 57}),
    "a layer of 5,000 digits": lambda s: s["prompt_tokens"].update({"9" * 5000: 57}),
    "a path for a layer": lambda s: s["prompt_tokens"].update({"../1": 57}),
    "no layers": lambda s: s["prompt_tokens"].clear(),
    "layers in a list": lambda s: s.update(prompt_tokens=[57, 57]),
    "a prompt beyond the tokens": lambda s: s["prompt_tokens"].update({"1": 58}),
    "rotary angles of no table": lambda s: s["rotary"].update({"0": 1}),
    "a table of angles below 0": lambda s: s["rotary"].update({"0": -1}),
    "table 2^40 of angles": lambda s: s["rotary"].update({"0": 2**40}),
    "angles of layer 7": lambda s: s["rotary"].update({"7": 0}),
    "no angles": lambda s: s["rotary"].clear(),
    "ids that are not bound": lambda s: s.update(bound=False),
    "bound by 1": lambda s: s.update(bound=1),
    "a digest too few": lambda s: s["digests"].pop("ids"),
    "a digest too many": lambda s: s["digests"].update({"../x": "0" * 64}),
    "a digest that is null": lambda s: s["digests"].update(ids=None),
    "another digest": lambda s: s["digests"].update(ids="0" * 64),
}


def texts(base):
    text = signed(base.says)[saved_caches.FORMAT]
    yield "no JSON", "not JSON"
    yield "an empty text", ""
    yield "a list", "[]"
    yield "null", "null"
    yield "a number", "7"
    yield "nested 100,000 deep", "[" * 100_000
    yield "objects nested 100,000 deep", '{"a":' * 100_000
    yield "a key twice", text[:-1] + ', "batch": 2}'
    yield "two texts", text + text
    yield "half a text", text[: len(text) // 2]
    yield "NaN", text.replace('"batch": 2', '"batch": NaN')
    yield "a number of 5,000 digits", text.replace('"batch": 2', f'"batch": {"9" * 5000}')
    yield "a text of 20 million characters", text[:-1] + f', "x": "{"y" * 20_000_000}"}}'


def files(base):
    good = whole(base, base.says)
    right, entries, (length,) = signed(base.says), base.entries, struct.unpack("<Q", good[:8])
    yield "an empty file", b""
    for at in (1, 7, 8, 9, 8 + length // 2, 8 + length - 1, 8 + length, 9 + length, len(good) - 1):
        yield f"{at} bytes of it", good[:at]
    yield "one byte more", good + b"\0"
    for said in (0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1):
        yield f"a header of {said} bytes", assembled(entries, right, base.data, length=said)
    yield "a header that is not UTF-8", struct.pack("<Q", 8) + b'{"\xff\xfe": '
    yield "a header nested 100,000 deep", struct.pack("<Q", 100_000) + b"[" * 100_000
    yield "no metadata", assembled(entries, None, base.data)
    yield "metadata that is a list", assembled(entries, [], base.data)
    yield "an older format", assembled(entries, {"kvsim-cache-1": right[saved_caches.FORMAT]}, base.data)
    yield "no checksum", assembled(entries, {saved_caches.FORMAT: right[saved_caches.FORMAT]}, base.data)
    yield "more metadata", assembled(entries, right | {"more": "x"}, base.data)
    for name in ("ids", "real", "rotary.0.cos", next(iter(entries))):
        yield f"no {name}", assembled({k: v for k, v in entries.items() if k != name}, right, base.data)
        cast = "I32" if entries[name]["dtype"] == "F32" else "F32"
        changes = {"dtype": cast}, {"shape": [1, *entries[name]["shape"]]}, {"shape": entries[name]["shape"][::-1]}
        for change in (*changes, {"shape": [2**31, 2**31]}, {"data_offsets": [0, 2**63]}, {"data_offsets": [8, 0]}):
            changed = entries | {name: entries[name] | change}
            yield f"{name} with {change}", assembled(changed, right, base.data)
    yield "a name with a path", assembled({**entries, "../x": entries["ids"]}, right, base.data)


@pytest.fixture(scope="module")
def shadow():
    return ground(saved_caches.POLICIES[2])


@pytest.mark.parametrize("forgery", SAYS)
def test_a_forged_header_is_refused(shadow, forgery, tmp_path):
    says = saved_caches.copy.deepcopy(shadow.says)
    SAYS[forgery](says)
    assert saved_caches.json.dumps(says) != saved_caches.json.dumps(shadow.says)
    (tmp_path / "x").write_bytes(whole(shadow, says))
    assert refused(shadow.kv, tmp_path / "x")
    assert not any(cache.arena.allocated_bytes for cache in shadow.kv.caches)


def test_texts_and_files_that_are_none_are_refused(shadow, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(whole(shadow, shadow.says))
    assert not refused(shadow.kv, path)  # what the forgeries begin with is right
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for what, text in texts(shadow):
        path.write_bytes(whole(shadow, text))
        assert refused(shadow.kv, path), what
    for what, content in files(shadow):
        path.write_bytes(content)
        assert refused(shadow.kv, path), what
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 500_000


def test_places_that_are_no_files_are_refused_at_once(shadow, tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    began_s = time.monotonic()
    for name in ("folder", "fifo", "loop", "zero"):
        assert refused(shadow.kv, tmp_path / name), name
    assert time.monotonic() - began_s < 5
    with pytest.raises(FileNotFoundError):
        shadow.kv.load(tmp_path / "none")
    (tmp_path / "cache").write_bytes(whole(shadow, shadow.says))
    (tmp_path / "link").symlink_to("cache")
    assert shadow.kv.load(tmp_path / "link").get_seq_length() == 57


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_nothing_can_go_on_from_are_refused(shadow, number, tmp_path):
    name = next(name for name, tensor in shadow.tensors.items() if tensor.is_floating_point())
    tensor = shadow.tensors[name].clone()
    tensor.view(-1)[-1] = number
    first, last = shadow.entries[name]["data_offsets"]
    data = shadow.data[:first] + tensor.numpy().tobytes() + shadow.data[last:]
    says = shadow.says | {"digests": shadow.says["digests"] | {name: saved_caches.digest(tensor)}}
    (tmp_path / "x").write_bytes(assembled(shadow.entries, signed(says), data))
    with pytest.raises(ValueError, match=f"{name} of the cache has numbers that are NaN or infinite"):
        shadow.kv.load(tmp_path / "x")


def test_every_bit_counts(shadow, tmp_path):
    """Each byte of each tensor, and those of the header's text, in a hundred places: a flipped bit is refused."""
    content, rng = whole(shadow, shadow.says), random.Random(1)
    for _ in range(100):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (tmp_path / "x").write_bytes(damaged)
        assert refused(shadow.kv, tmp_path / "x")


def test_mutations_are_read_or_refused(tmp_path):
    outcomes = [saved_caches.attempt(random.Random(seed), tmp_path) for seed in range(200)]
    assert outcomes.count("refused") > 150
    assert "read" in outcomes
