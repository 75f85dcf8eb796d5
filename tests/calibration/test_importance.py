from __future__ import annotations

import dataclasses
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.calibration.base import Array, CalibrationError
from edgepress.calibration.importance.base import (
    NEEDS,
    GroupEvidence,
    importance,
    importance_names,
)
from edgepress.calibration.importance.batch_norm import BatchNorm
from edgepress.calibration.importance.geometric_median import GeometricMedian
from edgepress.calibration.importance.l1 import L1
from edgepress.calibration.importance.l2 import L2
from edgepress.calibration.importance.random import Random
from edgepress.calibration.importance.taylor import Taylor
from edgepress.calibration.importance.thinet import Thinet

NAMES = ("batch_norm", "geometric_median", "l1", "l2", "random", "taylor", "thinet")


def evidence(channels: int, seed: int) -> GroupEvidence:
    """A group of two producers, with everything known of it."""
    rng = np.random.default_rng(seed)
    layers = [rng.standard_normal((channels, n)).astype(np.float32) for n in (9, 25)]
    z = rng.standard_normal((channels, 7 + channels))
    return GroupEvidence(
        channels=channels,
        producers=[layers[0], 3 * layers[1]],
        gammas=[rng.standard_normal(channels).astype(np.float32)],
        contributions=z @ z.T,
        first_order=rng.standard_normal((11, channels)),
        seed=seed,
    )


def rearranged(group: GroupEvidence, order: Array) -> GroupEvidence:
    """The same group, its channels in another order."""
    assert group.contributions is not None
    assert group.first_order is not None
    return dataclasses.replace(
        group,
        channels=len(order),
        producers=[w[order] for w in group.producers],
        gammas=[g[order] for g in group.gammas],
        contributions=group.contributions[np.ix_(order, order)],
        first_order=group.first_order[:, order],
    )


def with_zeros(group: GroupEvidence, at: list[int]) -> GroupEvidence:
    """The group with channels that do nothing."""
    blank = rearranged(group, np.arange(group.channels))
    assert blank.contributions is not None
    assert blank.first_order is not None
    for array in (*blank.producers, *blank.gammas, blank.contributions):
        array[at] = 0
    blank.contributions[:, at] = 0
    blank.first_order[:, at] = 0
    return blank


groups = st.builds(evidence, st.integers(1, 12), st.integers(0, 999))
quick = settings(deadline=None, max_examples=25)


def test_the_registry_finds_them_by_file_name() -> None:
    assert importance_names() == list(NAMES)
    for name in NAMES:
        camel = "".join(word.capitalize() for word in name.split("_"))
        assert type(importance(name)).__name__ == camel
        assert importance(name).needs <= set(NEEDS)


def test_an_unknown_name_gets_a_hint() -> None:
    with pytest.raises(CalibrationError, match=r"'tailor'\. Did you mean taylor.*Known: batch_no"):
        importance("tailor")
    with pytest.raises(CalibrationError, match="no importance is called 'base'"):
        importance("base")


@pytest.mark.parametrize("name", NAMES)
@given(group=groups)
@quick
def test_scores_are_finite_and_not_negative(name: str, group: GroupEvidence) -> None:
    before = [w.copy() for w in (*group.producers, group.contributions, group.first_order)]  # type: ignore[union-attr]
    scores = importance(name).score(group)
    assert scores.dtype == np.float64
    assert scores.shape == (group.channels,)
    assert np.isfinite(scores).all()
    assert (scores >= 0).all()
    np.testing.assert_array_equal(scores, importance(name).score(group))
    after = (*group.producers, group.contributions, group.first_order)
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "random"])
@given(group=groups, data=st.data())
@quick
def test_the_order_of_channels_does_not_matter(
    name: str, group: GroupEvidence, data: st.DataObject
) -> None:
    order = np.array(data.draw(st.permutations(range(group.channels))))
    scores = importance(name).score(group)
    other = importance(name).score(rearranged(group, order))
    np.testing.assert_allclose(other, scores[order], rtol=1e-9)


