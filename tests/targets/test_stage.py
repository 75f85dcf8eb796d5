import math

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from edgepress.targets.isa.base import load_isa
from edgepress.targets.schedules.stage import StageShape
from tests.targets.kernels import check, native_isas, stage_case

KINDS = [
    ("uint8", "uint8", 0.0),
    ("uint8", "int16", 255.0),
    ("int8", "int16", -128.0),
    ("int8", "int8", 127.0),
    ("float32", "float32", 0.0),
    ("float32", "float32", -math.inf),
]


@st.composite
def any_shape(draw: st.DrawFn) -> StageShape:
    height, width = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    channels = draw(st.integers(1, 35))
    top, left = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    return StageShape(
        batch=draw(st.integers(1, 2)),
        height=height,
        width=width,
        channels=channels,
        top=top,
        left=left,
        out_height=draw(st.integers(1, top + height + 3)),
        out_width=draw(st.integers(1, left + width + 3)),
        out_channels=channels + draw(st.integers(0, 3)),
        groups=draw(st.integers(1, 3)),
    )


@pytest.mark.parametrize("isa_name", native_isas())
@settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate])
@given(drawn=st.lists(st.tuples(any_shape(), st.sampled_from(KINDS)), min_size=10, max_size=10))
def test_drawn_shapes(
    isa_name: str, drawn: list[tuple[StageShape, tuple[str, str, float]]]
) -> None:
    isa = load_isa(isa_name)
    check(
        [
            stage_case(shape, isa, (kind[0], kind[1]), kind[2], seed=seed)
            for seed, (shape, kind) in enumerate(drawn)
        ],
        isa_name,
    )


@pytest.mark.parametrize("isa_name", native_isas())
def test_borders(isa_name: str) -> None:
    isa = load_isa(isa_name)
    shapes = [
        StageShape(1, 1, 1, 1, 0, 0, 1, 1, 1),
        StageShape(2, 5, 7, 3, 1, 2, 8, 12, 4),  # channels that are not there
        StageShape(1, 5, 7, 8, 1, 1, 4, 5, 8),  # the last rows and columns are not read
        StageShape(1, 3, 1, 2, 0, 2, 3, 1, 2),  # windows end before the image starts
        StageShape(1, 1, 3, 2, 2, 0, 1, 3, 2),
        StageShape(1, 2, 2, 33, 3, 3, 9, 8, 36, 2),
        StageShape(1, 1, 1, 400, 0, 0, 1, 1, 400),
    ]
    check(
        [stage_case(shape, isa, (a, b), fill) for shape in shapes for a, b, fill in KINDS[1:]],
        isa_name,
    )


@pytest.mark.parametrize("isa_name", native_isas()[:1])
def test_threads_share_the_work(isa_name: str) -> None:
    shape = StageShape(1, 60, 60, 40, 1, 2, 63, 65, 40)
    check([stage_case(shape, load_isa(isa_name), ("uint8", "int16"), 7.0)], isa_name)
