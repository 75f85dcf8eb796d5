from __future__ import annotations

import itertools

import numpy as np
import pytest

from edgepress.passes import _gradient_axes
from edgepress.passes._gradient_rules import GRADIENTS
from edgepress.passes._gradients import open_gradients
from edgepress.passes.base import PassRefused
from tests.graphs import Array
from tests.passes.finite_differences import Case, case, check, ints, spaced

REDUCTIONS = ("ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum")


def reduction(operator: str, attributes: str, axes: Array | None, *, opset: int = 18) -> Case:
    """Reduce an input of three axes, which come as an input."""
    constants = {} if axes is None else {"axes": axes}
    body = f"y = {operator} <{attributes}> (x{', axes' if constants else ''})"
    return case(body, constants, opset=opset, x=spaced(2, 3, 4))


def sliced(*numbers: Array) -> Case:
    names = ["starts", "ends", "axes", "steps"][: len(numbers)]
    constants = dict(zip(names, numbers, strict=True))
    return case(f"y = Slice (x, {', '.join(names)})", constants, x=spaced(5, 6))


def padded(attributes: str, *pads: int, opset: int = 18) -> Case:
    body = f"y = Pad {attributes} (x, pads)"
    return case(body, {"pads": ints(*pads)}, opset=opset, x=spaced(3, 4))


def sized(attributes: str, *sizes: int) -> Case:
    """Resize an image to these extents."""
    return case(f"y = Resize {attributes} (x, , , to)", {"to": ints(*sizes)}, x=spaced(1, 2, 4, 5))


def scaled(attributes: str, *scales: float) -> Case:
    """Resize an image by these factors."""
    factors = np.array(scales, np.float32)
    return case(f"y = Resize {attributes} (x, , by)", {"by": factors}, x=spaced(1, 2, 4, 5))


