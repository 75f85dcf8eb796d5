import numpy as np
import pytest

from edgepress.targets.schedules.emit import Kernel, load
from edgepress.targets.schedules.interleave import interleaved, lane_order
from tests.targets.kernels import Case, check, native_isas

KINDS = [(16, 4, "uint8"), (64, 4, "uint8"), (16, 2, "int16"), (32, 2, "int16"), (8, 2, "int16")]


def interleaving(name: str, size: int, group: int, dtype: str) -> object:
    """Interleave the rows of x and store the vectors one after the other."""
    kernel = Kernel(name)
    x = kernel.argument("x", dtype, size * group)
    y = kernel.argument("y", dtype, size * group)
    rows = [kernel.let("row", load(x, size * row, size)) for row in range(group)]
    vectors = interleaved(kernel, rows, size, np.dtype(dtype).itemsize)
    for index, vector in enumerate(vectors):
        kernel.store(y, index * size, vector, size)
    return kernel.finish()


@pytest.mark.parametrize(("size", "group", "dtype"), KINDS)
def test_lanes_hold_one_element_of_every_row(size: int, group: int, dtype: str) -> None:
    x = np.arange(size * group).reshape(group, size).astype(dtype)
    order = lane_order(size, group, np.dtype(dtype).itemsize)
    assert sorted(order) == list(range(size))
    wanted = x[:, order].T.copy()
    case = Case(lambda name: interleaving(name, size, group, dtype), (x,), wanted, "interleaved")
    check([case], native_isas()[-1])


def test_order_of_128_bits_is_that_of_memory() -> None:
    np.testing.assert_array_equal(lane_order(16, 4, 1), np.arange(16))
    np.testing.assert_array_equal(lane_order(8, 2, 2), np.arange(8))


def test_order_of_wider_vectors_stays_within_128_bits() -> None:
    order = lane_order(32, 4, 1)
    np.testing.assert_array_equal(order[:8], [0, 1, 2, 3, 16, 17, 18, 19])
