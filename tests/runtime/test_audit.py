"""The audit, which counts from outside, against the mover, the replayed plans, and copies made behind their back."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvsim.plans.replay import replay_moved_bytes  # noqa: E402
from policies import parse_policy  # noqa: E402
from policies.plan import Tier  # noqa: E402
from runtime import offload  # noqa: E402
from runtime.audit import Audit  # noqa: E402
from runtime.kernels.gather import gather_rows  # noqa: E402

DOWN, UP = (Tier.HBM, Tier.DDR), (Tier.DDR, Tier.HBM)


@pytest.fixture(scope="module")
def model():
    config = transformers.LlamaConfig(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=None,
    )
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(config).eval().float()


@pytest.fixture
def tiers(model):
    """An audit under way, and from a cache under offload-all a tensor of each tier: (1, 48, 2, 2, 8) fp32."""
    ids = torch.arange(3, 35)[None]
    with offload(model, parse_policy("offload-all"), max_new_tokens=16) as kv, torch.no_grad():
        cache = kv.cache()
        model(input_ids=ids, past_key_values=cache)
        (host,) = (t for tier, t in cache.arena.held()[-1:] if tier is Tier.DDR)
        hbm = next(t for tier, t in cache.arena.held() if tier is Tier.HBM)
        with Audit(kv) as audit:
            yield audit, hbm, host


def test_it_agrees_with_the_mover_and_the_replayed_plans(model):
    ids = torch.randint(3, 101, (2, 40), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with offload(model, parse_policy("offload-all"), max_new_tokens=16) as kv, Audit(kv) as audit:
        options = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
        model.generate(ids, past_key_values=kv.cache(), **options)
        # Two sequences on three layers; a row is keys and values of 2 heads of 8 fp32 numbers: 128 bytes. Down: the
        # prompt and the 8 tokens fed back. Up, at each of those steps: all that came before.
        assert audit.moved_bytes == {DOWN: 2 * 3 * 128 * (40 + 8), UP: 2 * 3 * 128 * sum(range(40, 48))}
        assert kv.moved_bytes == audit.moved_bytes
        assert replay_moved_bytes(kv.counts, kv.policy, kv.shape) == audit.moved_bytes
    assert not audit.violations
    assert not audit.elsewhere_bytes


def test_copies_are_counted_whoever_makes_them(tiers):
    audit, hbm, host = tiers
    hbm.copy_(host)
    assert audit.moved_bytes == {UP: host.nbytes}
    host[:, 3:5].copy_(hbm[:, :2])
    assert audit.moved_bytes == {UP: host.nbytes, DOWN: 2 * 128}
    ids = torch.tensor([1, 4, 2])
    hbm.index_copy_(1, ids, host[:, :3])
    hbm[:, ids] = host[:, ids]
    hbm[0].scatter_(0, ids[:, None, None, None].expand(3, 2, 2, 8), host[0, :3])
    assert audit.moved_bytes == {UP: host.nbytes + 3 * 3 * 128, DOWN: 2 * 128}
    assert not audit.violations


def test_what_is_derived_lies_where_its_source_does(tiers):
    audit, hbm, host = tiers
    scaled = (host.double() * 2).float()[:, :5]
    hbm[:, :5].copy_(scaled)
    fresh = torch.empty(1, 2, 2, 2, 8)
    fresh.copy_(hbm[:, :2])
    host[:, :2].copy_(fresh)
    assert audit.moved_bytes == {UP: 5 * 128, DOWN: 2 * 128}
    assert not audit.violations


def test_what_is_of_neither_tier_crosses_nothing(tiers):
    audit, hbm, host = tiers
    index = torch.arange(4)
    host[:, :4] = torch.from_numpy(host[:, 4:8].numpy().copy())
    assert host.index_select(1, index).shape == hbm.index_select(1, index).shape
    host.zero_()
    assert not audit.moved_bytes
    assert not audit.violations


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (lambda hbm, host: hbm + host, "aten.add.Tensor"),
        (lambda hbm, host: torch.cat([hbm, host]), "aten.cat.default"),
        (lambda hbm, host: torch.where(hbm > 0, host, 0.0), "aten.where.self"),
        (lambda hbm, host: host[0, hbm[0, :3, 0, 0, 0].long()], "aten.index.Tensor"),
        (lambda hbm, host: host[0].index_copy_(0, hbm[0, :1, 0, 0, 0].long(), hbm[0, :1]), "aten.index_copy_.default"),
        (lambda hbm, host: hbm.mul_(host), "aten.mul_.Tensor"),
    ],
)
def test_other_mixtures_are_violations(tiers, operation, name):
    audit, hbm, host = tiers
    operation(hbm, host)
    assert audit.violations == {name: 1}
    assert not audit.moved_bytes


def test_a_gather_moves_the_rows_that_are_named(tiers):
    audit, hbm, host = tiers
    src = host[0].flatten(2).transpose(0, 1)[None]  # (1, 2, 48, 16): rows of 64 bytes
    dst = hbm[0].flatten(2).transpose(0, 1)[None]
    src.copy_(torch.arange(src.numel()).view(src.shape))
    hbm.zero_()
    counter = torch.zeros(1, dtype=torch.int64)
    on_gpu = hbm.flatten()[:1].long()  # a zero that makes ids and slots lie where the GPU would have them
    ids = torch.tensor([[[5, -1, 0], [-1, -1, 7]]]) + on_gpu
    slots = torch.tensor([[[2, 0, 1], [0, 1, 3]]]) + on_gpu
    gather_rows(src, ids, dst, slots, counter)
    assert audit.moved_bytes == {UP: 3 * 64}
    assert not audit.violations
    assert int(counter) == 3
    assert torch.equal(dst[0, 0, [1, 2]], src[0, 0, [0, 5]])
    assert torch.equal(dst[0, 1, 3], src[0, 1, 7])
    assert int((dst != 0).any(-1).sum()) == 3


def test_memory_that_is_used_again_is_not_taken_for_what_it_was(tiers):
    audit, hbm, host = tiers
    for _ in range(3000):  # more than the audit remembers of what has been freed
        host[:, :1] + 1
        fresh = torch.empty(1, 1, 2, 2, 8)
        hbm[:, :1].copy_(fresh)
    assert not audit.moved_bytes
    assert not audit.violations
