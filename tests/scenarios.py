"""Random small scenarios: memory tight or ample, one replica or several, any chunk, cache and policy."""

from dataclasses import fields, replace

import numpy as np
from hypothesis import strategies as st
from simulated import MODEL, setup, trace

from kvsim.scenario.choices import EVICTIONS

SMALL = replace(MODEL, name="small", layers=MODEL.layers[:3])
TOKEN_BYTES = 2 * 2 * 8 * 128 * 3  # keys and values of 8 heads of 128, bf16, three layers
BLOCK = 64
POLICIES = (
    "full",
    "offload-all",
    "sink-window:window_tokens=200",
    "snapkv:budget_tokens=256",
    "quest:budget_tokens=256",
    "shadowkv:budget_tokens=256",
    "retrieval-attention",
    "infllm",
    "squeezed-attention:tier=ddr,levels=2",
    "full@layers=0-1+offload-all",
    "full@heads=2+sink-window@heads=6",
    "full@below=300+offload-all",
)
ENGINES = st.fixed_dictionaries(
    {
        "fidelity": st.sampled_from(["step", "op"]),
        "router": st.sampled_from(["round-robin", "least-loaded"]),
        "preemption": st.sampled_from(["swap", "recompute"]),
        "max_num_seqs": st.integers(1, 8),
        "max_num_batched_tokens": st.sampled_from([16, 100, 512, 8192]),
    }
)
CACHING = st.fixed_dictionaries(
    {
        "prefix_cache_eviction": st.sampled_from(EVICTIONS),
        "prefix_cache_write": st.sampled_from(["through", "back"]),
        "prefix_cache_reuse": st.sampled_from(["always", "cheaper"]),
    }
)


def with_room(s, hbm_bytes, ddr_bytes):
    """The same setup on GPUs and hosts that leave a rank this much for KV state."""
    ranks = s.replicas_per_host * s.tp
    taken = s.rank.weight_bytes + s.reserve_bytes[0] + s.prefix_cache_hbm_bytes // ranks
    return replace(
        s,
        gpu=replace(s.gpu, memory_bytes=taken + hbm_bytes),
        host=replace(s.host, ddr_bytes=s.prefix_cache_ddr_bytes + ddr_bytes * ranks),
        gpu_memory_utilization=1.0,
        host_memory_utilization=1.0,
    )


def chains(draw, prompts):
    """Block ids for prompts that share up to three histories."""
    owners = draw(st.lists(st.integers(0, 2), min_size=len(prompts), max_size=len(prompts)))
    counts = [prompt // BLOCK for prompt in prompts]
    ids = [1000 * owner + i for owner, count in zip(owners, counts, strict=True) for i in range(count)]
    return {"block_tokens": BLOCK, "block_ids": ids, "block_counts": counts}


@st.composite
def scenarios(draw, caches=True, most=8):
    """Requests of any length at any distance, one and two GPUs to a replica, all sizes of memory and caches."""
    n = draw(st.integers(1, most))
    prompts, outputs, gaps = (
        draw(st.lists(numbers, min_size=n, max_size=n))
        for numbers in (
            st.integers(1, 1200) | st.sampled_from([1, BLOCK, 10 * BLOCK]),
            st.integers(1, 60) | st.just(1),
            st.floats(0, 0.2) | st.just(0.0),
        )
    )
    tp = draw(st.sampled_from([1, 2]))
    s = setup(draw(st.sampled_from(POLICIES)), model=SMALL, tp=tp, gpus=draw(st.sampled_from([2, 4])), **draw(ENGINES))
    columns = chains(draw, prompts) if caches else {}
    if caches:
        rooms = draw(st.tuples(*[st.sampled_from([0, 8, 20, 1000])] * 4))
        sizes = [f"prefix_cache_{name}_bytes" for name in ("hbm", "ddr", "nvme", "remote")]
        s = replace(s, **{name: room * BLOCK * TOKEN_BYTES for name, room in zip(sizes, rooms, strict=True)})
        s = replace(s, **draw(CACHING)) if any(rooms) else s
        if rooms[1] and (rooms[2] or rooms[3]):
            s = replace(s, prefix_cache_prefetch=draw(st.booleans()))
    largest = (max(prompts) + max(outputs)) * TOKEN_BYTES // tp
    hbm, ddr = (int(largest * draw(st.sampled_from([0.5, 1.1, 2, 100]))) for _ in range(2))
    return trace(np.cumsum(gaps), prompts, outputs, **columns), with_room(s, hbm, ddr)


@st.composite
def squeezes(draw):
    """One burst of short prompts whose outputs outgrow the HBM, with and without room in DDR to swap to."""
    n = draw(st.integers(3, 6))
    prompts = draw(st.lists(st.integers(40, 200), min_size=n, max_size=n))
    outputs = draw(st.lists(st.integers(50, 250), min_size=n, max_size=n))
    policy = draw(
        st.sampled_from(["full", "quest:budget_tokens=64,page_tokens=16", "full@heads=4+offload-all@heads=4"])
    )
    s = setup(policy, model=SMALL, **draw(ENGINES))
    s = replace(s, max_num_seqs=8, prefix_cache_hbm_bytes=draw(st.sampled_from([0, 4, 100])) * BLOCK * TOKEN_BYTES)
    longest = max(prompt + output for prompt, output in zip(prompts, outputs, strict=True))
    hbm = (longest + draw(st.integers(10, 300))) * TOKEN_BYTES * 6 // 5  # a fifth for what quest keeps of its pages
    ddr = draw(st.sampled_from([0, 200, 2000])) * TOKEN_BYTES + longest * TOKEN_BYTES
    return trace([0.0] * n, prompts, outputs, **chains(draw, prompts)), with_room(s, hbm, ddr)


def faster(figures, factor, name=""):
    """A GPU's rates or a host with every rate times `factor` and every fixed time over it; or with one such figure."""

    def scaled(field, value):
        if field.endswith("_curve"):
            return tuple((size, factor * rate) for size, rate in value)
        if field == "matmul_flops":
            return tuple((dtype, factor * rate) for dtype, rate in value)
        if field.endswith(("_Bps", "_flops", "_per_s")):
            return factor * value
        return value / factor if field.endswith("_s") else value

    names = [name] if name else [field.name for field in fields(figures) if field.name not in ("sources", "name")]
    return replace(figures, **{field: scaled(field, getattr(figures, field)) for field in names})


def squeezed(fidelity, preemption, **options):
    """Two requests that outgrow 1,000 tokens of memory together: the later one makes room, and comes back."""
    s = setup("full", model=SMALL, fidelity=fidelity, preemption=preemption, **options)
    return trace([0.0, 0.0], 300, 400), with_room(s, 1000 * TOKEN_BYTES, 1 << 40)
