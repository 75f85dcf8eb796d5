from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.passes._kmeans import Line, assigned, code_bits, codebook_bits, envelope
from tests.graphs import Array, random

INITS = ("linear", "density", "forgy", "plus_plus")


def started(line: Line, init: str, clusters: int, seed: int = 0) -> Array:
    if init in ("linear", "density"):
        return np.asarray(getattr(line, init)(clusters))
    return np.asarray(getattr(line, init)(clusters, np.random.default_rng(seed)))


def optimum(values: Array, weights: Array, clusters: int) -> tuple[float, list[float]]:
    """The least error that there is, and its means, by dynamic programming over intervals."""
    order = np.argsort(values)
    x, h = values[order].astype(np.float64), weights[order].astype(np.float64)
    n = len(x)

    def interval(first: int, end: int) -> tuple[float, float]:
        part, weight = x[first:end], h[first:end]
        mean = float((part * weight).sum() / weight.sum())
        return float((weight * (part - mean) ** 2).sum()), mean

    best = [[math.inf] * (n + 1) for _ in range(clusters + 1)]
    came = [[0] * (n + 1) for _ in range(clusters + 1)]
    best[0][0] = 0.0
    for k in range(1, clusters + 1):
        for end in range(1, n + 1):
            for first in range(end):
                cost = best[k - 1][first] + interval(first, end)[0]
                if cost < best[k][end]:
                    best[k][end], came[k][end] = cost, first
    means, end = [], n
    for k in range(clusters, 0, -1):
        first = came[k][end]
        means.append(interval(first, end)[1])
        end = first
    return best[clusters][n], means[::-1]


def error_of(values: Array, weights: Array, codebook: Array) -> float:
    distances = np.square(values.astype(np.float64)[:, None] - codebook)
    return float((weights * distances.min(axis=1)).sum())


@given(
    numbers=st.lists(st.integers(-20, 20), min_size=1, max_size=14),
    clusters=st.integers(1, 5),
    init=st.sampled_from(INITS),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=150)
def test_a_fit_is_a_local_optimum_and_no_better_than_the_global_one(
    numbers: list[int], clusters: int, init: str, weighted: bool, seed: int
) -> None:
    values = np.array(numbers, np.float32)
    weights = np.random.default_rng(seed).integers(1, 9, len(values)).astype(np.float64)
    weights = weights if weighted else np.ones(len(values))
    line = Line(values, weights if weighted else None)
    fit = line.lloyd(started(line, init, clusters, seed))
    assert line.distinct == len(set(numbers))
    wanted = min(clusters, line.distinct)
    assert len(fit.codebook) == wanted
    assert np.all(np.diff(fit.codebook) > 0)
    chosen = assigned(values, fit.codebook)
    nearest = np.abs(values[:, None] - fit.codebook)
    np.testing.assert_allclose(
        nearest[np.arange(len(values)), chosen], nearest.min(axis=1), atol=1e-9
    )
    np.testing.assert_array_equal(np.bincount(chosen, minlength=wanted), fit.counts)
    for index, mean in enumerate(fit.codebook):
        mine = chosen == index
        np.testing.assert_allclose(mean, np.average(values[mine], weights=weights[mine]), atol=1e-9)
    assert fit.error == pytest.approx(error_of(values, weights, fit.codebook), abs=1e-8)
    least, means = optimum(values, weights, wanted)
    assert fit.error >= least - 1e-8
    # whatever the start, the global optimum is a place to stay
    assert line.lloyd(np.array(means)).error == pytest.approx(least, abs=1e-8)


def test_the_best_of_some_draws_is_the_optimum() -> None:
    values = random(24)
    line = Line(values)
    for clusters in (2, 3, 5):
        least, _ = optimum(values, np.ones(24), clusters)
        draws = [line.lloyd(started(line, "plus_plus", clusters, seed)).error for seed in range(20)]
        assert min(draws) == pytest.approx(least)


def test_whole_weights_are_repetitions() -> None:
    values = random(300)
    weights = np.random.default_rng(0).integers(1, 6, 300)
    weighted, repeated = Line(values, weights), Line(np.repeat(values, weights))
    for init in ("linear", "density"):
        np.testing.assert_array_equal(started(weighted, init, 7), started(repeated, init, 7))
    start = weighted.linear(7)
    one, other = weighted.lloyd(start), repeated.lloyd(start)
    np.testing.assert_allclose(one.codebook, other.codebook, rtol=1e-9)
    assert one.error == pytest.approx(other.error)
    assert (one.counts.sum(), other.counts.sum()) == (300, weights.sum())


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("clusters", [5, 6, 100])
def test_as_many_clusters_as_numbers_change_nothing(init: str, clusters: int) -> None:
    values = np.array([3, -1, -1, 0.1, 7, 7, 7, 1e-3], np.float32)
    line = Line(values)
    fit = line.lloyd(started(line, init, clusters))
    np.testing.assert_array_equal(fit.codebook.astype(np.float32), np.unique(values))
    np.testing.assert_array_equal(fit.counts, [2, 1, 1, 1, 3])
    assert fit.error == pytest.approx(0, abs=1e-12)


