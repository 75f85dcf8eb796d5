from __future__ import annotations

import numpy as np
import pytest

from edgepress.calibration.base import Range
from edgepress.passes._best_ranges import _histogram, best_ranges, choose_range
from edgepress.passes.base import Context
from tests.graphs import random
from tests.passes.int8_nets import made, quantized, samples_of, small_cnn, sqnr_db


def chosen(samples: list[np.ndarray], *, symmetric: bool = False) -> Range:
    extremes = np.array([[min(s.min(), 0.0), max(s.max(), 0.0)] for s in samples])
    low, high = float(extremes[:, 0].min()), float(extremes[:, 1].max())
    counts = np.stack([_histogram(s, low, high) for s in samples])
    return choose_range(extremes, counts, symmetric=symmetric)


def test_samples_that_differ_in_size_get_room() -> None:
    samples = [random(1000) * np.float32(size) for size in (1, 1, 1.2, 1.4, 1.7, 2)]
    high = max(float(s.max()) for s in samples)
    assert chosen(samples).high > high
    assert chosen([random(1000, seed=i) for i in range(6)]).high < high


def test_what_a_rectifier_piles_up_at_its_bound_is_kept_exact() -> None:
    samples = [np.clip(random(1000, seed=i) * 6, 0, 6) for i in range(5)]
    assert chosen(samples) == Range(0.0, 6.0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_one_sided_and_empty_ranges_stay_so(symmetric: bool) -> None:
    positive = [np.abs(random(100, seed=i)) for i in range(4)]
    assert chosen(positive, symmetric=symmetric).low == 0.0
    negative = chosen([-values for values in positive], symmetric=symmetric)
    assert negative.high == 0.0
    assert negative.low < 0.0
    assert chosen([np.zeros(5, np.float32)] * 3, symmetric=symmetric) == Range(0.0, 0.0)
    assert chosen(positive[:1], symmetric=symmetric).high > 0.0


def test_tensors_are_chosen_for_one_by_one() -> None:
    model = made("(float[1,4,6,6] x) => (float[1,4,6,6] y)", "y = Relu(x)")
    values = [model.graph.inputs[0], model.graph.outputs[0]]
    samples = samples_of(model)
    found = best_ranges("test", model, values, samples, Context(), symmetric=False)
    assert found[values[1]].low == 0.0 > found[values[0]].low
    expected = chosen(list(samples.inputs["x"]))
    assert found[values[0]].low == pytest.approx(expected.low)
    assert found[values[0]].high == pytest.approx(expected.high)


def test_the_best_ranges_need_no_calibration_and_quantize_well() -> None:
    before = small_cnn()
    plain, best = before.clone(), before.clone()
    quantized(plain)
    quantized(best, method="best")
    assert sqnr_db(before, best) > sqnr_db(before, plain) - 3