REDUCED = [
    *(
        reduction(operator, f"keepdims={keep}", axes)
        for operator in REDUCTIONS
        if operator != "ReduceSum"
        for keep in (0, 1)
        for axes in (ints(1), ints(-1, 0), None)
    ),
    *(reduction("ReduceSum", f"keepdims={k}", a) for k in (0, 1) for a in (ints(1), ints(-1, 0))),
    reduction("ReduceSum", "keepdims=0", None),
    # up to opset 17, all but ReduceSum took axes as an attribute
    *(
        reduction(operator, f"axes={axes}, keepdims={keep}", None, opset=13)
        for operator in REDUCTIONS
        if operator != "ReduceSum"
        for keep, axes in ((0, [1]), (1, [-1, 0]))
    ),
    *(reduction(operator, "noop_with_empty_axes=1", None) for operator in REDUCTIONS),
    *(reduction(operator, "noop_with_empty_axes=1", ints(-2)) for operator in REDUCTIONS),
    *(
        case(f"y = {operator} (x)", x=spaced(2, 3, *extents))
        for operator in ("GlobalAveragePool", "GlobalMaxPool")
        for extents in ((5,), (3, 2), (2, 2, 2))
    ),
]
SHAPED = [
    case("y = Expand(x, shape)", {"shape": ints(2, 3, 4)}, x=spaced(3, 1)),
    case("y = Expand(x, shape)", {"shape": ints(1, 3)}, x=spaced(2, 2, 1)),
    *(case(f"y = Flatten <axis={axis}> (x)", x=spaced(2, 3, 4)) for axis in (0, 1, -1)),
    case("y = Reshape(x, shape)", {"shape": ints(0, -1, 2)}, x=spaced(2, 3, 4)),
    case("y = Squeeze(x, axes)", {"axes": ints(0, -2)}, x=spaced(1, 3, 1, 2)),
    case("y = Squeeze(x)", x=spaced(1, 3, 1, 2)),
    case("y = Unsqueeze(x, axes)", {"axes": ints(0, -1)}, x=spaced(3, 2)),
    case("y = Transpose(x)", x=spaced(2, 3, 4)),
    case("y = Transpose <perm=[2,0,1]> (x)", x=spaced(2, 3, 4)),
    case("y = Transpose <perm=[0,3,1,2]> (x)", x=spaced(2, 2, 3, 4)),
    *(
        case(f'y = DepthToSpace <blocksize=2, mode="{mode}"> (x)', x=spaced(2, 8, 2, 3))
        for mode in ("DCR", "CRD")
    ),
    case("y = DepthToSpace <blocksize=2> (x)", x=spaced(1, 8, 2, 3)),
    case("y = SpaceToDepth <blocksize=2> (x)", x=spaced(2, 3, 4, 2)),
]
MOVED = [
    *(
        case(f"y = Concat <axis={axis}> (a, b, a)", a=spaced(2, 3, 2), b=spaced(2, 3, 2, seed=1))
        for axis in (0, 1, -1)
    ),
    case("y = Concat <axis=1> (a, b)", a=spaced(2, 3), b=spaced(2, 1, seed=1)),
    case("y, z = Split <axis=1> (x, sizes)", {"sizes": ints(1, 3)}, x=spaced(2, 4)),
    case("z, y = Split <axis=-1> (x, sizes)", {"sizes": ints(1, 3)}, x=spaced(2, 4)),
    case("z, y, w = Split <num_outputs=3> (x)", x=spaced(5, 2)),
    case("z, y = Split(x)", opset=13, x=spaced(4, 2)),
    *(
        case(f"y = Gather <axis={axis}> (x, places)", {"places": places}, x=spaced(3, 4, 3))
        for axis in (0, 1, -1)
        for places in (ints(2, 0, 2, -1), np.array(-2), ints(1, -3, 0, 0).reshape(2, 2))
    ),
    case("y = Gather(x, places)", {"places": np.array([1, 1], np.int32)}, x=spaced(3, 2)),
    sliced(ints(1), ints(4)),
    sliced(ints(0, 1), ints(5, 100), ints(0, 1), ints(2, 3)),
    sliced(ints(-1), ints(-100), ints(-1), ints(-2)),
    sliced(ints(4, -2), ints(0, -6), ints(0, 1), ints(-1, -3)),
    sliced(ints(1), ints(2**62), ints(-2)),
    sliced(*(ints(number).astype(np.int32) for number in (1, 4, 1, 2))),
    # a start below 0 is 0, also where steps go down
    sliced(ints(-100), ints(-100), ints(1), ints(-1)),
    case("y = Tile(x, repeats)", {"repeats": ints(2, 1, 3)}, x=spaced(2, 3, 2)),
    padded("", 1, 0, 2, 3),
    padded("", 0, -1, 1, -2),
    padded('<mode="reflect">', 1, 2, 2, 3),
    padded('<mode="edge">', 3, 0, 1, 2),
    padded('<mode="wrap">', 1, 2, 0, 5, opset=19),
    case("y = Pad(x, pads, seven)", {"pads": ints(1, 0, -1, 2), "seven": np.array(7.0)},
         x=spaced(3, 4)),
    *(
        case(
            f'y = Pad <mode="{mode}"> (x, pads, , axes)',
            {"pads": ints(1, 2), "axes": ints(-1)},
            x=spaced(2, 3, 4),
        )
        for mode in ("constant", "reflect")
    ),
]  # fmt: skip
GRIDS = ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
RESIZED = [
    scaled("", 1.0, 1.0, 2.0, 2.0),
    scaled("", 1.0, 2.0, 1.0, 0.5),
    sized("", 1, 2, 8, 5),
    *(
        sized(f'<coordinate_transformation_mode="{grid}", nearest_mode="{rounding}">', *sizes)
        for grid, rounding in itertools.product(GRIDS, ROUNDINGS)
        for sizes in ((1, 2, 8, 15), (1, 2, 3, 7))
    ),
    *(
        sized(f'<mode="{mode}", coordinate_transformation_mode="{grid}">', *sizes)
        for mode, grid in itertools.product(("linear", "cubic"), GRIDS)
        for sizes in ((1, 2, 8, 7), (1, 2, 3, 9))
    ),
    *(
        scaled(f'<mode="{mode}", coordinate_transformation_mode="{grid}">', 1, 1, 1.7, 0.6)
        for mode, grid in itertools.product(("linear", "cubic"), (*GRIDS, "half_pixel_symmetric"))
    ),
    sized('<mode="linear", antialias=1>', 1, 2, 2, 3),
    sized('<mode="cubic", cubic_coeff_a=-0.5, exclude_outside=1>', 1, 2, 6, 3),
    # 3 · 7/3 is below 7 in float32: sizes are not scales
    case("y = Resize (x, , , to)", {"to": ints(7)}, x=spaced(3)),
    # 4 · 1.2 is rounded down to 4, and yet it moves
    scaled('<mode="linear">', 1, 1, 1.2, 1),
    case('y = Resize <mode="linear", axes=[-1, 0]> (x, , by)',
         {"by": np.array([2.0, 1.5], np.float32)}, x=spaced(4, 3)),
    case('y = Resize <mode="linear", axes=[0]> (x, , by)', {"by": np.array([1.5], np.float32)},
         x=spaced(4, 3)),
    case("y = Resize <axes=[1]> (x, , , to)", {"to": ints(7)}, x=spaced(4, 3)),
    # before opset 18, scales that are left out may be an empty tensor
    case('y = Resize <mode="linear"> (x, none, none, to)',
         {"none": np.zeros(0, np.float32), "to": ints(1, 1, 5, 3)}, opset=13, x=spaced(1, 1, 3, 4)),
]  # fmt: skip
CASES = [*REDUCED, *SHAPED, *MOVED, *RESIZED]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_gradient_is_the_limit_of_differences(case: Case) -> None:
    check(case)


def test_every_rule_of_this_file_has_a_case() -> None:
    rules = {op for op, r in GRADIENTS.items() if r.__module__ == _gradient_axes.__name__}
    assert {case.operator for case in CASES} == rules


def test_equal_maxima_of_a_reduction_share_the_gradient() -> None:
    body = "y = ReduceMax <keepdims=0> (x, axes)"
    model = case(body, {"axes": ints(1)}, x=np.zeros((2, 3))).model()
    feed = {"x": np.array([[1.0, 4, 4], [2, 2, 2]])}
    found = open_gradients("test", model, list(model.graph.inputs))(feed, {"y": np.array([6.0, 3])})
    np.testing.assert_array_equal(found["x"][1], [[0, 3, 3], [1, 1, 1]])


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (
            case(
                'y = Resize <mode="linear", coordinate_transformation_mode="tf_crop_and_resize"> '
                "(x, part, , to)",
                {"part": np.array([0, 0, 0.5, 1], np.float32), "to": ints(4, 4)},
                x=spaced(3, 3),
            ),
            "it crops",
        ),
        (sized('<keep_aspect_ratio_policy="not_larger">', 1, 2, 8, 9), "it keeps the aspect ratio"),
    ],
)
def test_what_is_not_known_is_refused(made: Case, why: str) -> None:
    model = made.model()
    with pytest.raises(PassRefused, match=f"gradient of {made.operator} is not known .*{why}"):
        open_gradients("test", model, list(model.graph.inputs))
