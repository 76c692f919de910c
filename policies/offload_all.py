"""Everything in host memory, streamed through HBM layer by layer."""

from dataclasses import dataclass
from typing import ClassVar

from policies.dense import activations, append, attend, causal_pairs, kv_row
from policies.model import ModelShape
from policies.plan import Access, Buffer, Copy, Plan, Rows, Step, Tier
from policies.policy import Policy, Reuse, at_least, one_of


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadAll(Policy):
    """Exact attention with the whole cache in DDR; a ring of staging buffers in HBM lets the next layer come early.

    `write_back="new"` sends only new tokens to the host; `"all"` sends the layer's whole cache back at every step, as
    Hugging Face's `cache_implementation="offloaded"` does.
    """

    name: ClassVar[str] = "offload-all"
    paper: ClassVar[str] = "FlexGen, Sheng et al. 2023, arXiv:2303.06865; Hugging Face OffloadedCache"
    reuse: ClassVar[Reuse] = Reuse.BLOCKS
    verifies: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("full", "mla")
    by_shape: ClassVar[bool] = True

    staging_layers: int = 2
    write_back: str = "new"

    def __post_init__(self) -> None:
        at_least(self, staging_layers=1)
        one_of(self, "write_back", "new", "all")

    def buffers(self, model: ModelShape, step: Step, layer: int) -> tuple[Buffer, ...]:
        """`kv_host` in DDR and `kv` staging in HBM, one row per token each."""
        row = kv_row(model.layers[layer])
        return (
            *activations(model, step, layer),
            Buffer("kv_host", Tier.DDR, step.tokens, row, model.kv_dtype),
            Buffer("kv", Tier.HBM, step.tokens, row, model.kv_dtype, ring=self.staging_layers),
        )

    def prefill(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Fetch the chunks before this one, attend causally, send the new rows to the host."""
        return self._stream(model, step, layer)

    def decode(self, model: ModelShape, step: Step, layer: int) -> Plan:
        """Fetch the layer's cache as soon as its staging buffer is free, append, attend, send back."""
        return self._stream(model, step, layer)

    def _stream(self, model: ModelShape, step: Step, layer: int) -> Plan:
        shape, past = model.layers[layer], step.past_tokens
        free = (f"attend@-{self.staging_layers}", f"store@-{self.staging_layers}")
        fetch = (Copy(name="fetch", src="kv_host", dst="kv", rows=Rows(past), after=free),) if past else ()
        complete = ("append", *(op.name for op in fetch))
        everything = self.write_back == "all"
        held = (Access("kv", Rows(step.tokens)),)
        pairs = Rows(causal_pairs(past, step.new_tokens))
        return (
            *fetch,
            append(step, after=free),
            attend(shape, step, pairs, held, after=complete),
            Copy(
                name="store",
                src="kv",
                dst="kv_host",
                rows=Rows(step.tokens if everything else step.new_tokens),
                after=complete if everything else ("append",),
            ),
        )
