"""Mixtral and DeepSeek-V3 through the simulator: bytes counted by hand from the sizes that their papers print."""

import pytest
from simulated import setup, trace

from kvsim.hardware.catalogue import load_gpu
from kvsim.models import load_model
from kvsim.plans.sent_state import SentState
from kvsim.run.simulate import simulate
from policies import parse_policy

# Mixtral (arXiv:2401.04088, table 1): 32 layers of 4096, 32 heads of 128, 8 KV heads, 8 experts of 14336, 2 a token.
MIXTRAL_ATTENTION = 2 * 4096 * 4096 + 2 * 4096 * 8 * 128
MIXTRAL_EXPERT = 3 * 4096 * 14336
MIXTRAL_LAYER, MIXTRAL_HEAD = MIXTRAL_ATTENTION + 4096 * 8, 32000 * 4096
MIXTRAL_TOKEN_BYTES = 32 * 2 * 8 * 128 * 2

# DeepSeek-V3 (arXiv:2412.19437, section 4.2): 61 layers of 7168, 128 heads; queries through 1536, keys and values
# through a latent of 512 and a rotary key of 64, heads of 128 + 64 and 128; three dense layers of 18432, the others
# with 256 experts of 2048, eight and a shared one a token.
LATENT = 512 + 64
DEEPSEEK_ATTENTION = 7168 * 1536 + 1536 * 128 * 192 + 7168 * LATENT + 512 * 128 * 256 + 128 * 128 * 7168
DEEPSEEK_EXPERT, DEEPSEEK_HEAD = 3 * 7168 * 2048, 129280 * 7168
DEEPSEEK_ROUTED = 9 * DEEPSEEK_EXPERT + 7168 * 256
DEEPSEEK_ACTIVE = 61 * DEEPSEEK_ATTENTION + 3 * 3 * 7168 * 18432 + 58 * DEEPSEEK_ROUTED + DEEPSEEK_HEAD
# Published in FP8 but for the head and the routers, which have 16 bits, with a scale of four bytes for each block of
# 128 by 128 (section 3.3, and the checkpoint's quantization_config).
DEEPSEEK_IN_16_BITS = DEEPSEEK_HEAD + 58 * 7168 * 256
DEEPSEEK_BYTES = DEEPSEEK_ACTIVE + DEEPSEEK_IN_16_BITS + (DEEPSEEK_ACTIVE - DEEPSEEK_IN_16_BITS) * 4 // 128**2


def lone(model, tp, output, **options):
    """One request of 1,000 tokens on `tp` GPUs, and the setup."""
    s = setup(model=load_model(model), gpu=load_gpu("h200-sxm"), tp=tp, gpus=tp, **options)
    return simulate(trace([0.0], 1000, output), s), s


def weights_of_a_step(model, tp):
    """Bytes of weights that one decode step of one sequence reads, all ranks together."""
    read = [lone(model, tp, output)[0].traffic["hbm->sm"]["weights"] for output in (2, 1)]
    return read[0] - read[1]


def held(result, s):
    """The most KV bytes that all ranks held."""
    return result.series["hbm_bytes"].max() - s.tp * s.rank.weight_bytes


@pytest.mark.parametrize("tp", [2, 4])
def test_mixtral_by_hand(tp):
    """Its KV heads are divided among the ranks; a token reads two experts of eight, a prompt of 1,000 all of them."""
    result, s = lone("mixtral-8x7b", tp, 3)
    assert held(result, s) == 1002 * MIXTRAL_TOKEN_BYTES
    active = 32 * (MIXTRAL_LAYER + 2 * MIXTRAL_EXPERT) + MIXTRAL_HEAD
    assert active == pytest.approx(12.9e9, rel=0.02)  # the paper's own figure counts the embedding as well
    assert weights_of_a_step("mixtral-8x7b", tp) == pytest.approx(2 * active, rel=1e-4)  # bf16; norms are not counted
    prompt, _ = lone("mixtral-8x7b", tp, 1)
    everything = 32 * (MIXTRAL_LAYER + 8 * MIXTRAL_EXPERT) + MIXTRAL_HEAD
    assert prompt.traffic["hbm->sm"]["weights"] == pytest.approx(2 * everything, rel=1e-4)


def test_a_batch_reads_the_experts_that_its_tokens_touch():
    """16 sequences that decode touch 8 (1 - (1 - 2 / 8)^16) = 7.92 experts, not 2 x 16."""
    s = setup(model=load_model("mixtral-8x7b"), gpu=load_gpu("h200-sxm"), tp=2, gpus=2, max_num_batched_tokens=16_000)
    read = [simulate(trace([0.0] * 16, 1000, output), s).traffic["hbm->sm"]["weights"] for output in (2, 1)]
    touched = 8 * (1 - (1 - 2 / 8) ** 16)
    expected = 32 * (MIXTRAL_LAYER + touched * MIXTRAL_EXPERT) + MIXTRAL_HEAD
    assert read[0] - read[1] == pytest.approx(2 * expected, rel=1e-4)


