"""A table of numbers by key: open addressing over rows of (key + 1, number), 0 where a row is free.

Keys that follow one another in a prompt mostly have numbers that do. Such neighbours stand side by side, so that a
walk along a prompt reads memory in order: groups of keys are scattered over the table, and not the keys of a group.
"""

from kvsim.engine.state.cluster import NOBODY, Ints

ODD = 2654435761  # Knuth's multiplicative hash, of 32 bits
GROUP_BITS = 6  # 64 keys side by side: a kibibyte
STEP = (1 << GROUP_BITS) + 1  # from a row that is taken: past the neighbours; odd, so that it comes to every row


def row_of(table: Ints, key: int) -> int:
    """The row of a key, or the free one where it would be put."""
    mask = table.shape[0] - 1
    group = key >> GROUP_BITS
    mixed = ((group ^ (group >> 31)) & 0x7FFFFFFF) * ODD
    row = (((mixed ^ (mixed >> 32)) << GROUP_BITS) + (key & (STEP - 2))) & mask
    while table[row, 0] != 0 and table[row, 0] != key + 1:
        row = (row + STEP) & mask
    return int(row)


def get(table: Ints, key: int) -> int:
    """The number of a key; nobody where it has none."""
    row = row_of(table, key)
    return int(table[row, 1]) if table[row, 0] else NOBODY


def put(table: Ints, key: int, number: int) -> None:
    """Give a key a number."""
    row = row_of(table, key)
    table[row, 0], table[row, 1] = key + 1, number


def remove(table: Ints, key: int) -> None:
    """Forget a key that is there; those that stand behind it for its sake move up."""
    mask, hole = table.shape[0] - 1, row_of(table, key)
    table[hole, 0] = 0
    row = (hole + STEP) & mask
    while table[row, 0]:
        moving, number = table[row, 0], table[row, 1]
        table[row, 0] = 0
        place = row_of(table, moving - 1)
        table[place, 0], table[place, 1] = moving, number
        row = (row + STEP) & mask
