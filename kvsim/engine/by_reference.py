"""Named tuples of arrays passed to machine code as one pointer.

numba passes a named tuple as all of its parts, more than three hundred values at every call, and compiles each of
these calls. Here the tuple is laid out in memory once, as numba lays arrays out, and its parts are read from there.
"""

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.core.datamodel.models import PrimitiveModel
from numba.core.typing.templates import AttributeTemplate
from numba.extending import NativeValue, infer_getattr, lower_getattr_generic, register_model, typeof_impl, unbox
from numba.np.numpy_support import from_dtype

from kvsim.engine.state.layout import RECORD, Layout

_WORD = 8  # bytes: of an address, and of every integer in the layout of an array
_ITEMS, _ITEM_BYTES, _DATA, _SHAPE = 2, 3, 4, 5  # words of an array: its owner twice, these, and then its strides
_WORDS = types.Array(types.int64, 1, "C")


class Reference:
    """A named tuple of arrays, records and such tuples, laid out for machine code of a type.

    It is good for as long as the tuple is: what stands in its place has another layout.
    """

    def __init__(self, parts: Any, own: "ReferenceType") -> None:
        self.type, self.parts = own, parts  # which keeps the arrays
        self.words = np.array(_words(parts), np.int64)


class ReferenceType(types.Type):
    """The type of a reference: names, types and places of its parts, and the features that code for it has."""

    def __init__(self, layout: Layout, features: tuple[str, ...]) -> None:
        self.features = features
        self.fields: dict[str, tuple[Any, int]] = {}
        self.length = 0
        for part in layout.parts:
            if isinstance(part, Layout):
                kind: Any = ReferenceType(part, features)
                length = kind.length
            elif part.dimensions == RECORD:
                kind, length = from_dtype(part.dtype), 1
            else:
                kind, length = types.Array(from_dtype(part.dtype), part.dimensions, "C"), _SHAPE + 2 * part.dimensions
            self.fields[part.name] = kind, self.length
            self.length += length
        # numba tells types apart by their names, and keeps code by them.
        own = ",".join(f"{name}:{kind}" for name, (kind, _) in self.fields.items())
        super().__init__(name=f"{layout.name}[{'+'.join(features)}]({own})")


def _words(parts: Any) -> list[int]:
    words = []
    for part in parts:
        if hasattr(part, "_asdict"):
            words += _words(part)
        if not isinstance(part, np.ndarray | np.void):
            continue
        address = part.__array_interface__["data"][0]
        if isinstance(part, np.void):
            words.append(address)
        elif part.flags.c_contiguous and part.flags.writeable:
            words += [0, 0, part.size, part.itemsize, address, *part.shape, *part.strides]
        else:
            raise ValueError("an array of the loop's state must be contiguous and writable")
    return words


@register_model(ReferenceType)
class _Model(PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, own: Any) -> None:
        super().__init__(manager, own, ir.IntType(8 * _WORD).as_pointer())


@typeof_impl.register(Reference)  # type: ignore[untyped-decorator]
def _typeof(reference: Reference, _context: Any) -> ReferenceType:
    return reference.type


@unbox(ReferenceType)  # type: ignore[untyped-decorator]
def _unbox(_own: ReferenceType, reference: Any, c: Any) -> Any:
    """The address of a reference's words, which its caller keeps."""
    words = c.pyapi.object_getattr_string(reference, "words")
    array = c.unbox(_WORDS, words)
    c.pyapi.decref(words)
    data = c.context.make_array(_WORDS)(c.context, c.builder, array.value).data
    return NativeValue(data, is_error=array.is_error)


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
    array.nitems, array.itemsize = word(_ITEMS), word(_ITEM_BYTES)
    array.data = builder.inttoptr(word(_DATA), array.data.type)
    integer = context.get_value_type(types.intp)
    shape, strides = ([word(first + i) for i in range(kind.ndim)] for first in (_SHAPE, _SHAPE + kind.ndim))
    array.shape = cgutils.pack_array(builder, shape, integer)
    array.strides = cgutils.pack_array(builder, strides, integer)
    return array._getvalue()  # noqa: SLF001 - as numba's own accessors do
