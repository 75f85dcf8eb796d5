"""Cuts the words of a tensor into runs that are better off with a code each."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgepress.targets.huffman import BLOCK, SIZES, Counts
from edgepress.targets.sections import COUNTS, HEADER

Sizes = npt.NDArray[np.float64]

MOST_SYMBOLS = 256  # of one code
_MOST_UNITS = 64
_UNIT_WORDS = 128  # shorter runs do not pay for their alphabets
_UNSEEN_BITS = 64.0  # what it costs to move a word into a run where it does not occur
_GAP_ALPHABET_BYTES = 50


class Run(NamedTuple):
    """Words that have a code of their own.

    Attributes:
        begin: its first word.
        end: the word behind its last.
        counts: how often each word occurs in it, `[distinct]`.
    """

    begin: int
    end: int
    counts: Counts


def cut(numbers: npt.NDArray[Any], distinct: int, word_bytes: int, zero: int | None) -> list[Run]:
    """Cut words into runs, each with a code of its own, so that all is as small as possible.

    Kernels keep the weights of some output channels behind each other, and these may share a
    codebook or have a distribution of their own. The words are counted in equal units; of all ways
    to cut between units, dynamic programming finds the cheapest; then each cut moves to the best
    word nearby, and each run is cut again into finer units.

    Args:
        numbers: the words, as numbers below `distinct`, `[words]`.
        distinct: distinct words.
        word_bytes: size of a word.
        zero: number of the word that is zero, if it occurs.
    """
    runs = _cut_once(numbers, distinct, word_bytes, zero)
    if len(runs) == 1:
        return runs
    finer: list[Run] = []
    for begin, end, counts in runs:
        used = np.flatnonzero(counts)
        short = np.zeros(distinct, np.uint16)
        short[used] = np.arange(used.size)
        short_zero = int(short[zero]) if zero is not None and counts[zero] else None
        for run in cut(short.take(numbers[begin:end]), used.size, word_bytes, short_zero):
            full = np.zeros(distinct, np.int64)
            full[used] = run.counts
            finer.append(Run(begin + run.begin, begin + run.end, full))
    return finer


def _cut_once(
    numbers: npt.NDArray[Any], distinct: int, word_bytes: int, zero: int | None
) -> list[Run]:
    size = numbers.size
    # Trying all cuts takes units^2 x distinct steps; it shall not take longer than the coding.
    affordable = int((size * word_bytes / (2 * distinct)) ** 0.5)
    units = max(1, min(_MOST_UNITS, affordable, size // _UNIT_WORDS))
    edges = np.arange(units + 1) * size // units
    counts = np.zeros((units, distinct), np.int64)
    for unit in range(units):
        counts[unit] = np.bincount(numbers[edges[unit] : edges[unit + 1]], minlength=distinct)
    whole = counts.sum(axis=0)
    if units == 1 or not _may_gain(counts, whole, word_bytes, zero):
        return [Run(0, size, whole)]
    cuts = _best_cuts(counts, word_bytes, zero)
    by_run = np.add.reduceat(counts, cuts[:-1], axis=0)
    places = edges[cuts].tolist()
    for index in range(1, len(places) - 1):
        low = max(int(edges[cuts[index] - 1]), places[index - 1] + 1)
        high = min(int(edges[cuts[index] + 1]), places[index + 1] - 1)
        _move(numbers, places, by_run, index, low, high)
    # A unit across a boundary was its own run; now that little is left of it, it may join another.
    cuts = _best_cuts(by_run, word_bytes, zero)
    by_run = np.add.reduceat(by_run, cuts[:-1], axis=0)
    places = [places[cut] for cut in cuts]
    return [Run(*run) for run in zip(places[:-1], places[1:], by_run, strict=True)]


def _best_cuts(counts: Counts, word_bytes: int, zero: int | None) -> list[int]:
    """The best way to join neighbours of `counts` `[units, distinct]`: 0, cuts, and units."""
    units = len(counts)
    sums = np.concatenate([np.zeros_like(counts[:1]), counts.cumsum(axis=0)])
    begin, end = np.nonzero(np.arange(units + 1)[:, None] < np.arange(units + 1))
    costs = np.zeros((units + 1, units + 1))
    costs[begin, end] = _estimated_bytes(sums[end] - sums[begin], word_bytes, zero)
    best, chosen = [0.0], [0]
    for stop in range(1, units + 1):
        totals = np.array(best) + costs[:stop, stop]
        chosen.append(int(totals.argmin()))
        best.append(float(totals[chosen[-1]]))
    cuts = [units]
    while cuts[0]:
        cuts.insert(0, chosen[cuts[0]])
    return cuts


def _may_gain(counts: Counts, whole: Counts, word_bytes: int, zero: int | None) -> bool:
    """Whether codes for each unit, were they free, would be worth a second alphabet.

    A small sample looks less random than it is; Miller and Madow, 1955, correct for that.
    """
    distinct = np.count_nonzero(counts, axis=1)
    too_low = float(distinct.sum()) / (16 * np.log(2))
    cheapest = float(np.min(_content_bytes(counts, word_bytes, zero), axis=0).sum()) + too_low
    now = float(np.min(_content_bytes(whole[None], word_bytes, zero)))
    return bool(cheapest + HEADER.size + int(distinct.min()) < now)


def _move(
    numbers: npt.NDArray[Any], places: list[int], runs: Counts, index: int, low: int, high: int
) -> None:
    """Move one cut to the cheapest place from `low` to `high`, given the runs' codes."""
    with np.errstate(divide="ignore"):
        bits = np.minimum(np.log2(runs.sum(axis=1))[:, None] - np.log2(runs), _UNSEEN_BITS)
    gain = (bits[index - 1] - bits[index]).take(numbers[low:high])
    place = low + int(np.append(0.0, np.cumsum(gain)).argmin())
    old = places[index]
    moved = np.bincount(numbers[min(old, place) : max(old, place)], minlength=runs.shape[1])
    sign = 1 if place > old else -1
    runs[index - 1] += sign * moved
    runs[index] -= sign * moved
    places[index] = place


