"""An independent count of the bytes that cross between tiers: from outside, from the operations that PyTorch runs.

The runtime's own counts come from its mover. The audit knows nothing of it: it watches every operation that PyTorch
dispatches and asks where its tensors lie.

Beside a GPU that is their device. On a CPU both tiers are ordinary memory, so it is their storage: the arena's buffers
lie in the tier that it says, the model's weights in HBM, and what an operation makes lies where its inputs do. A tensor
that was made of neither (a range, a mask, what FAISS found) lies nowhere until it is written from one of them.

Zero-copy kernels are launched past PyTorch's dispatcher; for them the independent count is the one that the kernel
keeps on the GPU itself, row by row as it reads them.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor, ops
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from policies.plan import Tier
from runtime.offload import Offload

# Operations that may write into one tier what comes from the other: where among their arguments are the source and the
# ids; the destination comes first.
WRITES = {
    ops.aten.copy_.default: (1, None),
    ops.aten.index_put_.default: (2, 1),
    ops.aten.index_copy_.default: (3, 2),
    ops.aten.scatter_.src: (3, 2),
}
FEW = 1024  # storages, dead ones among them, that nobody minds keeping
TO_DEVICE = ops.aten._to_copy.default  # noqa: SLF001 - what `tensor.to` becomes


class Audit(TorchDispatchMode):
    """`with Audit(kv) as audit:` counts what crosses between the tiers of the caches of one `offload`.

    `violations` has the operations that mixed tensors of both tiers in another way than copying, by name;
    `elsewhere_bytes` what crossed between a GPU and host memory that is no cache's, token ids for instance.
    """

    def __init__(self, kv: Offload) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kv, self._cuda = kv, kv.model.device.type == "cuda"
        self._crossed: Counter[tuple[Tier, Tier]] = Counter()
        # By the address of a storage, which its weak reference keeps from being used again.
        self._sides: dict[int, tuple[StorageWeakRef, Tier]] = {}
        self._alive = FEW  # storages that were in use when the dead ones were last dropped
        self.violations: Counter[str] = Counter()
        self.elsewhere_bytes: Counter[tuple[Tier, Tier]] = Counter()
        for weights in (kv.model.parameters(), kv.model.buffers()):
            for weight in weights:
                self._mark(weight, Tier.HBM)

    @property
    def moved_bytes(self) -> Counter[tuple[Tier, Tier]]:
        """Bytes per (source, destination); beside a GPU with what zero-copy kernels have counted there."""
        return self._crossed + self._kv.mover.gathered_bytes if self._cuda else +self._crossed

    def __torch_dispatch__(
        self, func: Any, _types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation, and see which sides it joins."""
        kwargs = kwargs or {}
        met = {side for tensor in _tensors((args, kwargs)) if (side := self._side(tensor)) is not None}
        if len(met) > 1:
            self._crossing(func, args)
        elif self._cuda and func in WRITES and Tier.HBM in met:
            self._elsewhere(args[0], args[WRITES[func][0]])
        result = func(*args, **kwargs)
        if self._cuda and func is TO_DEVICE and result.device.type != args[0].device.type:
            self._to_device(args[0], result)
        elif len(met) == 1:
            (side,) = met
            for tensor in (*_tensors(result), *_tensors(_written(func, args, kwargs))):
                if self._side(tensor) is None:
                    self._mark(tensor, side)
        return result

    def _crossing(self, func: Any, args: tuple[Any, ...]) -> None:
        """An operation has tensors of both tiers: count it, or note that it should not."""
        if func in WRITES:
            source, ids = WRITES[func]
            src, dst = self._side(args[source]), self._side(args[0])
            astray = ids is not None and any(self._side(t) not in (None, dst) for t in _tensors(args[ids]))
            if src is not None and dst is not None and src is not dst and not astray:
                self._crossed[src, dst] += args[source].nbytes
                return
        self.violations[str(func)] += 1

    def _to_device(self, source: Tensor, made: Tensor) -> None:
        if self._side(source) is Tier.DDR:
            self._crossed[Tier.DDR, Tier.HBM] += source.nbytes
        else:
            self._elsewhere(made, source)

    def _elsewhere(self, destination: Tensor, source: Tensor) -> None:
        if destination.device.type != source.device.type:
            link = (Tier.HBM, Tier.DDR) if source.is_cuda else (Tier.DDR, Tier.HBM)
            self.elsewhere_bytes[link] += source.nbytes

    def _side(self, tensor: Tensor) -> Tier | None:
        """Where a tensor lies; None where nobody has said so yet."""
        if tensor.is_cuda:
            return Tier.HBM
        key = tensor.untyped_storage()._cdata  # noqa: SLF001 - its identity
        if key not in self._sides:
            for cache in self._kv.caches:
                for tier, held in cache.arena.held():
                    self._mark(held, tier)
        return self._sides[key][1] if key in self._sides else None

    def _mark(self, tensor: Tensor, side: Tier) -> None:
        if tensor.is_cuda or (self._cuda and side is Tier.HBM):
            return  # its device says it
        storage = StorageWeakRef(tensor.untyped_storage())
        self._sides[storage.cdata] = (storage, side)
        if len(self._sides) > 2 * self._alive:
            self._sides = {key: held for key, held in self._sides.items() if not held[0].expired()}
            self._alive = max(FEW, len(self._sides))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operation writes into."""
    named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs  # noqa: SLF001
    written = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}  # noqa: SLF001
    return [value for name, value in named.items() if name in written]
