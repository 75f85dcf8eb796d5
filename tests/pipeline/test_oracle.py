import numpy as np
import pytest

from edgepress.calibration.base import Array
from edgepress.pipeline.oracle import MAX_SQNR_DB, WORST_ERROR, Oracle, relative_error, sqnr_db
from tests.graphs import net, random


def of(*values: object) -> list[dict[str, Array]]:
    return [{"y": np.asarray(value)} for value in values]


def test_the_oracle_computes_what_the_graph_says() -> None:
    model = net("(float[1,4] x) => (float[1,3] y)", "y = MatMul(x, w)", {"w": random(4, 3)})
    x = random(1, 4)
    np.testing.assert_allclose(Oracle(model).run({"x": x})["y"], x @ random(4, 3), rtol=1e-5)


def test_errors_are_shares_of_the_range_of_all_samples() -> None:
    expected, got = of([0.0, 1.0], [4.0, 2.0]), of([0.0, 1.0], [4.0, 2.2])
    assert relative_error(expected, got) == pytest.approx(0.2 / 4)
    assert relative_error(expected, expected) == 0


def test_the_range_includes_zero() -> None:
    assert relative_error(of([1000.0]), of([1000.1])) == pytest.approx(1e-4)


def test_whole_numbers_count_by_elements() -> None:
    assert relative_error(of([1, 2, 3, 4]), of([1, 2, 3, 9])) == 0.25


@pytest.mark.parametrize("got", [[np.nan, 1.0], [np.inf, 1.0], [1.0], [1.0, -np.inf]])
def test_what_cannot_be_compared_is_the_worst(got: list[float]) -> None:
    assert relative_error(of([0.0, 1.0]), of(got)) == WORST_ERROR


def test_nan_and_infinity_equal_themselves() -> None:
    assert relative_error(of([np.nan, np.inf, 1.0]), of([np.nan, np.inf, 1.0])) == 0


def test_outputs_pair_by_position() -> None:
    assert relative_error([{"a": np.ones(2)}], [{"b": np.ones(2)}]) == 0
    with pytest.raises(ValueError, match="zip"):
        relative_error([{"a": np.ones(2)}], [{"b": np.ones(2), "c": np.ones(2)}])


def test_sqnr() -> None:
    signal = np.array([3.0, 4.0], np.float32)
    assert sqnr_db(of(signal), of(signal + np.array([0.5, 0], np.float32))) == pytest.approx(20.0)
    assert sqnr_db(of(signal), of(signal)) == MAX_SQNR_DB
    assert sqnr_db(of(signal), of([np.nan, 1.0])) == -MAX_SQNR_DB
