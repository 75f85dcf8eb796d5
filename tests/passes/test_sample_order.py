from __future__ import annotations

import numpy as np

from edgepress.calibration.base import Samples
from edgepress.passes._sample_order import in_canonical_order
from tests.graphs import random


def test_contents_alone_decide_the_order() -> None:
    x, y = random(9, 3, 4), np.arange(9, dtype=np.int64)
    ordered = in_canonical_order(Samples({"x": x, "y": y}))
    shuffled = np.random.default_rng(0).permutation(9)
    again = in_canonical_order(Samples({"y": y[shuffled], "x": x[shuffled]}))
    np.testing.assert_array_equal(ordered.inputs["x"], again.inputs["x"])
    np.testing.assert_array_equal(ordered.inputs["y"], again.inputs["y"])
    np.testing.assert_array_equal(ordered.inputs["x"], x[ordered.inputs["y"]])
    assert sorted(ordered.inputs["y"]) == list(range(9))
