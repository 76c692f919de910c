"""ShadowKV's tables, arXiv:2410.21465, on one A100-80G."""

from kvsim import load_gpu, load_host, load_model
from kvsim.hardware.machine import Machine, access_bytes
from policies import Step, parse_policy, plan_layer
from policies.plan import Compute, Tier, moved_bytes
from published.comparison import Comparison, Section
from published.pricing import Priced

RESERVE_BYTES = 4_000_000_000

PROSE = """\
One A100-80G in bf16, eager rates, 100 generated tokens (the step in the middle, the 50th, is priced), ShadowKV
with chunks of 8, rank 160, 60 % of the selected chunks already in HBM, and budgets of 1,024, 2,048 and 4,096 tokens at
60K, 122K and 244K, as the authors' script sets them. K is 1,024 tokens.

*Largest batch* is what fits in 80 GiB beside the weights and one reserve of 4 GB for all rows: the CUDA context (about
0.5 GB), activations and fp32 logits of 48 sequences (below 0.1 GB) and the allocator's slack; the published batches
are the authors' choices, so the rows only tell that those were near the limit.
*Infinite batch* is full attention that does nothing but stream the KV cache, at 2,048 GiB/s as the paper counts; the
card's own 2.039e12 B/s would give 7 % less.
*Per layer* compares the breakdown of a decode step with single operations of the plan, each alone on its lane; "GEMM,
softmax and max" is `score` and `aggregate`, and FFN and QKV are the model's own. The rebuild is priced at its roofline,
50 MB of gathered rows and 6 GFLOP at 48 x 64K; the authors' kernel takes twenty times as long, which costs them nothing
while the fetch beside it takes longer still, and is not modelled.
*Prefill per layer*: one rate calibrates GEMMs and attention from whole prefills (see the MInference table below), and
these include what the breakdown leaves out, so GEMMs and attention alone come out slower than published. The FLOPs of
the decomposition are those of an fp32 SVD of the n x 1024 keys to leading order at the fp32 rate; the published time
does not grow with n as that does.
*Three sequences of 1M with the cache on the host*: full attention is `offload-all`; ShadowKV's budget is the paper's
1.56 % of the context (an assumption). Quest over a host-resident cache is not among the policies."""

THROUGHPUT = (  # model, K of context, budget, batches of full and ShadowKV, tokens/s of both, gain, infinite batch
    ("llama-3-8b-1m", 60, 1024, 8, 48, 160.62, 455.14, 2.83, 273.07),
    ("llama-3-8b-1m", 122, 2048, 4, 24, 80.77, 239.51, 2.97, 134.30),
    ("llama-3.1-8b", 60, 1024, 8, 48, 160.93, 472.77, 2.94, 273.07),
    ("llama-3.1-8b", 122, 2048, 4, 24, 80.78, 245.90, 3.04, 134.30),
)
LAYER_PARTS = ("GEMM, softmax and max", "top-k", "K rebuild", "V fetch", "attention", "FFN", "QKV")
LAYER_MS = (  # batch, K of context, budget, then the parts; the paper lists GEMM and softmax, and max, apart
    (48, 64, 1024, (0.56 + 0.07, 0.14, 1.25, 1.84, 0.23, 0.33, 0.05)),
    (24, 128, 2048, (0.58 + 0.07, 0.15, 1.36, 1.66, 0.21, 0.29, 0.05)),
    (12, 256, 4096, (0.65 + 0.07, 0.16, 1.49, 1.75, 0.19, 0.25, 0.05)),
)
PREFILL_MS = ((64, 186.23, 96.47, 17.19), (128, 721.13, 193.32, 26.62), (256, 2880.21, 392.77, 50.56))


def section() -> Section:
    """Throughput, batches, the breakdowns of decode and prefill, and the figures derived from them."""
    machine = Machine(gpu=load_gpu("a100-80g-sxm@eager"), host=load_host("ddr4-dual-xeon"))
    rows = [*_throughput(machine), *_decode_parts(machine), *_prefill_parts(machine), *_derived(), *_on_host(machine)]
    return Section(title="ShadowKV (arXiv:2410.21465)", prose=PROSE, comparisons=tuple(rows))


