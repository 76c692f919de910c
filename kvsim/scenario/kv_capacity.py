"""How much KV state a replica has room for, in bytes and tokens, and where that figure is from.

One place says so for simulations and for `kvsim explain`: what an engine may use of HBM, less weights, reserve and
prefix caches, or what `kv_cache_tokens`, `kv_cache_blocks` or `kv_cache_memory` asks for. Tokens are those of the dense
cache: a policy that stores less of each has room for more.
"""

from dataclasses import dataclass

from kvsim.hardware.catalogue import Gpu
from kvsim.scenario.engine_memory import ENGINE_MEMORY, device_bytes, reported_bytes, usable_bytes
from kvsim.scenario.stages import fitting_bytes
from kvsim.text.units import format_bytes

BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCapacity:
    """Room for KV state in HBM; `source` says in words where it is from."""

    hbm_bytes: int  # of one rank; in a pipeline, of whole sequences, over its stages
    tokens: int | None  # of the dense cache, of a replica; None where a token adds no bytes
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stated:
    """The capacity as options state it; at most one of the first three does.

    Raises ValueError where several do, and for a size of blocks without any.
    """

    tokens: int | None = None
    blocks: int | None = None
    memory_bytes: int | None = None
    block_tokens: int = BLOCK_TOKENS

    def __post_init__(self) -> None:
        given = [
            name
            for name, value in (
                ("kv_cache_tokens", self.tokens),
                ("kv_cache_blocks", self.blocks),
                ("kv_cache_memory", self.memory_bytes),
            )
            if value is not None
        ]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} state the same capacity; give one of them")
        if self.block_tokens != BLOCK_TOKENS and self.blocks is None:
            raise ValueError(
                f"kv_cache_block_tokens={self.block_tokens} is of kv_cache_blocks; give that too, or leave it out"
            )

    @property
    def words(self) -> str:
        """As flags; empty where none is given."""
        if self.tokens is not None:
            return f"--kv-cache-tokens {self.tokens:,}"
        if self.blocks is not None:
            return f"--kv-cache-blocks {self.blocks:,} of {self.block_tokens} tokens"
        return "" if self.memory_bytes is None else f"--kv-cache-memory {format_bytes(self.memory_bytes)} of each GPU"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMemory:
    """The HBM of a replica's GPUs and what stands in it beside KV; lists are by stage."""

    model: str
    experts: bool  # whether the model routes tokens to some
    gpu: Gpu
    gpus: int  # of the replica
    engine: str
    utilization: float
    weight_bytes: list[int]
    draft_bytes: int  # which the last stage's weights hold
    reserve: list[dict[str, int]]
    cached_bytes: int  # of each GPU's prefix cache
    shares: tuple[float, ...]  # of a sequence's bytes that each stage holds
    token_bytes: int  # of the dense cache, of a rank
    stated: Stated

    def rooms_bytes(self, utilization: float) -> list[int]:
        """What is left on a GPU of each stage of such a share of it; below 0 where the rest does not fit."""
        return [
            usable_bytes(self.engine, self.gpu, utilization, parts) - weights - sum(parts.values()) - self.cached_bytes
            for parts, weights in zip(self.reserve, self.weight_bytes, strict=True)
        ]

    @property
    def room_bytes(self) -> list[int]:
        """What an engine's share of HBM leaves for KV, on a GPU of each stage."""
        return self.rooms_bytes(self.utilization)

    @property
    def misfit(self) -> str | None:
        """Why nothing is left for KV, in words; None where something is."""
        rooms = self.room_bytes
        if min(rooms) > 0:
            return None
        stage = rooms.index(min(rooms))
        usable = usable_bytes(self.engine, self.gpu, self.utilization, self.reserve[stage])
        return (
            f"{self.model} does not fit: one of {self.gpus} x {self.gpu.name} has {format_bytes(usable)} usable "
            f"(gpu_memory_utilization={self.utilization}), needed: {_sum(self._parts(stage))}; raise --tp, --pp or "
            "that share, or store weights in a smaller --weight-dtype"
            + ("; experts are spread by these alone, for expert parallelism is not modelled" if self.experts else "")
        )

    def capacity(self) -> KvCapacity:
        """The room of a rank. Raises ValueError when nothing is left, and for more than a GPU holds."""
        if words := self.stated.words:
            hbm_bytes = self._stated_bytes()
        else:
            if misfit := self.misfit:
                raise ValueError(misfit)
            rooms = self.room_bytes
            hbm_bytes, words = fitting_bytes(rooms, self.shares), self._computed(rooms.index(min(rooms)))
        tokens = hbm_bytes // self.token_bytes if self.token_bytes else None
        return KvCapacity(hbm_bytes=hbm_bytes, tokens=tokens, source=words)

    def _stated_bytes(self) -> int:
        stated, words = self.stated, self.stated.words
        if stated.memory_bytes is not None:
            needs = [stated.memory_bytes] * len(self.shares)
            hbm_bytes = fitting_bytes(needs, self.shares)
        else:
            if not self.token_bytes:
                raise ValueError(f"{words}: a token of {self.model} adds no bytes; state kv_cache_memory instead")
            tokens = stated.tokens if stated.tokens is not None else (stated.blocks or 0) * stated.block_tokens
            hbm_bytes = tokens * self.token_bytes
            needs = [round(share * hbm_bytes) for share in self.shares]
        for stage, (need, room) in enumerate(zip(needs, self.rooms_bytes(1.0), strict=True)):
            if need > room:
                left = f"{format_bytes(room)} are left" if room > 0 else "nothing is left"
                raise ValueError(
                    f"{words} takes {format_bytes(need)} of a GPU, and of the {format_bytes(device_bytes(self.gpu))} "
                    f"of one of {self.gpus} x {self.gpu.name} {left} after {_sum(self._parts(stage))}; ask for less, "
                    "or raise --tp or --pp"
                )
        return hbm_bytes

    def _computed(self, stage: int) -> str:
        """How the room of a stage comes about."""
        whose = "that the driver reports" if reported_bytes(self.gpu) else "that its maker states"
        device = f"the {format_bytes(device_bytes(self.gpu))} {whose}"
        parts, reserve = self._parts(stage), self.reserve[stage]
        if ENGINE_MEMORY[self.engine].shares_the_rest:
            parts = {name: size for name, size in parts.items() if name not in reserve}
            device = f"what {_sum(reserve)} leave of {device}"
        return f"{self.utilization:g} of {device}, less {_sum(parts)}, as {self.engine} has it"

    def _parts(self, stage: int) -> dict[str, int]:
        """What a GPU of a stage holds beside KV, by name."""
        draft = self.draft_bytes if stage == len(self.weight_bytes) - 1 else 0
        parts = {"weights": self.weight_bytes[stage] - draft, "draft": draft}
        return parts | self.reserve[stage] | {"prefix cache": self.cached_bytes}


def _sum(parts: dict[str, int]) -> str:
    return " + ".join(f"{format_bytes(size)} {what}" for what, size in parts.items() if size)
