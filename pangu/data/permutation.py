"""A shuffled order that is computed, not stored: any entry of any length in constant time and memory."""

import numpy as np
import numpy.typing as npt

_ROUNDS = 3
_32, _33 = np.uint64(32), np.uint64(33)
_FIRST_FACTOR, _SECOND_FACTOR = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)


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
    keys = mix(key + np.arange(2 * _ROUNDS, dtype=np.uint64)[:, None])
    result = index.astype(np.uint64)
    walking = np.arange(len(index))
    while len(walking):
        result[walking] = _feistel(result[walking], rows[walking], columns[walking], keys[:, walking])
        walking = walking[result[walking] >= limit[walking]]
    return result.astype(np.int64)


def mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scramble 64 bits: the finalizer of MurmurHash3."""
    value = (value ^ (value >> _33)) * _FIRST_FACTOR
    value = (value ^ (value >> _33)) * _SECOND_FACTOR
    return value ^ (value >> _33)


def _feistel(
    value: npt.NDArray[np.uint64],
    rows: npt.NDArray[np.uint64],
    columns: npt.NDArray[np.uint64],
    keys: npt.NDArray[np.uint64],
) -> npt.NDArray[np.uint64]:
    """A bijection of [0, rows * columns); keys [2 * _ROUNDS, n]."""
    row, column = np.divmod(value, columns)
    for row_key, column_key in zip(keys[::2], keys[1::2], strict=True):
        # The upper half of the hash leaves room for the sum: a wrap-around would make it no bijection.
        row = (row + (mix(column + row_key) >> _32)) % rows
        column = (column + (mix(row + column_key) >> _32)) % columns
    return row * columns + column
