"""What a tensor takes after the first two stages of Deep Compression: pruned, and shared.

Han, Mao and Dally, "Deep Compression", 2016: sections 2 (relative index) and 3 (codebooks).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

FLOAT_BITS = 32
#: Bits of a relative index: of convolutions, and of all other layers.
CONV_INDEX_BITS, INDEX_BITS = 8, 5
_WIDEST = 16  # elements of a word of a codebook
_LARGEST_TABLE = 1 << 28  # bytes of what tells which values occur where


def pruned_bits(array: Array, index_bits: int) -> int:
    """Return the bits of a tensor of float32 whose zeros are left out.

    An element that is left is stored with its distance to the one before it, in row-major order; a
    distance over 2^index_bits takes filler zeros. Where that saves nothing, zeros are stored too.
    """
    dense, nonzeros = array.size * FLOAT_BITS, int(np.count_nonzero(array))
    if nonzeros * (FLOAT_BITS + index_bits) >= dense:
        return dense
    stored = nonzeros + _fillers(array, index_bits)
    return min(dense, stored * (FLOAT_BITS + index_bits))


def shared_bits(array: Array, index_bits: int, scales: int = 0) -> int:
    """Return the bits of a tensor whose elements are indices of equal length into codebooks.

    It is the least of: elements as they are; one codebook, with zeros or with zeros left out; and,
    of floats, codebooks of words of 1 to 16 neighbours along the first or second axis, one for the
    tensor or one for every 1, 2, 4, 8, … indices of that axis.

    Args:
        array: the elements as the graph stores them: floats, or integers that need no codebook.
        index_bits: of a relative index.
        scales: how many float32 scales go with integers.
    """
    bits = 8 * array.itemsize
    distinct = _distinct(array)
    found = [_indexed_bits(array.size, distinct.size, bits)]
    nonzeros, values = int(np.count_nonzero(array)), int(np.count_nonzero(distinct))
    if nonzeros * index_bits + _indexed_bits(nonzeros, values, bits) < found[0]:
        fillers = _fillers(array, index_bits)
        stored, values = nonzeros + fillers, values + bool(fillers)
        found.append(_indexed_bits(stored, values, bits) + stored * index_bits)
    if array.itemsize > 1 and 0 < distinct.size <= array.size // 2:  # else no codebook pays
        numbers = np.searchsorted(distinct, array)
        for axis in range(min(2, array.ndim)):
            rows = np.moveaxis(numbers, axis, 0).reshape(array.shape[axis], -1)
            found += _word_bits(rows, bits)
    return min(found) + scales * FLOAT_BITS


def _distinct(array: Array) -> Array:
    """Return the values that occur; of bytes without sorting them."""
    if array.dtype not in (np.int8, np.uint8):
        return np.unique(array)
    places = np.bincount(array.view(np.uint8).ravel(), minlength=256)
    return np.flatnonzero(places).astype(np.uint8).view(array.dtype)


def _indexed_bits(count: int, distinct: int, bits: int) -> int:
    """Return the bits of elements: as they are, or as indices into a codebook beside it."""
    length = max(distinct - 1, 0).bit_length()
    return min(count * bits, count * length + distinct * bits)


def _fillers(array: Array, index_bits: int) -> int:
    """Count the zeros that bridge distances which an index cannot hold."""
    positions = np.flatnonzero(array)
    zeros_before = np.diff(positions, prepend=-1) - 1
    return int(np.sum(zeros_before >> index_bits))


def _word_bits(rows: Array, bits: int) -> Iterator[int]:
    """Yield the bits with words of 1, 2, 4, 8 and 16 neighbours along the first axis.

    `rows` are the numbers of values, from 0 on; a pair of them becomes the number of the pair.
    """
    width, count = 1, int(rows.max()) + 1
    while True:
        yield from _block_bits(rows, count, width * bits)
        if len(rows) % 2 or width == _WIDEST:
            return
        rows, count = _numbered(rows[::2] * count + rows[1::2], count**2)
        width *= 2
        if count > rows.size // 2:
            return


def _numbered(values: Array, end: int) -> tuple[Array, int]:
    """Number the values from 0 to below `end` that occur; return the numbers, and how many."""
    if end > _LARGEST_TABLE:
        found, numbers = np.unique(values, return_inverse=True)
        return numbers.reshape(values.shape), found.size
    occurs = np.zeros(end, np.bool_)
    occurs[values] = True
    return (np.cumsum(occurs) - 1)[values], int(np.count_nonzero(occurs))


def _block_bits(rows: Array, count: int, bits: int) -> Iterator[int]:
    """Yield the bits with a codebook for every 1, 2, 4, … rows, up to one for all of them."""
    if len(rows) * count > _LARGEST_TABLE:
        yield _indexed_bits(rows.size, count, bits)
        return
    occurs = np.zeros((len(rows), count), np.bool_)
    occurs[np.arange(len(rows))[:, None], rows] = True
    height = 1
    while True:
        heights = np.diff([*range(0, len(rows), height), len(rows)])
        yield sum(
            _indexed_bits(int(high) * rows.shape[1], int(distinct), bits)
            for high, distinct in zip(heights, occurs.sum(axis=1), strict=True)
        )
        if len(occurs) == 1:
            return
        merged = occurs[::2].copy()
        merged[: len(occurs) // 2] |= occurs[1::2]
        occurs, height = merged, 2 * height
