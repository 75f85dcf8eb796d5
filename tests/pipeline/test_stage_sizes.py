"""Sizes of the stages of Deep Compression, against counting one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.pipeline._stage_sizes import pruned_bits, shared_bits
from tests.graphs import Array, random


def relative(values: Sequence[float], index_bits: int) -> list[float]:
    """Write the elements that are stored, fillers as 0.0: figure 1 of the paper, step by step."""
    stored, distance = [], 0
    for value in values:
        distance += 1
        if value != 0:
            stored.append(value)
            distance = 0
        elif distance == 1 << index_bits:
            stored.append(0.0)
            distance = 0
    while stored and stored[-1] == 0.0:  # nothing follows that it would lead to
        stored.pop()
    return stored


def test_the_example_of_the_paper() -> None:
    # 3 bits; non-zeros at 1, 4 and 15; a filler bridges the distance of 11
    values = [0.0] * 16
    values[1], values[4], values[15] = 3.4, 0.9, 1.7
    assert relative(values, 3) == [3.4, 0.9, 0.0, 1.7]
    assert pruned_bits(np.array(values, np.float32), 3) == 4 * (32 + 3)


@given(
    positions=st.sets(st.integers(0, 699), max_size=60),
    size=st.sampled_from([1, 64, 256, 700]),
    index_bits=st.sampled_from([3, 5, 8]),
)
@settings(deadline=None, max_examples=80)
def test_pruned_weights_are_counted_one_by_one(
    positions: set[int], size: int, index_bits: int
) -> None:
    array = np.zeros(size, np.float32)
    for position in positions:
        array[position % size] = position + 0.5
    stored = len(relative(array.tolist(), index_bits))
    assert pruned_bits(array, index_bits) == min(32 * size, stored * (32 + index_bits))
    # as many values as there are non-zeros: a codebook pays where they are equal
    distinct = set(relative(array.tolist(), index_bits))
    length = math.ceil(math.log2(len(distinct))) if distinct else 0
    plain = stored * (length + index_bits) + 32 * len(distinct)
    assert shared_bits(array, index_bits) <= min(plain, pruned_bits(array, index_bits))


def codebook(count: int, entries: int, entry_bits: int) -> int:
    return count * math.ceil(math.log2(entries)) + entries * entry_bits


def drawn(entries: Array, *shape: int, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    picked = rng.integers(0, len(entries), shape)
    picked.flat[: len(entries)] = np.arange(len(entries))  # each of them occurs
    return np.asarray(entries[picked])


@pytest.mark.parametrize("clusters", [1, 2, 3, 16, 17, 256])
def test_one_codebook(clusters: int) -> None:
    array = drawn(random(clusters), 64, 50)
    assert shared_bits(array, 5) == codebook(3200, clusters, 32)


def test_values_that_differ_are_stored_as_they_are() -> None:
    array = random(40, 30)
    assert pruned_bits(array, 5) == shared_bits(array, 5) == 32 * 1200
    assert shared_bits(array.astype(np.float16), 5) == 16 * 1200


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("channels", [1, 8, 16])
def test_a_codebook_for_every_few_channels(axis: int, channels: int) -> None:
    blocks = [drawn(random(4, seed=i), channels, 900, seed=i) for i in range(64 // channels)]
    array = np.concatenate(blocks)
    array = np.ascontiguousarray(array.T) if axis else array
    want = sum(codebook(channels * 900, 4, 32) for _ in blocks)
    assert shared_bits(array, 5) == want


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("width", [2, 4, 16])
def test_words_of_neighbours(axis: int, width: int) -> None:
    words = drawn(random(8, width), 128 // width, 100)  # [outputs / width, inputs, width]
    array = words.transpose(0, 2, 1).reshape(128, 100)
    array = np.ascontiguousarray(array.T) if axis else array
    assert shared_bits(array, 5) == codebook(128 * 100 // width, 8, 32 * width)


def test_pruned_and_shared() -> None:
    array = drawn(random(16), 100, 100)
    array[np.random.default_rng(1).random(array.shape) < 0.92] = 0
    stored = relative(array.ravel().tolist(), 5)
    assert 0.0 in stored, "a filler is a value of its own"
    assert shared_bits(array, 5) == len(stored) * (5 + 5) + 32 * 17
    assert pruned_bits(array, 5) == len(stored) * 37


def test_integers_need_no_codebook_but_scales() -> None:
    array = np.random.default_rng(0).integers(-127, 128, (32, 90)).astype(np.int8)
    assert shared_bits(array, 8) == 8 * 2880
    assert shared_bits(array, 8, scales=32) == 8 * 2880 + 32 * 32
    few = np.sign(array)
    assert shared_bits(few, 8, scales=1) == 2 * 2880 + 3 * 8 + 32
    sparse = np.where(array > 120, array, 0).astype(np.int8)
    stored = len(relative(sparse.ravel().tolist(), 8))
    assert shared_bits(sparse, 8) <= stored * 16


@pytest.mark.parametrize("shape", [(0,), (), (3, 0), (1,)])
def test_degenerate_tensors(shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    assert pruned_bits(np.ones(shape, np.float32), 5) == 32 * size
    assert shared_bits(np.ones(shape, np.float32), 5) == 32 * size
    assert pruned_bits(np.zeros(shape, np.float32), 5) == 0