@pytest.mark.parametrize("name", ["l1", "l2", "taylor", "thinet", "batch_norm"])
def test_channels_that_do_nothing_go_first(name: str) -> None:
    at = [1, 4, 6]
    scores = importance(name).score(with_zeros(evidence(8, seed=3), at))
    assert np.flatnonzero(scores == 0).tolist() == at
    assert np.argsort(scores, kind="stable")[:3].tolist() == at


@pytest.mark.parametrize("name", NAMES)
def test_a_group_that_does_nothing_has_scores_all_the_same(name: str) -> None:
    scores = importance(name).score(with_zeros(evidence(5, seed=0), list(range(5))))
    assert np.isfinite(scores).all()
    if name != "random":
        assert (scores == 0).all()


@pytest.mark.parametrize(
    ("name", "field", "words"),
    [
        ("l1", "producers", "producers"),
        ("l2", "producers", "producers"),
        ("geometric_median", "producers", "producers"),
        ("batch_norm", "gammas", "gammas.*l1"),
        ("thinet", "contributions", "contributions.*--calib"),
        ("taylor", "first_order", "first_order.*--calib"),
    ],
)
def test_missing_evidence_is_named(name: str, field: str, words: str) -> None:
    nothing: list[Array] | None = [] if field in ("producers", "gammas") else None
    group = dataclasses.replace(evidence(3, seed=0), **{field: nothing})  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match=words):
        importance(name).score(group)
    assert importance(name).needs == ({field} if field in NEEDS else set())


def test_no_observation_is_no_evidence() -> None:
    group = dataclasses.replace(evidence(3, seed=0), first_order=np.zeros((0, 3)))
    with pytest.raises(CalibrationError, match="first_order"):
        Taylor().score(group)


@given(group=groups)
@quick
def test_norms_are_the_slow_definition(group: GroupEvidence) -> None:
    l1, l2 = L1().score(group), L2().score(group)
    for channel in range(group.channels):
        rows = [[float(x) for x in weights[channel]] for weights in group.producers]
        means = [sum(abs(x) for x in row) / len(row) for row in rows]
        squares = [sum(x * x for x in row) / len(row) for row in rows]
        assert l1[channel] == pytest.approx(sum(means))
        assert l2[channel] == pytest.approx(sum(squares) ** 0.5)


@pytest.mark.parametrize("name", ["l1", "l2"])
def test_a_layer_counts_the_same_whatever_its_fan_in(name: str) -> None:
    group = evidence(6, seed=1)
    wide = dataclasses.replace(group, producers=[np.tile(w, 5) for w in group.producers])
    np.testing.assert_allclose(importance(name).score(wide), importance(name).score(group))


@pytest.mark.parametrize(("name", "power"), [("l1", 1), ("l2", 1), ("geometric_median", 0)])
@pytest.mark.parametrize("factor", [1e-30, 0.5, 1e30])
def test_scores_scale_with_the_weights(name: str, power: int, factor: float) -> None:
    group = evidence(6, seed=2)
    scaled = dataclasses.replace(group, producers=[w * np.float32(factor) for w in group.producers])
    want = importance(name).score(group) * factor**power
    np.testing.assert_allclose(importance(name).score(scaled), want, rtol=1e-5)


def test_evidence_of_samples_scales_in_units_of_the_output() -> None:
    group = evidence(6, seed=2)
    assert group.first_order is not None
    assert group.contributions is not None
    scaled = dataclasses.replace(
        group, first_order=-4 * group.first_order, contributions=16 * group.contributions
    )
    np.testing.assert_allclose(Taylor().score(scaled), 4 * Taylor().score(group))
    np.testing.assert_allclose(Thinet().score(scaled), 16 * Thinet().score(group))


def test_batch_norm_adds_magnitudes() -> None:
    gammas = [np.array([1, -2, 0], np.float32), np.array([-1, 1, 0.5], np.float32)]
    scores = BatchNorm().score(GroupEvidence(channels=3, gammas=gammas))
    np.testing.assert_array_equal(scores, np.array([2, 3, 0.5]))


