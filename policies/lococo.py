"""LoCoCo: a convolution mixes what exceeds a cache of constant size into its slots."""

from dataclasses import dataclass
from typing import ClassVar

from policies.dense import activations, append, attend
from policies.model import LayerShape, ModelShape
from policies.plan import Access, Buffer, Compute, Plan, Rows, Step, Tier, Work
from policies.policy import Policy, Reuse, at_least


@dataclass(frozen=True, slots=True, kw_only=True)
class LoCoCo(Policy):
    """A cache of `memory_tokens` slots; what was appended is merged into it once more than `buffer_tokens` exceed it.

    Half of the slots keep the first `sink_tokens` (0: the paper's own form) and the tokens that the last attention
    weighed most, a convolution over keys and values of `kernel_tokens` weighs all others into the rest. A prompt is
    read in chunks of `chunk_tokens`, merged before each.
    """

    name: ClassVar[str] = "lococo"
    paper: ClassVar[str] = "LoCoCo, Cai et al. 2024, arXiv:2406.05317"
    trained: ClassVar[str] = "convolution kernels in each layer, trained with the model"
    reuse: ClassVar[Reuse] = Reuse.PREFIX
    by_shape: ClassVar[bool] = True

    memory_tokens: int = 512
    buffer_tokens: int = 16
    chunk_tokens: int = 512
    kernel_tokens: int = 21
    sink_tokens: int = 4

    def __post_init__(self) -> None:
        at_least(self, memory_tokens=2, buffer_tokens=0, chunk_tokens=self.buffer_tokens + 1, kernel_tokens=1)
        at_least(self, sink_tokens=0)
        if self.memory_tokens % 2:
            raise ValueError(f"lococo: memory_tokens={self.memory_tokens} must be even, for two halves of the slots")
        if self.sink_tokens > self.memory_tokens // 2:
            raise ValueError(
                f"lococo: sink_tokens={self.sink_tokens} exceeds the half of memory_tokens={self.memory_tokens} that "
                f"keeps tokens as they are; use {self.memory_tokens // 2} or fewer"
            )
        if self.chunk_tokens > self.memory_tokens + self.buffer_tokens:
            raise ValueError(
                f"lococo: chunk_tokens={self.chunk_tokens} exceeds memory_tokens + buffer_tokens, which are what a "
                f"first chunk is kept in; use {self.memory_tokens + self.buffer_tokens} or fewer"
            )

    def minimum_prompt_tokens(self, model: ModelShape, layer: int) -> int:
        """A prompt that fits the slots and the buffer is not merged."""
        return self._full + 1

    def buffers(self, model: ModelShape, step: Step, layer: int) -> tuple[Buffer, ...]:
        """`keys`, `values`: room for the slots, the buffer and a chunk; kernels, shared by all sequences, as a view."""
        shape = model.layers[layer]
        rows = shape.kv_heads * (self._full + self.chunk_tokens)
        return (
            *activations(model, step, layer),
            Buffer("kernels", Tier.HBM, 1, (self._kernel_params(shape),), model.dtype, view=True),
            Buffer("keys", Tier.HBM, rows, (shape.head_dim,), model.kv_dtype),
            Buffer("values", Tier.HBM, rows, (shape.v_head_dim,), model.kv_dtype),
        )

    def prefill(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Each chunk attends to itself and to the cache, after what exceeded that was merged."""
        merges = self._merges_before(step.tokens) - self._merges_before(step.past_tokens)
        pairs = self._pairs(step.tokens) - self._pairs(step.past_tokens)
        chunks = -(-step.tokens // self.chunk_tokens) - step.past_tokens // self.chunk_tokens
        read = chunks * min(step.tokens, self.memory_tokens) + step.new_tokens
        merge = self._merge(model.layers[layer], merges, self.memory_tokens + self.chunk_tokens)
        return self._attend(model, step, layer, merge, pairs, read)

    def decode(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Dense over the cache; merged first when its buffer is full."""
        merge: Plan = ()
        held = self._held(step)
        if held == self.memory_tokens + 1:
            before = self._held_by_prompt(step.prompt_tokens) if step.generated_tokens == 1 else self._full + 1
            merge = self._merge(model.layers[layer], int(before > self._full), before)
        return self._attend(model, step, layer, merge, held, held)

    def _attend(self, model: ModelShape, step: Step, layer: int, merge: Plan, pairs: int, read: int) -> Plan:
        shape, heads = model.layers[layer], model.layers[layer].kv_heads
        new = append(step, ("keys", "values"), ("new_k", "new_v"), heads)
        reads = (Access("keys", Rows(heads * read)), Access("values", Rows(heads * read)))
        return (*merge, new, attend(shape, step, Rows(pairs), reads))

    def _merge(self, shape: LayerShape, times: int, length: int) -> Plan:
        """`times` merges of `length` tokens each into the slots."""
        if not times:
            return ()
        heads, half = shape.kv_heads, self.memory_tokens // 2
        others = length - half
        slots, everything = Rows(times * heads * self.memory_tokens), Rows(times * heads * length)
        select = Compute(name="select", work=Work.TOPK, rows=everything, after=("qkv",))
        mix = Compute(
            name="merge",
            work=Work.MATMUL,
            rows=Rows(times * heads * others),
            flops_per_row=half * (shape.head_dim + shape.v_head_dim) * 2 * (self.kernel_tokens + 1),
            reads=(Access("keys", everything), Access("values", everything), Access("kernels", Rows(1))),
            writes=(Access("keys", slots), Access("values", slots)),
            after=("select",),
        )
        return (select, mix)

    @property
    def _full(self) -> int:
        """The most tokens that wait unmerged for the next ones."""
        return self.memory_tokens + self.buffer_tokens

    def _kernel_params(self, shape: LayerShape) -> int:
        """Weights, biases and the share of the hard choice, of one layer."""
        half = self.memory_tokens // 2
        return half * ((shape.head_dim + shape.v_head_dim) * self.kernel_tokens + 1) + 1

    def _merges_before(self, tokens: int) -> int:
        """Merges while the first `tokens` of a prompt are read: one before each chunk that meets a full cache."""
        return max(0, -(-tokens // self.chunk_tokens) - self._full // self.chunk_tokens - 1)

    def _kept_chunks(self) -> int:
        return self._full // self.chunk_tokens

    def _slots_at(self, chunk: int) -> int:
        """Tokens that the chunk of this number, from 0, finds in the cache."""
        return chunk * self.chunk_tokens if chunk <= self._kept_chunks() else self.memory_tokens

    def _pairs(self, tokens: int) -> int:
        """Query-key pairs of the first `tokens` tokens; chunks are cut at multiples of their size."""
        size, chunks, rest = self.chunk_tokens, tokens // self.chunk_tokens, tokens % self.chunk_tokens
        growing = min(chunks, self._kept_chunks() + 1)
        earlier = size * (size * (growing * (growing - 1) // 2) + (chunks - growing) * self.memory_tokens)
        own = chunks * (size * (size + 1) // 2) + rest * (rest + 1) // 2
        return earlier + rest * self._slots_at(chunks) + own

    def _held_by_prompt(self, prompt_tokens: int) -> int:
        """Tokens in the cache when the prompt has been read."""
        last = -(-prompt_tokens // self.chunk_tokens) - 1
        return self._slots_at(last) + prompt_tokens - last * self.chunk_tokens

    def _held(self, step: Step) -> int:
        """Tokens that a decode step attends to."""
        start = self._held_by_prompt(step.prompt_tokens)
        if start > self._full:
            start = self.memory_tokens
        return (
            self.memory_tokens + (start - self.memory_tokens + step.generated_tokens - 1) % (self.buffer_tokens + 1) + 1
        )
