import numpy as np
import pytest
from tvm import tirx

from edgepress.targets.schedules.emit import Kernel, load
from edgepress.targets.schedules.pointers import chosen
from tests.targets.kernels import Case, check, native_isas


def moved_rows(name: str, shift: int, parallel: bool) -> object:
    """Copy ten rows of 16 bytes, shifted down, with a border row where there is none."""
    kernel = Kernel(name)
    x, border = kernel.argument("x", "uint8", 160), kernel.argument("border", "uint8", 16)
    y = kernel.argument("y", "uint8", 160)
    with kernel.loop("line", 10, parallel=parallel) as line:
        row = line - shift
        inside = tirx.all(row >= 0, row < 10)
        start = chosen(kernel, inside, (x, row * 16), (border, 0), 16)
        kernel.store(y, line * 16, load(start, 0, 16), 16)
    return kernel.finish()


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("shift", [3, -2, 11])
def test_rows_beyond_an_image_are_the_border(shift: int, parallel: bool) -> None:
    random = np.random.default_rng(0)
    x = random.integers(0, 200, (10, 16)).astype(np.uint8)
    border = np.full(16, 255, np.uint8)
    wanted = np.stack([x[line - shift] if 0 <= line - shift < 10 else border for line in range(10)])
    case = Case(lambda name: moved_rows(name, shift, parallel), (x, border), wanted, "rows")
    check([case], native_isas()[0])