def test_deepseek_by_hand():
    """Every rank holds the latent of every token; a token reads 37 billion weights, most of a byte each."""
    result, s = lone("deepseek-v3", 8, 3)
    assert held(result, s) == 8 * 1002 * 61 * LATENT * 2
    assert pytest.approx(37e9, rel=0.02) == DEEPSEEK_ACTIVE
    # Heads are divided among the ranks; each reads the projections down to the two latents whole, with their scales.
    again = 7 * 61 * 7168 * (1536 + LATENT)
    again += again * 4 // 128**2
    assert weights_of_a_step("deepseek-v3", 8) == pytest.approx(DEEPSEEK_BYTES + again, rel=1e-4)
    # A decode step reads the latents of all tokens once on each rank, appends one row, and moves queries and outputs.
    reads = [lone("deepseek-v3", 8, output)[0].traffic["hbm->sm"]["plans"] for output in (3, 2)]
    step_bytes = reads[0] - reads[1]
    latents, rows = 8 * 1002 * 61 * LATENT * 2, 8 * 2 * 61 * LATENT * 2
    queries_and_outputs = 61 * 128 * (192 + 128) * 2
    assert step_bytes == latents + rows + queries_and_outputs


def test_deepseek_hands_its_latents_over():
    """With prompts on eight GPUs and decoding on eight others, a token is 61 latents of 576, on each of eight ranks."""
    model = load_model("deepseek-v3")
    assert SentState(parse_policy("full"), model.shard(8)).bytes_of(1000) == (1000 * 61 * LATENT * 2, 0, 0)
    s = setup(model=model, gpu=load_gpu("h200-sxm"), tp=8, gpus=16, prefill_gpus=8)
    result = simulate(trace([0.0, 0.1], [1000, 700], [4, 2]), s)
    assert result.traffic["nic"]["handoff"] == 8 * 1700 * 61 * LATENT * 2


def test_stages_divide_latents_that_ranks_repeat():
    """DeepSeek on eight GPUs: two ranks for each of four stages hold each latent twice, not eight times.

    So they have room for four times the tokens that eight ranks have, but for the stages' unequal layers, and each
    projection down to a latent is read by two.
    """
    wide, _ = lone("deepseek-v3", 8, 3)
    s = setup(model=load_model("deepseek-v3"), gpu=load_gpu("h200-sxm"), gpus=8, tp=2, pp=4)
    results = [simulate(trace([0.0], 1000, output), s) for output in (2, 1)]
    assert results[0].series["hbm_bytes"].max() - 2 * sum(s.weight_bytes) == 2 * 1001 * 61 * LATENT * 2
    taken = zip(s.weight_bytes, s.reserve_bytes, strict=True)
    rooms = [int(0.9 * (s.gpu.device_bytes or s.gpu.memory_bytes)) - weights - reserve for weights, reserve in taken]
    fits = min(room // (len(own) * LATENT * 2) for room, own in zip(rooms, s.stages.layers, strict=True))
    assert s.capacity()[0] // (61 * LATENT * 2) == pytest.approx(fits, abs=1)
    assert fits / (wide.inputs["capacity_bytes"]["hbm"] // (61 * LATENT * 2)) == pytest.approx(4, rel=0.2)
    read = results[0].traffic["hbm->sm"]["weights"] - results[1].traffic["hbm->sm"]["weights"]
    assert read == pytest.approx(DEEPSEEK_BYTES + 61 * 7168 * (1536 + LATENT), rel=1e-4)


def test_small_micro_batches_touch_most_experts_again():
    """16 sequences in four micro-batches of 4 touch 8 (1 - (1 - 2 / 8)^4) = 5.47 experts each: 21.9 reads, not 7.92."""
    s = setup(model=load_model("mixtral-8x7b"), gpu=load_gpu("h200-sxm"), gpus=4, pp=4, max_num_batched_tokens=16_000)
    read = [simulate(trace([0.0] * 16, 1000, output), s).traffic["hbm->sm"]["weights"] for output in (2, 1)]
    touched = 8 * (1 - (1 - 2 / 8) ** 4)
    expected = 32 * (MIXTRAL_LAYER + touched * MIXTRAL_EXPERT) + MIXTRAL_HEAD
    assert read[0] - read[1] == pytest.approx(4 * 2 * expected, rel=1e-4)