def test_empty_clusters_move_to_where_the_error_is() -> None:
    values = np.concatenate([random(500), [1e4]]).astype(np.float32)
    line = Line(values)
    start = line.linear(16)
    assert len(np.unique(assigned(values, start))) == 2
    fit = line.lloyd(start)
    assert len(fit.codebook) == 16
    assert fit.error < 500 / 16**2 * 4
    # halving the other cluster would be a local optimum, too
    fit = Line(np.array([0, 1, 100, 110, 120])).lloyd(np.array([0, 110, 1e9]))
    np.testing.assert_allclose(fit.codebook[0], 0.5)


def test_linear_steps_and_density_quantiles() -> None:
    values = np.array([0, 0, 0, 1, 1, 2, 8, 10], np.float32)
    line = Line(values)
    np.testing.assert_array_equal(line.linear(5), [0, 2.5, 5, 7.5, 10])
    # the middles of four equal shares of eight numbers lie at the 1st, 3rd, 5th and 7th
    np.testing.assert_array_equal(line.density(4), [0, 0, 1, 8])
    heavy = Line(values, np.array([1, 1, 1, 1, 1, 1, 100, 1]))
    np.testing.assert_array_equal(heavy.density(4), [8, 8, 8, 8])


def test_forgy_draws_each_number_as_often() -> None:
    line = Line(np.arange(6, dtype=np.float32))
    drawn = Counter(float(x) for seed in range(2000) for x in started(line, "forgy", 2, seed))
    assert set(drawn) == set(range(6))
    assert all(abs(count - 4000 / 6) < 100 for count in drawn.values())
    assert len(set(started(line, "forgy", 6))) == 6


@pytest.mark.parametrize("weighted", [False, True])
def test_plus_plus_draws_by_the_squared_distance(weighted: bool) -> None:
    values = np.array([0, 1, 3, 10], np.float32)
    weights = np.array([4, 3, 2, 1], np.float64) if weighted else np.ones(4)
    line = Line(values, weights if weighted else None)
    pairs = Counter(tuple(started(line, "plus_plus", 2, seed)) for seed in range(6000))
    expected: Counter[tuple[float, ...]] = Counter()
    for first, share in zip(values, weights / weights.sum(), strict=True):
        distances = weights * np.square(values - first)
        for second, then in zip(values, distances / distances.sum(), strict=True):
            expected[tuple(sorted((float(first), float(second))))] += share * then
    for pair, share in expected.items():
        deviation = math.sqrt(6000 * share * (1 - share))
        assert abs(pairs[pair] - 6000 * share) <= 4 * deviation


def test_plus_plus_looks_for_its_number_within_an_interval() -> None:
    # all but one number are next to a cluster; the far one must be found at either end
    for values in ([0.0] * 50 + [1000.0], [-1000.0] + [0.0] * 50):
        line = Line(np.array(values, np.float32))
        assert set(started(line, "plus_plus", 2, 3)) == set(values)


def test_the_same_seed_draws_the_same() -> None:
    line = Line(random(1000))
    for init in ("forgy", "plus_plus"):
        first, again, other = (started(line, init, 8, seed) for seed in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other)


@given(
    codebook=st.lists(st.integers(-30, 30), min_size=1, max_size=8, unique=True).map(sorted),
    offsets=st.lists(st.integers(0, 300) | st.integers(0, 3000), min_size=8, max_size=8),
)
@settings(deadline=None, max_examples=200)
def test_the_envelope_is_the_cheapest_entry_everywhere(
    codebook: list[int], offsets: list[int]
) -> None:
    entries, costs = np.array(codebook, np.float64), np.array(offsets[: len(codebook)], np.float64)
    kept, edges = envelope(entries, costs)
    assert all(a <= b for a, b in pairwise(edges))
    assert len(edges) == len(kept) - 1
    x = np.linspace(-60, 60, 2001)
    all_costs = np.square(x[:, None] - entries) + costs
    chosen = assigned(x, entries, costs)
    np.testing.assert_allclose(all_costs[np.arange(len(x)), chosen], all_costs.min(axis=1))


