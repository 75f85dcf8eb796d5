"""Numbers the distinct words of a tensor, where they are few."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[Any]  # unsigned integers
Numbers = npt.NDArray[np.uint16]

MOST_WORDS = 4096
_SAMPLE = 2 * MOST_WORDS  # of unshared floats, nearly all of a sample differ
_CHUNK = 1 << 15  # keys at a time: what is in flight stays in the cache
_SHIFT = np.uint64(64 - 16)  # a table has 2^16 slots
_MULTIPLIER = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: Fibonacci hashing, Knuth, vol. 3, 6.4


def index_words(keys: Keys, most: int = MOST_WORDS) -> tuple[Numbers, Keys] | None:
    """Number the distinct keys in ascending order.

    A table of slots finds the number of a key in one step. What it does not find, because it was
    not in the sample or because two keys want the same slot, is left to the next round with another
    table.

    Args:
        keys: unsigned integers, `[n]`, at least one.
        most: most distinct keys, up to `MOST_WORDS`.

    Returns:
        Number of each key `[n]`, and the distinct keys as uint64; None where there are more than
        `most`, which a sample tells in nearly all cases.
    """
    fresh = _sample(keys)
    if fresh.size > most:
        return None
    numbers = np.empty(0, np.uint16)
    known = np.empty(0, np.uint64)
    rest, places = keys, None
    multiplier = _MULTIPLIER
    while True:
        factor = np.uint64(multiplier)
        slots, first = np.unique(fresh * factor >> _SHIFT, return_index=True)
        table = np.zeros(1 << 16, np.uint16)
        table[slots] = np.arange(known.size, known.size + first.size)
        known = np.concatenate([known, fresh[first]])
        if known.size > most:
            return None
        found, missing = _look_up(rest, factor, table, known)
        if places is None:
            numbers, places = found, missing
        else:
            numbers[places] = found
            places = places[missing]
        if not missing.size:
            break
        rest = rest[missing]
        fresh = _sample(rest)
        multiplier = multiplier * _MULTIPLIER % (1 << 64)
    order = np.argsort(known)
    rank = np.empty(known.size, np.uint16)
    rank[order] = np.arange(known.size)
    for chunk in _chunks(numbers.size):
        numbers[chunk] = rank.take(numbers[chunk])
    return numbers, known[order]


def _look_up(
    keys: Keys, factor: np.uint64, table: Numbers, known: Keys
) -> tuple[Numbers, npt.NDArray[np.int64]]:
    """What the table says of each key, and where that is wrong."""
    found = np.empty(keys.size, np.uint16)
    missing: list[npt.NDArray[np.int64]] = []
    for chunk in _chunks(keys.size):
        wanted = keys[chunk].astype(np.uint64)
        numbers = table.take((wanted * factor >> _SHIFT).view(np.int64))
        found[chunk] = numbers
        missing.append(chunk.start + np.flatnonzero(known.take(numbers) != wanted))
    return found, np.concatenate(missing)


def _chunks(size: int) -> list[slice]:
    return [slice(at, min(at + _CHUNK, size)) for at in range(0, size, _CHUNK)]


def _sample(keys: Keys) -> Keys:
    """Distinct keys of a sample, ascending. This is faster than `np.unique`."""
    ordered = np.sort(keys[:: -(-keys.size // _SAMPLE)]).astype(np.uint64)
    differs = np.append(True, ordered[1:] != ordered[:-1])
    return np.compress(differs, ordered)