@given(group=groups)
@quick
def test_geometric_median_is_the_slow_definition(group: GroupEvidence) -> None:
    layers = [w.astype(np.float64) / np.linalg.norm(w.astype(np.float64)) for w in group.producers]
    rows = np.concatenate(layers, axis=1)
    slow = [sum(float(np.linalg.norm(a - b)) for b in rows) for a in rows]
    np.testing.assert_allclose(GeometricMedian().score(group), slow, rtol=1e-9, atol=1e-12)


def test_geometric_median_cuts_the_channel_that_others_replace() -> None:
    weights = np.array([[10, 0], [0, 10], [5, 5], [-10, -10]], np.float32)
    scores = GeometricMedian().score(GroupEvidence(channels=4, producers=[weights]))
    assert np.argmin(scores) == 2


def test_geometric_median_of_equal_channels_is_zero_far_from_the_origin() -> None:
    weights = np.tile(np.random.default_rng(0).standard_normal(300).astype(np.float32), (40, 1))
    group = GroupEvidence(channels=40, producers=[weights + np.float32(1000)])
    assert GeometricMedian().score(group).max() < 1e-12


def test_geometric_median_needs_no_cube_of_memory() -> None:
    channels, parameters = 256, 512
    weights = np.ones((channels, parameters), np.float32)
    tracemalloc.start()
    try:
        GeometricMedian().score(GroupEvidence(channels=channels, producers=[weights]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * (4 * channels * channels + 3 * channels * parameters)


def test_random_depends_on_the_seed_alone() -> None:
    draws = [
        Random().score(dataclasses.replace(evidence(50, seed=n), seed=s))
        for n, s in ((0, 7), (1, 7), (1, 8))
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[1], draws[2])
    assert len(np.unique(draws[2])) == 50


@given(group=groups)
@quick
def test_taylor_is_the_slow_definition(group: GroupEvidence) -> None:
    assert group.first_order is not None
    slow = [
        (sum(float(x) ** 2 for x in column) / len(column)) ** 0.5 for column in group.first_order.T
    ]
    np.testing.assert_allclose(Taylor().score(group), slow)


def slow_thinet(gram: Array) -> tuple[list[int], list[float]]:
    """Algorithm 1 of ThiNet as it is written: try every channel, cut the cheapest."""
    removed: list[int] = []
    errors: list[float] = []
    while len(removed) < len(gram):
        tries = [
            (float(gram[np.ix_([*removed, c], [*removed, c])].sum()), c)
            for c in range(len(gram))
            if c not in removed
        ]
        error, channel = min(tries)
        removed.append(channel)
        errors.append(error)
    return removed, errors


def integer_gram(channels: int, rank: int, seed: int) -> Array:
    """A Gram matrix of small integers: exact, with many ties and channels that cancel."""
    z = np.random.default_rng(seed).integers(-2, 3, (channels, rank)).astype(np.float64)
    return z @ z.T


@given(channels=st.integers(1, 12), rank=st.integers(1, 4), seed=st.integers(0, 9999))
@settings(deadline=None, max_examples=150)
def test_thinet_is_the_greedy_order(channels: int, rank: int, seed: int) -> None:
    gram = integer_gram(channels, rank, seed)
    order, errors = slow_thinet(gram)
    scores = Thinet().score(GroupEvidence(channels=channels, contributions=gram))
    assert np.argsort(scores, kind="stable").tolist() == order
    np.testing.assert_allclose(scores[order], np.maximum.accumulate(errors), rtol=1e-9)
    halves = scores / 3.7  # as a ranker over groups might divide them
    assert np.argsort(halves, kind="stable").tolist() == order


def test_thinet_keeps_the_order_where_the_error_falls() -> None:
    z = np.array([[3, 0], [1, 1], [-3, 0.5]])  # the first and the last nearly cancel
    assert slow_thinet(z @ z.T) == ([1, 2, 0], [2.0, 6.25, 3.25])
    scores = Thinet().score(GroupEvidence(channels=3, contributions=z @ z.T))
    np.testing.assert_allclose(scores, [6.25, 2, 6.25], rtol=1e-9)
    assert scores[1] < scores[2] < scores[0]