def test_a_number_on_an_edge_goes_below() -> None:
    np.testing.assert_array_equal(assigned(np.array([[0.5], [1.5]]), np.arange(3)), [[0], [1]])
    fit = Line(np.array([0, 0.5, 1])).fit_of(np.array([0.0, 1.0]))
    np.testing.assert_array_equal(fit.counts, [2, 1])


def test_a_price_buys_bits_with_error() -> None:
    values = random(5000)
    line = Line(values)
    start = line.lloyd(started(line, "plus_plus", 32))
    fits = [start, *(line.lloyd(start.codebook, price) for price in (3e-3, 1e-2, 1e-1, 1.0, 1e3))]
    for price, fit in zip((0, 3e-3, 1e-2, 1e-1, 1.0, 1e3), fits, strict=True):
        chosen = assigned(values, fit.codebook, fit.offsets)
        np.testing.assert_array_equal(np.bincount(chosen), fit.counts)
        exact = float(np.square(values - fit.codebook[chosen]).sum())
        assert fit.error == pytest.approx(exact, rel=1e-6)
        entropy = -sum(c * math.log2(c / 5000) for c in fit.counts.tolist())
        assert fit.index_bits == pytest.approx(entropy, abs=1e-6)
        assert fit.error + price * fit.index_bits <= start.error + price * start.index_bits + 1e-6
    for less, more in pairwise(fits):
        assert more.index_bits < less.index_bits
        assert more.error > less.error
    assert len(fits[-1].codebook) == 1


def test_a_price_is_in_units_of_the_weighted_error() -> None:
    values = random(500)
    plain, heavy = Line(values), Line(values, np.full(500, 4.0))
    one, other = plain.lloyd(plain.linear(20), 0.05), heavy.lloyd(plain.linear(20), 0.2)
    np.testing.assert_allclose(one.codebook, other.codebook)
    assert other.error == pytest.approx(4 * one.error)


def test_a_price_is_better_than_fewer_clusters() -> None:
    line = Line(np.random.default_rng(0).laplace(size=20_000))
    few = line.lloyd(started(line, "plus_plus", 8))
    many = line.lloyd(started(line, "plus_plus", 24)).codebook
    priced = [line.lloyd(many, price) for price in np.geomspace(1e-3, 1, 30)]
    within = [fit for fit in priced if fit.index_bits <= few.index_bits]
    assert min(fit.error for fit in within) < 0.7 * few.error


@pytest.mark.parametrize("weighted", [False, True])
def test_grids_are_near_the_limit_of_fine_quantizers(weighted: bool) -> None:
    values = np.random.default_rng(0).standard_normal(40_000)
    line = Line(values, np.full(40_000, 3.0) if weighted else None)
    price = 2.0**-7 * (3 if weighted else 1)
    fits = [line.lloyd(grid, price) for grid in line.grids(price)]
    assert len(fits) == 2
    for fit in fits:
        # Gish and Pierce: 1.53 dB from the rate-distortion bound of 6.02 dB per bit
        snr_db = 10 * math.log10((3 if weighted else 1) * 40_000 / fit.error)
        assert snr_db == pytest.approx(6.02 * fit.index_bits / 40_000 - 1.53, abs=0.1)
    near, wide = line.grids(price)
    assert len(near) > len(wide)
    np.testing.assert_allclose(np.diff(near), np.diff(near)[0])
    assert values.min() < near[0]
    assert near[-1] < values.max()


def test_a_grid_has_no_more_steps_than_numbers() -> None:
    for grid in Line(random(10)).grids(1e-20):
        assert len(grid) == 10
    for grid in Line(random(10)).grids(1e20):
        assert len(grid) == 1


def test_bits_of_codes_and_codebooks() -> None:
    np.testing.assert_array_equal(code_bits(np.array([4, 2, 1, 1])), [1, 2, 3, 3])
    assert codebook_bits(np.zeros(8)) == 8 * (32 + 4)
    assert codebook_bits(np.zeros((8, 3))) == 8 * (3 * 32 + 4)
    fit = Line(np.array([0, 0, 0, 0, 1, 1, 2, 3.0])).lloyd(np.arange(4.0))
    assert fit.index_bits == 14
    assert fit.bits == 14 + 4 * 36


def test_a_million_numbers_far_from_zero_keep_means_and_errors() -> None:
    values = (1e4 + 0.01 * np.random.default_rng(0).standard_normal(10**6)).astype(np.float32)
    line = Line(values)
    fit = line.lloyd(started(line, "plus_plus", 4))
    chosen = assigned(values, fit.codebook)
    for index, mean in enumerate(fit.codebook):
        assert mean == pytest.approx(values[chosen == index].astype(np.float64).mean(), rel=1e-10)
    assert fit.error == pytest.approx(np.square(values - fit.codebook[chosen]).sum(), rel=1e-6)
