"""A table of numbers by key: open addressing over rows of (key + 1, number), 0 where a row is free."""

from kvsim.engine.state.cluster import NOBODY, Ints

ODD = 2654435761  # Knuth's multiplicative hash, of 32 bits


def row_of(table: Ints, key: int) -> int:
    """The row of a key, or the free one where it would be put."""
    mask = table.shape[0] - 1
    mixed = ((key ^ (key >> 31)) & 0x7FFFFFFF) * ODD
    row = (mixed ^ (mixed >> 32)) & mask
    while table[row, 0] != 0 and table[row, 0] != key + 1:
        row = (row + 1) & mask
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
    row = (hole + 1) & mask
    while table[row, 0]:
        moving, number = table[row, 0], table[row, 1]
        table[row, 0] = 0
        place = row_of(table, moving - 1)
        table[place, 0], table[place, 1] = moving, number
        row = (row + 1) & mask
