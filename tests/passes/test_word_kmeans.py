from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.passes import _word_kmeans
from edgepress.passes._kmeans import Line
from edgepress.passes._word_kmeans import Words
from tests.graphs import Array, random


def costs_of(words: Array, weights: Array, codebook: Array, offsets: Array) -> Array:
    """`[n, k]`, by broadcasting."""
    square = np.square(words.astype(np.float64)[:, None] - codebook)
    return np.asarray((weights[:, None] * square).sum(axis=2) + offsets)


def started(words: Words, clusters: int, seed: int = 0) -> Array:
    return words.plus_plus(clusters, np.random.default_rng(seed))


@given(
    count=st.integers(1, 60),
    vector=st.integers(2, 4),
    clusters=st.integers(1, 9),
    weighted=st.booleans(),
    price=st.sampled_from([0.0, 0.02, 0.5, 50.0]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=80)
def test_words_choose_the_cheapest_and_codewords_are_means(
    count: int, vector: int, clusters: int, weighted: bool, price: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    array = rng.integers(-3, 4, (count, vector)).astype(np.float32)
    weights = rng.integers(1, 5, array.shape) * 1.0 if weighted else np.ones(array.shape)
    words = Words(array, weights if weighted else None)
    assert words.distinct == len({tuple(row) for row in array.tolist()})
    start = started(words, clusters, seed)
    assert len(start) == min(clusters, words.distinct)
    fit = words.lloyd(start, price)
    assert len(fit.codebook) <= min(clusters, words.distinct)
    costs = costs_of(array, weights, fit.codebook, fit.offsets)
    chosen = words.assigned(fit.codebook, fit.offsets)
    picked = costs[np.arange(count), chosen]
    np.testing.assert_allclose(picked, costs.min(axis=1), atol=1e-9)
    np.testing.assert_array_equal(np.bincount(chosen), fit.counts)
    error = float((picked - fit.offsets[chosen]).sum())
    assert fit.error == pytest.approx(error, abs=1e-8)
    first = words.fit_of(start)
    assert fit.error + price * fit.index_bits <= first.error + price * first.index_bits + 1e-8


def test_codewords_are_weighted_means() -> None:
    array, weights = random(200, 3), np.abs(random(200, 3, seed=1)) + 0.1
    words = Words(array, weights)
    fit = words.lloyd(started(words, 5))
    chosen = words.assigned(fit.codebook)
    for index, codeword in enumerate(fit.codebook):
        mine = chosen == index
        mean = np.average(array[mine], axis=0, weights=weights[mine])
        np.testing.assert_allclose(codeword, mean, atol=0.01)


def test_words_of_one_are_numbers() -> None:
    array = random(400, 1)
    weights = np.abs(random(400, 1, seed=1)) + 0.1
    words, line = Words(array, weights), Line(array[:, 0], weights[:, 0])
    start = line.linear(6)
    one, other = words.lloyd(start[:, None]), line.lloyd(start)
    np.testing.assert_allclose(one.codebook[:, 0], other.codebook, atol=0.01)
    assert one.error == pytest.approx(other.error, rel=1e-3)
    assert words.fit_of(other.codebook[:, None]).error == pytest.approx(other.error)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    words = Words(random(1000, 4))
    start = started(words, 12)
    whole = words.lloyd(start)
    monkeypatch.setattr(_word_kmeans, "CHUNK_BYTES", 8 * 12 * 37)
    parts = words.lloyd(start)
    np.testing.assert_allclose(parts.codebook, whole.codebook)
    np.testing.assert_array_equal(parts.counts, whole.counts)


def test_as_many_clusters_as_words_change_nothing() -> None:
    array = random(6, 2)[[0, 1, 2, 3, 4, 5, 0, 2, 2]]
    words = Words(array)
    fit = words.lloyd(started(words, 100))
    np.testing.assert_array_equal(fit.codebook.astype(np.float32), np.unique(array, axis=0))
    assert fit.error == pytest.approx(0, abs=1e-12)


def test_empty_clusters_move_to_the_farthest_words() -> None:
    array = np.concatenate([random(50, 2), random(50, 2, seed=1) + 100])
    start = np.array([[0.0, 0.0], [1e6, 1e6], [-1e6, 0.0]])
    fit = Words(array).lloyd(start)
    assert len(fit.codebook) == 3
    assert np.all(np.abs(fit.codebook) < 200)


def test_plus_plus_draws_by_the_squared_distance() -> None:
    array = np.array([[0, 0], [1, 0], [3, 4]], np.float32)
    weights = np.array([[1, 1], [2, 5], [1, 2]], np.float64)
    words = Words(array, weights)
    pairs = Counter(tuple(map(tuple, started(words, 2, seed).tolist())) for seed in range(4000))
    for first in array:
        distances = (weights * np.square(array - first)).sum(axis=1)
        for second, share in zip(array, distances / distances.sum() / 3, strict=True):
            count = pairs[tuple(first.tolist()), tuple(second.tolist())]
            assert abs(count - 4000 * share) <= 4 * math.sqrt(4000 * share * (1 - share))


def test_forgy_draws_words() -> None:
    array = random(9, 2)
    drawn = Words(array).forgy(9, np.random.default_rng(0))
    assert {tuple(word) for word in drawn.tolist()} == {tuple(word) for word in array.tolist()}
    assert len(Words(array).forgy(4, np.random.default_rng(0))) == 4


def test_a_price_buys_bits_with_error() -> None:
    words = Words(random(3000, 2))
    start = words.lloyd(started(words, 32))
    fits = [start, *(words.lloyd(start.codebook, price) for price in (1e-1, 1.0, 100.0))]
    for less, more in pairwise(fits):
        assert more.index_bits < less.index_bits
        assert more.error > less.error
    assert len(fits[-1].codebook) == 1
