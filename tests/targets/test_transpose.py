from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from edgepress.targets.isa.base import load_isa
from edgepress.targets.schedules.transpose import transpose
from tests.targets.kernels import Case, check, native_isas

SIZES = st.sampled_from([1, 2, 3, 4, 5, 7, 15, 16, 17, 31, 32, 33, 50])
DTYPES = st.sampled_from(["uint8", "int8", "float32", "int32", "int64", "bool"])


def case(batch: int, rows: int, columns: int, dtype: str, isa: str) -> Case:
    values: Any = np.random.default_rng(rows).integers(-100, 100, (batch, rows, columns))
    x = (values > 0) if dtype == "bool" else values.astype(dtype)
    return Case(
        lambda name: transpose(name, batch, rows, columns, dtype, load_isa(isa)),
        (x,),
        np.ascontiguousarray(x.transpose(0, 2, 1)),
        f"{batch} x {rows} x {columns} {dtype}",
    )


@pytest.mark.parametrize("isa_name", native_isas())
@settings(max_examples=4, deadline=None, derandomize=True, phases=[Phase.generate])
@given(drawn=st.lists(st.tuples(st.integers(1, 3), SIZES, SIZES, DTYPES), min_size=10, max_size=10))
def test_drawn_shapes(isa_name: str, drawn: list[tuple[int, int, int, str]]) -> None:
    check([case(*each, isa_name) for each in drawn], isa_name)


@pytest.mark.parametrize("isa_name", native_isas())
def test_threads_share_the_work(isa_name: str) -> None:
    check([case(1, 600, 500, "uint8", isa_name), case(2, 3, 70000, "float32", isa_name)], isa_name)
