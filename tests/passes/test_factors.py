from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.passes._factors import (
    Decomposition,
    Ranks,
    aligned,
    cheapest,
    decomposition,
    ladder,
    largest_ranks,
    metric_of,
    multiplied,
)
from tests.graphs import Array

METHODS = ("channel", "spatial", "tucker")
Shape = tuple[int, int, int, int]

seeds = st.integers(0, 999)
methods = st.sampled_from(METHODS)
kernels = st.sampled_from([(1, 1), (3, 3), (1, 3), (3, 1), (2, 3), (3, 2)])
shapes = st.builds(
    lambda out, into, kernel: (out, into, *kernel), st.integers(1, 7), st.integers(1, 5), kernels
)


def made(shape: Shape, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def metric(shape: Shape, seed: int) -> Array | None:
    """None for even seeds; else what few correlated samples give, so that some directions fade."""
    if seed % 2 == 0:
        return None
    rng, size = np.random.default_rng(seed), math.prod(shape[1:])
    samples = rng.standard_normal((size + 3, size)) @ rng.standard_normal((size, size))
    samples *= np.geomspace(1, 0.05, size)
    return np.asarray(samples.T @ samples / len(samples))


def root_of(shape: Shape, found: Array | None) -> Array:
    """L with L Lᵀ = C."""
    return np.eye(math.prod(shape[1:])) if found is None else np.linalg.cholesky(found)


def loss(weight: Array, other: Array, root: Array) -> float:
    error, whole = (w.reshape(len(w), -1) @ root for w in (weight - other, weight))
    return float(np.sum(error**2) / np.sum(whole**2))


def composed(factors: Sequence[Array]) -> Array:
    """The weight of factors in a row, by loops over all of their indices."""
    whole = factors[0]
    for factor in factors[1:]:
        (mid, into, *first), (out, _, *second) = whole.shape, factor.shape
        kernel = [max(k) for k in zip(first, second, strict=True)]
        result = np.zeros((out, into, *kernel))
        for o, r, i, a, b, c, d in np.ndindex(out, mid, into, *first, *second):
            result[o, i, a + c, b + d] += factor[o, r, c, d] * whole[r, i, a, b]
        whole = result
    return whole


def all_ranks(name: str, shape: Shape) -> list[Ranks]:
    return ladder(name, shape, 1)


# What every decomposition promises ----------------------------------------------------------------


@given(shape=shapes, seed=seeds, name=methods)
@settings(deadline=None, max_examples=60)
def test_full_ranks_reproduce_the_weight(shape: Shape, seed: int, name: str) -> None:
    weight = made(shape, seed)
    found = decomposition(name, weight, metric(shape, seed))
    ranks = largest_ranks(name, shape)
    np.testing.assert_allclose(composed(found.factors(ranks)), weight, rtol=0, atol=1e-10)
    assert found.lost(ranks) < 1e-12


@given(shape=shapes, seed=seeds, name=methods, data=st.data())
@settings(deadline=None, max_examples=80)
def test_factors_lose_what_was_said_and_have_the_shapes_of_layers(
    shape: Shape, seed: int, name: str, data: st.DataObject
) -> None:
    weight, known = made(shape, seed), metric(shape, seed)
    found = decomposition(name, weight, known)
    ranks = data.draw(st.sampled_from(all_ranks(name, shape)))
    factors = found.factors(ranks)
    whole = composed(factors)
    assert found.lost(ranks) == pytest.approx(loss(weight, whole, root_of(shape, known)), abs=1e-9)
    np.testing.assert_allclose(multiplied(factors), whole, atol=1e-9)
    out, into, height, width = shape
    expected = {
        "channel": [(ranks[0], into, height, width), (out, ranks[0], 1, 1)],
        "spatial": [(ranks[0], into, height, 1), (out, ranks[0], 1, width)],
        "tucker": [
            (ranks[-1], into, 1, 1),
            (ranks[0], ranks[-1], height, width),
            (out, ranks[0], 1, 1),
        ],
    }
    assert [factor.shape for factor in factors] == expected[name]


@given(shape=shapes, seed=seeds, name=methods)
@settings(deadline=None, max_examples=40)
def test_higher_ranks_never_lose_more(shape: Shape, seed: int, name: str) -> None:
    found = decomposition(name, made(shape, seed), metric(shape, seed))
    lost = {ranks: found.lost(ranks) for ranks in all_ranks(name, shape)}
    for ranks, share in lost.items():
        assert 0 <= share <= 1 + 1e-12
        assert found.lost_at_least(ranks) <= share + 1e-12
        for mode in range(len(ranks)):
            more = tuple(rank + (i == mode) for i, rank in enumerate(ranks))
            assert lost.get(more, 0.0) <= share + 1e-12


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("known", [None, np.diag(np.arange(1.0, 19))])
def test_a_weight_of_zeros_has_factors_of_finite_numbers(name: str, known: Array | None) -> None:
    shape = (4, 2, 3, 3)
    found = decomposition(name, np.zeros(shape), known)
    for ranks in all_ranks(name, shape):
        assert found.lost(ranks) == 0
        whole = composed(found.factors(ranks))
        np.testing.assert_array_equal(whole, np.zeros(shape))


@given(shape=shapes, seed=seeds, name=methods, data=st.data())
@settings(deadline=None, max_examples=60)
def test_channels_between_factors_carry_half_of_the_magnitude(
    shape: Shape, seed: int, name: str, data: st.DataObject
) -> None:
    weight, known = made(shape, seed), metric(shape, seed)
    ranks = data.draw(st.sampled_from(all_ranks(name, shape)))
    factors = decomposition(name, weight, known).factors(ranks)
    root = root_of(shape, known)
    for index, factor in enumerate(factors[:-1]):
        narrow = composed(factors[: index + 1])
        sizes = [rms(channel, shape, root) for channel in narrow]
        norms = np.sqrt(np.sum(factors[index + 1] ** 2, axis=(0, 2, 3)))
        assert len(factor) == len(norms)
        # channels that carry nearly nothing are scaled by no more than that allows
        big = norms > 1e-3 * norms.max()
        np.testing.assert_allclose(np.array(sizes)[big], norms[big], rtol=1e-6)


def rms(channel: Array, shape: Shape, root: Array) -> float:
    """The root mean square of a channel [in, kh, kw] over the places it has in a patch."""
    _, into, height, width = shape
    squares = []
    for a, b in np.ndindex(height - channel.shape[1] + 1, width - channel.shape[2] + 1):
        patch = np.zeros((into, height, width))
        patch[:, a : a + channel.shape[1], b : b + channel.shape[2]] = channel
        squares.append(float(np.sum((patch.reshape(-1) @ root) ** 2)))
    return math.sqrt(np.mean(squares))


# How little is lost -------------------------------------------------------------------------------


@given(shape=shapes, seed=seeds)
@settings(deadline=None, max_examples=40)
def test_channel_is_the_best_there_is(shape: Shape, seed: int) -> None:
    weight, known = made(shape, seed), metric(shape, seed)
    values = np.linalg.svd(
        weight.reshape(len(weight), -1) @ root_of(shape, known), compute_uv=False
    )
    found = decomposition("channel", weight, known)
    for (rank,) in all_ranks("channel", shape):
        tail = float(np.sum(values[rank:] ** 2) / np.sum(values**2))
        assert found.lost((rank,)) == pytest.approx(tail, abs=1e-12)


@given(shape=shapes, seed=seeds.filter(lambda seed: seed % 2 == 0))
@settings(deadline=None, max_examples=30)
def test_spatial_without_a_metric_is_the_best_there_is(shape: Shape, seed: int) -> None:
    out, into, height, width = shape
    weight = made(shape, seed)
    matrix = np.array(
        [
            [weight[o, i, a, b] for o in range(out) for b in range(width)]
            for i in range(into)
            for a in range(height)
        ]
    )
    values = np.linalg.svd(matrix, compute_uv=False)
    found = decomposition("spatial", weight, None)
    for (rank,) in all_ranks("spatial", shape):
        tail = float(np.sum(values[rank:] ** 2) / np.sum(values**2))
        assert found.lost((rank,)) == pytest.approx(tail, abs=1e-12)


@given(shape=shapes, seed=seeds, data=st.data())
@settings(deadline=None, max_examples=60)
def test_what_follows_the_first_factor_is_the_best_for_it(
    shape: Shape, seed: int, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(["spatial", "tucker"]))
    weight, known = made(shape, seed), metric(shape, seed)
    ranks = data.draw(st.sampled_from(all_ranks(name, shape)))
    found = decomposition(name, weight, known)
    first = found.factors(ranks)[0]
    root = root_of(shape, known)
    # regress the layer on what the first factor shows it of a patch, then cut the rank
    out, into, height, width = shape
    places = [(height - first.shape[2] + 1), (width - first.shape[3] + 1)]
    rows = []
    for channel in first:
        for a, b in np.ndindex(*places):
            row = np.zeros((into, height, width))
            row[:, a : a + first.shape[2], b : b + first.shape[3]] = channel
            rows.append(row.reshape(-1) @ root)
    wanted, seen = weight.reshape(out, -1) @ root, np.array(rows)
    fit = (np.linalg.lstsq(seen.T, wanted.T, rcond=None)[0].T @ seen).astype(float)
    if name == "tucker":
        left, values, right = np.linalg.svd(fit, full_matrices=False)
        fit = (left[:, : ranks[0]] * values[: ranks[0]]) @ right[: ranks[0]]
    best = float(np.sum((wanted - fit) ** 2) / np.sum(wanted**2))
    assert found.lost(ranks) == pytest.approx(best, abs=1e-9)


@given(shape=shapes, seed=seeds.filter(lambda seed: seed % 2 == 0))
@settings(deadline=None, max_examples=30)
def test_tucker_loses_no_more_than_the_truncated_hosvd(shape: Shape, seed: int) -> None:
    weight = made(shape, seed)
    out, into = shape[:2]
    rows = np.linalg.svd(weight.reshape(out, -1))[0]
    columns = np.linalg.svd(weight.swapaxes(0, 1).reshape(into, -1))[0]
    found = decomposition("tucker", weight, None)
    for r_out, r_in in all_ranks("tucker", shape):
        u, v = rows[:, :r_out], columns[:, :r_in]
        core = np.einsum("oiab,op,iq->pqab", weight, u, v)
        whole = np.einsum("pqab,op,iq->oiab", core, u, v)
        assert found.lost((r_out, r_in)) <= loss(weight, whole, root_of(shape, None)) + 1e-12


@pytest.mark.parametrize("name", METHODS)
def test_a_metric_makes_the_loss_less_where_inputs_are_alike(name: str) -> None:
    shape = (16, 8, 3, 3)
    weight = made(shape, 0)
    # eight channels that are mixtures of three
    mixture = np.random.default_rng(1).standard_normal((3000, 3, 9)) / 1.0
    mixing = np.random.default_rng(2).standard_normal((8, 3))
    patches = np.einsum("sct,ic->sit", mixture, mixing).reshape(3000, -1)
    known = patches.T @ patches / 3000 + 1e-4 * np.eye(72)
    root = root_of(shape, known)
    ranks = (6,) * len(largest_ranks(name, shape))
    blind, seeing = (
        loss(weight, composed(decomposition(name, weight, m).factors(ranks)), root)
        for m in (None, known)
    )
    assert seeing < 0.6 * blind


# Which ranks --------------------------------------------------------------------------------------


class Counting:
    """A decomposition that notes what was asked."""

    def __init__(self, inner: Decomposition) -> None:
        self.inner, self.asked = inner, list[Ranks]()

    def lost(self, ranks: Ranks) -> float:
        self.asked.append(ranks)
        return self.inner.lost(ranks)

    def lost_at_least(self, ranks: Ranks) -> float:
        return self.inner.lost_at_least(ranks)

    def factors(self, ranks: Ranks) -> list[Array]:
        return self.inner.factors(ranks)


@given(shape=shapes, seed=seeds, name=methods, limit=st.floats(0, 1), align=st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_the_cheapest_is_the_first_that_loses_little_enough(
    shape: Shape, seed: int, name: str, limit: float, align: int
) -> None:
    found = decomposition(name, made(shape, seed), metric(shape, seed))
    rungs = ladder(name, shape, align)
    fitting = [ranks for ranks in rungs if found.lost(ranks) <= limit]
    assert cheapest(found, rungs, limit) == (fitting[0] if fitting else rungs[-1])


def test_bounds_spare_tucker_most_of_the_work() -> None:
    weight = made((16, 16, 3, 3), 0)
    rungs = ladder("tucker", weight.shape, 1)
    found = decomposition("tucker", weight, None)
    counting = Counting(found)
    ranks = cheapest(counting, rungs, 0.2)
    assert ranks == next(ranks for ranks in rungs if found.lost(ranks) <= 0.2)
    assert len(counting.asked) < rungs.index(ranks) / 4


@given(shape=shapes, align=st.integers(1, 5), share=st.sampled_from([1.0, 4.0]))
@settings(deadline=None, max_examples=60)
def test_the_ladder_climbs_in_cost_over_aligned_ranks(
    shape: Shape, align: int, share: float
) -> None:
    out, into, height, width = shape
    for name in METHODS:
        largest = largest_ranks(name, shape)
        rungs = ladder(name, shape, align, share)
        assert rungs[-1] == largest
        assert len(set(rungs)) == len(rungs)
        for ranks in rungs:
            for rank, most in zip(ranks, largest, strict=True):
                assert rank == most or (rank % align == 0 and 0 < rank < most)
        if name != "tucker":
            assert len(rungs) == math.ceil(largest[0] / align)
            assert rungs == sorted(rungs)
            continue
        work = [
            into * q * share + q * r * height * width + r * out for r, q in rungs
        ]  # positions of the output, times multiplications per position
        assert work == sorted(work)


def test_strides_make_the_first_factor_dearer() -> None:
    rungs = [ladder("tucker", (8, 8, 1, 3), 2, share) for share in (1.0, 4.0)]
    # 8·4·share + 3·4·2 + 2·8 against 8·2·share + 3·2·6 + 6·8
    assert [found.index((2, 4)) < found.index((6, 2)) for found in rungs] == [True, False]


def test_tucker_leaves_out_modes_wider_than_the_other_can_feed() -> None:
    assert ladder("tucker", (3, 2, 1, 1), 1) == [(1, 1), (2, 2)]
    assert (4, 1) in ladder("tucker", (9, 2, 1, 4), 1)
    assert (5, 1) not in ladder("tucker", (9, 2, 1, 4), 1)


def test_ranks_are_rounded_up_but_not_above_the_largest() -> None:
    assert [aligned(rank, 4, 10) for rank in (1, 4, 5, 8, 9, 10)] == [4, 4, 8, 8, 10, 10]
    assert aligned(1, 16, 3) == 3


def test_largest_ranks_are_those_of_the_matrices() -> None:
    assert largest_ranks("channel", (8, 2, 1, 3)) == (6,)
    assert largest_ranks("spatial", (2, 8, 3, 2)) == (4,)
    assert largest_ranks("spatial", (9, 2, 3, 2)) == (6,)
    assert largest_ranks("tucker", (50, 2, 3, 3)) == (18, 2)
    assert largest_ranks("tucker", (2, 50, 3, 3)) == (2, 18)


# The metric ---------------------------------------------------------------------------------------


def second_of(patches: Array) -> Array:
    ones = np.concatenate([patches, np.ones((len(patches), 1))], axis=1)
    return np.asarray(ones.T @ ones / len(patches))


@given(seed=seeds, count=st.integers(2, 60), size=st.integers(2, 6), centred=st.booleans())
@settings(deadline=None, max_examples=40)
def test_the_metric_is_the_oracle_approximating_shrinkage(
    seed: int, count: int, size: int, centred: bool
) -> None:
    rng = np.random.default_rng(seed)
    patches = rng.standard_normal((count, size)) * rng.uniform(0.2, 3, size) + rng.normal(size=size)
    got = metric_of(second_of(patches), count, centred=centred)
    # equation 23, with S the sample covariance, n samples of p numbers
    around = patches - patches.mean(axis=0) if centred else patches
    s, n, p = np.einsum("ni,nj->ij", around, around) / count, count, size
    rho = ((1 - 2 / p) * np.trace(s @ s) + np.trace(s) ** 2) / (
        (n + 1 - 2 / p) * (np.trace(s @ s) - np.trace(s) ** 2 / p)
    )
    rho = min(rho, 1.0)
    want = (1 - rho) * s + rho * np.trace(s) / p * np.eye(p)
    assert got is not None
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)
    np.linalg.cholesky(got)


def test_many_samples_are_hardly_shrunk() -> None:
    patches = np.random.default_rng(0).standard_normal((20000, 4)) * [1, 2, 3, 4] + 5
    got = metric_of(second_of(patches), 20000, centred=True)
    assert got is not None
    np.testing.assert_allclose(got, np.cov(patches.T, bias=True), atol=0.01)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("size", [1, 2, 30])
def test_the_metric_of_any_input_but_zeros_is_positive_definite(centred: bool, size: int) -> None:
    rng = np.random.default_rng(size)
    for patches in (
        np.full((5, size), 1000.0),  # does not vary
        1000 + 1e-5 * rng.standard_normal((50, size)),  # hardly
        rng.standard_normal((1, size)),  # a single sample
        np.repeat(rng.standard_normal((40, 1)), size, axis=1),  # one direction
    ):
        found = metric_of(second_of(patches), len(patches), centred=centred)
        assert found is not None
        np.linalg.cholesky(found)
    assert metric_of(second_of(np.zeros((5, size))), 5, centred=centred) is None


def test_the_moments_are_not_changed() -> None:
    second = second_of(np.random.default_rng(0).standard_normal((9, 3)))
    before = second.copy()
    metric_of(second, 9, centred=True)
    np.testing.assert_array_equal(second, before)
