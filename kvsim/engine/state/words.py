"""A named tuple of arrays laid out in memory as one array of words, which machine code takes by one pointer.

A record is its address. An array lies there as numba lays it out: its owner twice, its items, the bytes of one, the
address of its data, its shape and its strides. A tuple within is laid out in the midst of the other.
"""

from typing import Any

import numpy as np

from kvsim.engine.state.layout import RECORD, Layout

ITEMS, ITEM_BYTES, DATA, SHAPE = 2, 3, 4, 5  # words of an array, whose strides follow its shape


def words_of(parts: Any) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The words of a named tuple of arrays, records and such tuples, good for as long as these stay where they are.

    ValueError for an array that is not contiguous or cannot be written to.
    """
    return np.array(_words(parts), np.int64)


def length_in_words(layout: Layout) -> int:
    """How many words a named tuple of a layout has."""
    return sum(length_in_words(part) if isinstance(part, Layout) else _length(part.dimensions) for part in layout.parts)


def _length(dimensions: int) -> int:
    return 1 if dimensions == RECORD else SHAPE + 2 * dimensions


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
