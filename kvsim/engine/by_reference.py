"""Named tuples of arrays passed to machine code as one pointer.

numba passes a named tuple as all of its parts, more than three hundred values at every call, and compiles each of
these calls. Here the tuple is laid out in memory once (`state/words.py`), and its parts are read from there.
"""

import hashlib
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel.models import PrimitiveModel
from numba.core.typing.templates import AttributeTemplate
from numba.extending import infer_getattr, lower_getattr_generic, register_model
from numba.np.numpy_support import from_dtype

from kvsim.engine.state.layout import RECORD, Layout
from kvsim.engine.state.words import DATA, ITEM_BYTES, ITEMS, SHAPE, length_in_words

_WORD_BITS = 64  # of an address, and of every integer in the layout of an array


class ReferenceType(types.Type):
    """The type of a reference: names, types and places of its parts, and the features that code for it has."""

    def __init__(self, layout: Layout, features: tuple[str, ...]) -> None:
        self.features = features
        self.fields: dict[str, tuple[Any, int]] = {}
        for i, part in enumerate(layout.parts):
            if isinstance(part, Layout):
                kind: Any = ReferenceType(part, features)
            elif part.dimensions == RECORD:
                kind = from_dtype(part.dtype)
            else:
                kind = types.Array(from_dtype(part.dtype), part.dimensions, "C")
            self.fields[part.name] = kind, length_in_words(Layout("", layout.parts[:i]))
        # numba tells types apart by their names, which are part of the name of every function that takes them.
        own = ",".join(f"{name}:{kind}" for name, (kind, _) in self.fields.items())
        found = hashlib.sha256(f"{'+'.join(features)}({own})".encode()).hexdigest()[:16]
        super().__init__(name=f"{layout.name}_{found}")


@register_model(ReferenceType)
class _Model(PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, own: Any) -> None:
        super().__init__(manager, own, ir.IntType(_WORD_BITS).as_pointer())


@infer_getattr
class _Parts(AttributeTemplate):  # type: ignore[misc]
    key = ReferenceType

    def generic_resolve(self, own: ReferenceType, name: str) -> Any:
        return own.fields[name][0] if name in own.fields else None


@lower_getattr_generic(ReferenceType)  # type: ignore[untyped-decorator]
def _part(context: Any, builder: Any, own: ReferenceType, value: Any, name: str) -> Any:
    kind, place = own.fields[name]
    if isinstance(kind, ReferenceType):
        return cgutils.gep_inbounds(builder, value, place)

    def word(i: int) -> Any:
        """One that nothing changes while machine code runs, so that it need not be read again."""
        loaded = builder.load(cgutils.gep_inbounds(builder, value, place + i))
        loaded.set_metadata("invariant.load", builder.module.add_metadata([]))
        return loaded

    if not isinstance(kind, types.Array):  # a record, which numba knows by its address
        return builder.inttoptr(word(0), context.get_value_type(kind))
    array = context.make_array(kind)(context, builder)
    array.meminfo, array.parent = (cgutils.get_null_value(owner.type) for owner in (array.meminfo, array.parent))
    array.nitems, array.itemsize = word(ITEMS), word(ITEM_BYTES)
    array.data = builder.inttoptr(word(DATA), array.data.type)
    integer = context.get_value_type(types.intp)
    shape, strides = ([word(first + i) for i in range(kind.ndim)] for first in (SHAPE, SHAPE + kind.ndim))
    array.shape = cgutils.pack_array(builder, shape, integer)
    array.strides = cgutils.pack_array(builder, strides, integer)
    return array._getvalue()  # noqa: SLF001 - as numba's own accessors do