def _estimated_bytes(counts: Counts, word_bytes: int, zero: int | None) -> Sizes:
    """About how large runs will be, `[runs]`, from their `counts` `[runs, distinct]`."""
    huffman, sparse, raw = _content_bytes(counts, word_bytes, zero)
    distinct = np.count_nonzero(counts, axis=1)
    lengths = distinct / 4  # about 2 bits each
    dictionary = np.minimum(distinct, 30) if word_bytes == 1 else distinct * word_bytes
    alphabet = 1 + lengths + dictionary
    fixed = alphabet + np.ceil(counts.sum(axis=1) / BLOCK) * (SIZES.size + 2)
    sparse = sparse + fixed + COUNTS.size + _GAP_ALPHABET_BYTES
    smallest: Sizes = np.min([huffman + fixed, sparse, raw], axis=0)
    return HEADER.size + smallest


def _content_bytes(counts: Counts, word_bytes: int, zero: int | None) -> tuple[Sizes, Sizes, Sizes]:
    """Without alphabets and other overhead: Huffman, sparse, raw."""
    words = counts.sum(axis=1).astype(float)
    by_word = counts * np.log2(np.maximum(counts, 1))
    entropy = words * np.log2(words) - by_word.sum(axis=1)
    # A Huffman code spends a whole bit on a symbol that makes up more than half, and the others
    # have a code of their own below the other bit.
    most = counts.max(axis=1)
    others = words - most
    by_others = by_word.sum(axis=1) - most * np.log2(most)
    below = words + others * np.log2(np.maximum(others, 1)) - by_others
    distinct = np.count_nonzero(counts, axis=1)
    huffman = np.where(2 * most > words, below, entropy) / 8 * 1.006
    huffman[distinct > MOST_SYMBOLS] = np.inf
    sparse = np.full(len(counts), np.inf)
    if zero is not None:
        # Gaps between zeros that lie at random take what the entropy says of them.
        possible = (2 * counts[:, zero] > words) & (distinct <= MOST_SYMBOLS + 1)
        sparse[possible] = entropy[possible] / 8 * 1.01
    return huffman, sparse, words * word_bytes
