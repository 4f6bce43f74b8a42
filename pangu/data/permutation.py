"""A shuffled order that is computed, not stored: any entry of any length in constant time and memory."""

import numpy as np
import numpy.typing as npt

_ROUNDS = 3


def permute(
    index: npt.NDArray[np.int64], size: npt.NDArray[np.int64], key: npt.NDArray[np.uint64]
) -> npt.NDArray[np.int64]:
    """Where a pseudo-random permutation of [0, size) takes `index`; all [n], each entry with a size and key of its own.

    A Feistel network over the digits of `index` in a mixed base, followed along its cycle until it is back in range
    (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). As the grid of digits is hardly larger than
    `size`, one turn is nearly always enough.
    """
    limit = size.astype(np.uint64)
    rows = np.ceil(np.sqrt(limit.astype(np.float64))).astype(np.uint64)
    columns = -(-size // rows.astype(np.int64)).astype(np.uint64)
    result = index.astype(np.uint64)
    walking = np.arange(len(index))
    while len(walking):
        result[walking] = _feistel(result[walking], rows[walking], columns[walking], key[walking])
        walking = walking[result[walking] >= limit[walking]]
    return result.astype(np.int64)


def mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scramble 64 bits: the finalizer of MurmurHash3."""
    value = (value ^ (value >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    value = (value ^ (value >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return value ^ (value >> np.uint64(33))


def _feistel(
    value: npt.NDArray[np.uint64],
    rows: npt.NDArray[np.uint64],
    columns: npt.NDArray[np.uint64],
    key: npt.NDArray[np.uint64],
) -> npt.NDArray[np.uint64]:
    """A bijection of [0, rows * columns)."""
    row, column = np.divmod(value, columns)
    for round_number in range(_ROUNDS):
        # The upper half of the hash leaves room for the sum: a wrap-around would make it no bijection.
        row = (row + (mix(column + mix(key + np.uint64(2 * round_number))) >> np.uint64(32))) % rows
        column = (column + (mix(row + mix(key + np.uint64(2 * round_number + 1))) >> np.uint64(32))) % columns
    return row * columns + column