def _throughput(machine: Machine) -> list[Comparison]:
    rows = []
    for name, kilo, budget, full_batch, shadow_batch, full_rate, shadow_rate, gain, infinite in THROUGHPUT:
        model, prompt, case = load_model(name), kilo * 1024, f"{name}, {kilo}K"
        priced = {
            "full": (Priced("full", model, machine), full_batch, full_rate),
            "ShadowKV": (
                Priced(f"shadowkv:sink_tokens=0,budget_tokens={budget}", model, machine),
                shadow_batch,
                shadow_rate,
            ),
        }
        found = {}
        for method, (policy, batch, rate) in priced.items():
            found[method] = batch / policy.decode_s(prompt, batch, 50)
            rows.append(_row(f"throughput, {method}, {case}", "tokens/s", rate, found[method], f"batch {batch}"))
        rows.append(_row(f"gain, {case}", "x", gain, found["ShadowKV"] / found["full"]))
        infinite_rate = 2048 * 2**30 / model.kv_bytes(prompt)
        rows.append(_row(f"infinite batch, {case}", "tokens/s", infinite, infinite_rate, "2,048 GiB/s"))
        for method, (policy, batch, _) in priced.items():
            fits = policy.largest_batch(prompt, 100, RESERVE_BYTES)
            rows.append(_row(f"largest batch, {method}, {case}", "sequences", batch, fits, "4 GB reserve"))
    return rows


def _decode_parts(machine: Machine) -> list[Comparison]:
    model, rows = load_model("llama-3.1-8b"), []
    for batch, kilo, budget, published in LAYER_MS:
        ops = Priced(f"shadowkv:sink_tokens=0,budget_tokens={budget}", model, machine).decode_ops_s(kilo * 1024, batch)
        qkv_s, _, ffn_s = machine.layer_s(model, model.layers[0], batch)
        found_s = (
            ops["score"] + ops["aggregate"],
            ops["select"],
            ops["rebuild"],
            ops["fetch"],
            ops["attend"],
            ffn_s,
            qkv_s,
        )
        for part, there_ms, here_s in zip(LAYER_PARTS, published, found_s, strict=True):
            rows.append(_row(f"per layer, {part}, {batch} x {kilo}K", "ms", there_ms, 1e3 * here_s))
    return rows


def _prefill_parts(machine: Machine) -> list[Comparison]:
    model, rows = load_model("llama-3.1-8b"), []
    policy = Priced("shadowkv:sink_tokens=0", model, machine)
    for kilo, *published in PREFILL_MS:
        ops = policy.prefill_ops_s(kilo * 1024)
        ffn_s = machine.layer_s(model, model.layers[0], kilo * 1024)[2]
        for part, there_ms, here_s in zip(
            ("attention", "FFN", "SVD"), published, (ops["attend"], ffn_s, ops["decompose"]), strict=True
        ):
            rows.append(_row(f"prefill per layer, {part}, {kilo}K", "ms", there_ms, 1e3 * here_s))
    return rows


def _derived() -> list[Comparison]:
    model = load_model("llama-3.1-8b")
    machine = Machine(gpu=load_gpu("a100-80g-sxm@datasheet"), host=load_host("ddr4-dual-xeon"))
    prompt = 122 * 1024
    full = Priced("full", model, machine).stored_bytes(prompt)[Tier.HBM]
    shadow = Priced("shadowkv:sink_tokens=0", model, machine).stored_bytes(prompt)[Tier.HBM]
    plan = plan_layer(parse_policy("shadowkv:sink_tokens=0"), model, Step.decoding(131_072, 1), 0)
    buffers = {buffer.name: buffer for buffer in plan.buffers}
    misses = {count.name: count.expected() for count in plan.counts}
    streamed = [op for op in plan.ops if isinstance(op, Compute) and op.name in ("score", "attend")]
    read_bytes = sum(access_bytes(op.reads, buffers, misses) for op in streamed)
    fetched_bytes = moved_bytes(plan.ops, plan.buffers, misses)[Tier.DDR, Tier.HBM]
    rates = machine.gpu.rates
    layer_s = read_bytes / rates.hbm_Bps + fetched_bytes / rates.pcie_h2d_Bps
    bandwidth = model.layers[0].kv_bytes(131_072, "bf16", "bf16") / layer_s
    return [
        _row(
            "equivalent bandwidth, 128K",
            "TB/s",
            7.2,
            bandwidth / 1e12,
            "landmarks, attention and fetch one after another",
        ),
        _row("memory saving, 122K", "x", 6.26, full / shadow, "the paper prints 7.08; its own formula gives 6.26", "C"),
    ]


def _on_host(machine: Machine) -> list[Comparison]:
    model, prompt, batch = load_model("llama-3-8b-1m"), 2**20, 3
    published = (("full", "offload-all", 0.21), ("ShadowKV", "shadowkv:sink_tokens=0,budget_tokens=16384", 45.32))
    return [
        _row(
            f"three sequences of 1M on the host, {method}",
            "tokens/s",
            rate,
            batch / Priced(policy, model, machine).decode_s(prompt, batch, 50),
            policy,
        )
        for method, policy, rate in published
    ]


def _row(what: str, unit: str, published: float, found: float, assumption: str = "", source: str = "R") -> Comparison:
    return Comparison(what=what, unit=unit, published=published, source=source, kvsim=found, assumption=assumption)
