import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.calibration.base import Samples
from edgepress.pipeline.feeds import input_shapes, random_samples, spread
from edgepress.pipeline.oracle import Oracle
from tests.graphs import net, random


def test_floats_are_normal_and_repeat() -> None:
    model = net("(float[1,3,4] x) => (float[1,3,4] y)", "y = Relu(x)")
    samples = random_samples(model, 50)
    assert samples.inputs["x"].shape == (50, 3, 4)
    assert samples.inputs["x"].dtype == np.float32
    assert abs(samples.inputs["x"].std() - 1) < 0.1
    assert samples.sha256() == random_samples(model, 50).sha256()
    assert samples.sha256() != random_samples(model, 50, seed=1).sha256()


def test_a_first_axis_that_is_no_batch_is_kept() -> None:
    model = net("(float[3,4] x) => (float[3,4] y)", "y = Relu(x)")
    samples = random_samples(model, 2)
    assert samples.inputs["x"].shape == (2, 3, 4)
    assert next(samples.feeds(input_shapes(model) or {}))["x"].shape == (3, 4)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 9), st.integers(3, 40), st.booleans())
def test_indices_are_valid(seed: int, rows: int, cast: bool) -> None:
    model = net(
        "(int64[1,5] ids, int64[1,5] mask) => (float[1,5,2] y)",
        f"i = {'Cast<to=6>' if cast else 'Identity'}(ids)\n e = Gather(table, i)\n"
        "m = Unsqueeze(mask, axes)\n f = Cast<to=1>(m)\n y = Mul(e, f)",
        {"table": random(rows, 2), "axes": np.array([2])},
    )
    samples = random_samples(model, 8, seed)
    assert 0 <= samples.inputs["ids"].min() <= samples.inputs["ids"].max() < rows
    assert set(np.unique(samples.inputs["mask"])) <= {0, 1}
    oracle = Oracle(model)
    for feed in samples.feeds(input_shapes(model) or {}):
        assert oracle.run(feed)["y"].shape == (1, 5, 2)


def test_pixels_take_their_whole_range() -> None:
    model = net("(uint8[1,64] x) => (float[1,64] y)", "y = Cast<to=1>(x)")
    pixels = random_samples(model, 20).inputs["x"]
    assert (pixels.min(), pixels.max()) == (0, 255)


def test_open_shapes_are_none() -> None:
    assert input_shapes(net("(float[N,4] x) => (float[N,4] y)", "y = Relu(x)")) is None


def test_weights_among_the_inputs_are_no_inputs() -> None:
    model = net("(float[1,4] x, float[4] w) => (float[1,4] y)", "y = Add(x, w)", {"w": random(4)})
    assert input_shapes(model) == {"x": (1, 4)}


def test_samples_are_spread_evenly_over_all() -> None:
    samples = Samples({"x": np.arange(10), "z": np.arange(20).reshape(10, 2)}, np.arange(10) + 5)
    some = spread(samples, 4)
    np.testing.assert_array_equal(some.inputs["x"], [0, 2, 5, 7])
    np.testing.assert_array_equal(some.inputs["z"], samples.inputs["z"][[0, 2, 5, 7]])
    assert some.labels is not None
    np.testing.assert_array_equal(some.labels, [5, 7, 10, 12])
    assert spread(samples, 10) is samples
