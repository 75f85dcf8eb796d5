from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.passes._codebooks import Block, coded_bits
from edgepress.passes._kmeans import Fit, Line
from edgepress.passes._word_kmeans import Words
from tests.graphs import Array, random


def fit_of(*codebook: object, offsets: tuple[float, ...] | None = None) -> Fit:
    array = np.array(codebook, np.float64)
    return Fit(
        array, np.ones(len(array), np.int64), np.array(offsets or [0] * len(array), float), 0
    )


def test_numbers_take_the_nearest_value_and_zeros_stay() -> None:
    rows = np.array([[0.9, 0, -3.2], [-0.0, 1.2, 2.4]], np.float32)
    block = Block(rows, None, 1)
    assert (block.size, block.mixed) == (4, 0)
    shared = block.shared(fit_of(-3, 1, 2))
    np.testing.assert_array_equal(shared, [[1, 0, -3], [0, 1, 2]])
    np.testing.assert_array_equal(np.signbit(shared), [[False, False, True], [True, False, False]])
    assert shared.dtype == np.float32
    assert isinstance(block.points(), Line)


def test_words_are_consecutive_outputs_at_the_same_input() -> None:
    rows = np.arange(1, 13, dtype=np.float32).reshape(4, 3)
    block = Block(rows, None, 2)
    codebook = [[1, 4], [2, 5], [3, 6], [7, 10], [8, 11], [9, 12]]
    np.testing.assert_array_equal(block.shared(fit_of(*codebook)), rows)
    np.testing.assert_array_equal(
        block.shared(fit_of([2, 5], [8, 11])), [[2, 2, 2], [5, 5, 5], [8, 8, 8], [11, 11, 11]]
    )
    assert isinstance(block.points(), Words)


def test_zero_words_stay_and_mixed_ones_are_counted() -> None:
    rows = np.array([[0, 1, 0, 3], [0, 2, 5, 4]], np.float32)
    block = Block(rows, None, 2)
    assert (block.size, block.mixed) == (3, 1)
    np.testing.assert_array_equal(block.shared(fit_of([9, 8]))[:, 0], [0, 0])


def test_offsets_send_numbers_to_cheaper_values() -> None:
    block = Block(np.array([[1.0, 2.0, 2.9]], np.float32), None, 1)
    np.testing.assert_array_equal(block.shared(fit_of(1, 3, offsets=(0, 3.0))), [[1, 1, 3]])


def test_a_codebook_is_rounded_to_the_dtype_of_the_weights() -> None:
    rows = np.array([[1, 2, 3]], np.float16)
    shared = Block(rows, None, 1).shared(fit_of(1.00001, 1.00002, 2.9, offsets=(5, 0, 0)))
    assert shared.dtype == np.float16
    np.testing.assert_array_equal(shared, np.array([[1, 2.9, 2.9]], np.float16))


@pytest.mark.parametrize("vector", [1, 2])
def test_curvature_weighs_the_numbers(vector: int) -> None:
    rows = random(4, 5)
    curvature = np.abs(random(4, 5, seed=1)).astype(np.float64) + 0.1
    points = Block(rows, curvature, vector).points()
    fit = points.lloyd(points.forgy(1, np.random.default_rng(0)))
    means = [
        np.average(rows[part::vector], weights=curvature[part::vector]) for part in range(vector)
    ]
    np.testing.assert_allclose(fit.codebook.reshape(-1), means)


def slow_bits(rows: Array, vector: int) -> tuple[float, int]:
    out, rest = rows.shape
    words = [
        tuple(rows[start : start + vector, column].tolist())
        for start in range(0, out, vector)
        for column in range(rest)
    ]
    counts = Counter(word for word in words if any(word))
    used = sum(counts.values())
    bits = sum(c * math.log2(used / c) for c in counts.values()) + len(counts) * (32 * vector + 4)
    for part in (used, len(words) - used):
        bits += part * math.log2(len(words) / part) if part else 0
    return (bits if counts else 0.0), len(counts)


@given(
    vector=st.sampled_from([1, 2, 3]),
    groups=st.integers(1, 3),
    rest=st.integers(1, 6),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_bits_are_those_of_the_slow_definition(
    vector: int, groups: int, rest: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.integers(-1, 2, (vector * groups, rest)).astype(np.float32)
    bits, clusters = coded_bits(rows, vector)
    expected, counted = slow_bits(rows, vector)
    assert bits == pytest.approx(expected)
    assert clusters == counted
    block = Block(rows, None, vector)
    if block.size:
        points = block.points()
        fit = points.lloyd(points.plus_plus(100, rng))
        assert fit.bits + block.zero_bits == pytest.approx(expected)
        np.testing.assert_array_equal(block.shared(fit), rows)
