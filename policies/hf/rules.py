"""Which kind each layer is of, where a config states a rule instead of a list."""

from collections.abc import Callable

from policies.hf.keys import Keys

KIND_OF_LAYER_TYPE = {
    "full_attention": "full",
    "attention": "full",
    "deepseek_sparse_attention": "full",
    "minimax_m3_sparse": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "sliding",
    "linear_attention": "linear",
    "mamba": "linear",
    "conv": "linear",
    "block_attention": "block",  # these two are of no published config: Block Transformer, CCA
    "core_attention": "core",
}


def full_every(key: str, default: int, *, first: bool = False) -> Callable[[Keys, int], str]:
    """Sliding layers, but for one in so many as `key` says: the last of them, or the `first`."""

    def kind(keys: Keys, index: int) -> str:
        every = keys.number(key, default) if key else default
        return "full" if (index if first else index + 1) % every == 0 else "sliding"

    return kind


def by_pattern(keys: Keys, index: int) -> str:
    """EXAONE 4: `sliding_window_pattern` is a number, or letters such as LLLG; without a window all are full."""
    if "sliding_window" not in keys:
        return "full"
    if not isinstance(keys.value("sliding_window_pattern"), str):
        return full_every("sliding_window_pattern", 4)(keys, index)
    pattern = keys.text("sliding_window_pattern")
    if set(pattern) - {"L", "G"}:
        raise keys.error("sliding_window_pattern", "must be a number, or letters L (sliding) and G (full)")
    return "full" if pattern[index % len(pattern)] == "G" else "sliding"


def qwen(keys: Keys, index: int) -> str:
    """Full attention, but for upper layers where the config turns its window on."""
    if not keys.flag("use_sliding_window", False) or "sliding_window" not in keys:
        return "full"
    return "full" if index < keys.number("max_window_layers", least=0) else "sliding"


def qwen_next(keys: Keys, index: int) -> str:
    """Linear layers, but for one in four."""
    return "full" if (index + 1) % keys.number("full_attention_interval", 4) == 0 else "linear"


def llama4(keys: Keys, index: int) -> str:
    """Chunks where positions are rotary, everything where there are none."""
    marks = keys.sequence("no_rope_layers")  # 1: rotary, in chunks; 0: no positions, over everything
    if "attention_chunk_size" not in keys:
        return "full"
    if marks and index >= len(marks):
        raise keys.error("no_rope_layers", f"has {len(marks)} entries; layer {index} needs one")
    full = not marks[index] if marks else (index + 1) % keys.number("no_rope_layer_interval", 4) == 0
    return "full" if full else "sliding"


def smollm3(keys: Keys, index: int) -> str:
    """A window in the layers without rotary positions, where the config turns it on."""
    if not keys.flag("use_sliding_window", False) or "sliding_window" not in keys:
        return "full"
    marks = keys.sequence("no_rope_layers")
    rotary = marks[index] if index < len(marks) else (index + 1) % keys.number("no_rope_layer_interval", 4)
    return "full" if rotary else "sliding"


def all_full(_keys: Keys, _index: int) -> str:
    """Full attention in every layer, whatever window the config mentions."""
    return "full"


def all_linear(_keys: Keys, _index: int) -> str:
    """No attention at all."""
    return "linear"


def jamba(keys: Keys, index: int) -> str:
    """One attention layer in each period."""
    offset = keys.number("attn_layer_offset", least=0)
    return "full" if index % keys.number("attn_layer_period") == offset else "linear"


def listed(key: str, least: int = 0) -> Callable[[Keys, int], str]:
    """Attention in the layers whose numbers `key` lists, counted from `least`."""
    return lambda keys, index: "full" if index + least in keys.sequence(key) else "linear"


def marked(key: str, kinds: tuple[str, str]) -> Callable[[Keys, int], str]:
    """The first of `kinds` where the list of 0 and 1 under `key` has 0, the second where it has 1."""

    def kind(keys: Keys, index: int) -> str:
        marks = keys.sequence(key)
        if index >= len(marks) or marks[index] not in (0, 1):
            raise keys.error(key, f"must list 0 or 1 for each layer, {index} included")
        return kinds[marks[index]]

    return kind


def needs_layer_types(keys: Keys, _index: int) -> str:
    """No rule: the architecture names the kind of each layer."""
    raise keys.error("layer_types", "is needed: the architecture names the kind of each layer")


def after_first(keys: Keys, index: int) -> bool:
    """DeepSeek: dense layers first, then experts, in one layer of so many as `moe_layer_freq` says."""
    first = keys.number("first_k_dense_replace", 0, least=0)
    return index >= first and index % keys.number("moe_layer_freq", 1) == 0


def after_dense_layers(keys: Keys, index: int) -> bool:
    """So many dense layers first as `num_dense_layers` says."""
    return index >= keys.number("num_dense_layers", 0, least=0)


def after(dense_layers: int) -> Callable[[Keys, int], bool]:
    """A fixed number of dense layers first."""
    return lambda keys, index: index >= keys.number("first_k_dense_replace", dense_layers, least=0)


def qwen_sparse(keys: Keys, index: int) -> bool:
    """One layer of so many as `decoder_sparse_step` says, without those that `mlp_only_layers` lists."""
    every = (index + 1) % keys.number("decoder_sparse_step", 1) == 0
    return every and index not in keys.sequence("mlp_only_layers")


def jamba_sparse(keys: Keys, index: int) -> bool:
    """One layer in each period, where there is more than one expert."""
    offset = keys.number("expert_layer_offset", least=0)
    return keys.number("num_experts") > 1 and index % keys.number("expert_layer_period") == offset


def granite_sparse(keys: Keys, _index: int) -> bool:
    """All layers, where there are experts."""
    return keys.number("num_local_experts", least=0) > 0


def llama4_sparse(keys: Keys, index: int) -> bool:
    """The layers that `moe_layers` lists, or one of so many as `interleave_moe_layer_step` says."""
    chosen = keys.sequence("moe_layers")
    return index in chosen if chosen else (index + 1) % keys.number("interleave_moe_layer_step", 1) == 0


def ernie_sparse(keys: Keys, index: int) -> bool:
    """From a first to a last layer, one of so many as `moe_layer_interval` says."""
    last = keys.value("moe_layer_end_index")
    end = keys.number("moe_layer_end_index", least=0) if last not in (None, -1) else keys.number("num_hidden_layers")
    within = keys.number("moe_layer_start_index", 0, least=0) <= index <= end
    return within and (index + 1) % keys.number("moe_layer_interval", 1) == 0
