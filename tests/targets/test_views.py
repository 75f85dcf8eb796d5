"""Strided views of values, against NumPy's own."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.targets.lowering.views import View, contiguous, origins
from edgepress.targets.program import Array
from tests.graphs import net
from tests.targets.qdq import shaped


def value(shape: tuple[int, ...]) -> ir.Value:
    kind = ir.TensorType(ir.DataType.FLOAT)
    return ir.Value(name="x", shape=ir.Shape(shape), type=kind)


def shown(view: View, size: int) -> Array:
    """The numbers of the elements that a view shows."""
    flat = np.arange(size)[view.start :]
    strides = [stride * flat.itemsize for stride in view.strides]
    return np.lib.stride_tricks.as_strided(flat, view.shape, strides)


@st.composite
def chains(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[str, tuple[int, ...]]]]:
    """A shape, and transposes, slices, broadcasts and reshapes of it."""
    sizes = st.sampled_from([1, 2, 3, 4, 6])
    shape = tuple(draw(st.lists(sizes, min_size=1, max_size=4)))
    kinds = st.sampled_from(["reshape", "transpose", "slice", "broadcast"])
    steps = []
    for kind in draw(st.lists(kinds, max_size=5)):
        numbers = tuple(draw(st.lists(st.integers(0, 11), min_size=6, max_size=6)))
        steps.append((kind, numbers))
    return shape, steps


def factors(size: int, numbers: tuple[int, ...]) -> tuple[int, ...]:
    """A shape of so many elements."""
    shape = []
    for number in numbers:
        divisors = [d for d in range(1, size + 1) if size % d == 0]
        shape.append(divisors[number % len(divisors)])
        size //= shape[-1]
    return (*shape, size)


@settings(max_examples=300, deadline=None)
@given(chains())
def test_views_show_what_numpy_does(
    chain: tuple[tuple[int, ...], list[tuple[str, tuple[int, ...]]]],
) -> None:
    shape, steps = chain
    size = int(np.prod(shape))
    view, array = View.whole(value(shape)), np.arange(size).reshape(shape)
    for kind, numbers in steps:
        if kind == "reshape":
            wanted = factors(array.size, numbers[:3])
            found = view.reshaped(wanted)
            if found is None:  # only where NumPy has to copy, too
                assert not np.shares_memory(array.reshape(wanted), array)
                return
            view, array = found, array.reshape(wanted)
        elif kind == "transpose":
            order = tuple(int(i) for i in np.argsort(numbers[: array.ndim], kind="stable"))
            if len(order) == array.ndim:
                view, array = view.transposed(order), array.transpose(order)
        elif kind == "slice":
            axis = numbers[0] % array.ndim
            start, step = numbers[1] % array.shape[axis], numbers[2] % 3 + 1
            taken = np.moveaxis(np.moveaxis(array, axis, 0)[start::step], 0, axis)
            view, array = view.sliced(axis, start, step, taken.shape[axis]), taken
        else:
            wanted = (
                numbers[0] % 3 + 1,
                *(n if n > 1 else numbers[1] % 3 + 1 for n in array.shape),
            )
            repeated = view.broadcast(wanted)
            assert repeated is not None
            view, array = repeated, np.broadcast_to(array, wanted)
        np.testing.assert_array_equal(shown(view, size), array)


def test_shapes_that_do_not_agree() -> None:
    view = View.whole(value((2, 3)))
    assert view.broadcast((3,)) is None
    assert view.broadcast((2, 4)) is None
    assert view.reshaped((5,)) is None
    assert view.reshaped((0, 6)) is None
    assert view.is_contiguous
    assert not view.transposed((1, 0)).is_contiguous
    assert View(value((2, 1)), 0, (2, 1), (1, 9)).is_contiguous
    assert contiguous(()) == ()


def test_origins_end_where_a_node_computes() -> None:
    body = """a = Relu(x) b = Transpose <perm=[1,0]> (a) c = Mul(b, k) d = Slice(c, s, e, ax, st)
        y = Unsqueeze(d, zero)"""
    constants: dict[str, Array] = {
        "k": np.array([4], np.float32),
        "s": np.array([-3], np.int64),
        "e": np.array([2**40], np.int64),
        "ax": np.array([-2], np.int64),
        "st": np.array([2], np.int64),
        "zero": np.array([0], np.int64),
    }
    model = shaped(net("(float[2,5] x) => (float[1,2,2] y)", body, constants))
    views = origins(model.graph.outputs[0])
    assert [view.source.name for view in views] == ["y", "d", "c", "b", "a"]
    last = views[-1]
    assert (last.start, last.shape[1:], last.strides[1:], last.scale) == (2, (2, 2), (2, 5), 4)


def test_origins_stop_where_data_decides() -> None:
    bodies = {
        "a = Gather <axis=0> (x, i)": "int64 i",
        "a = Mul(x, f)": "float[2,5] f",
        "a = Mul(x, ones)": "float f",
        "a = Cast <to=7> (x)": "float f",
        "b = Div(two, x) a = Relu(b)": "float f",
    }
    for body, more in bodies.items():
        constants: dict[str, Array] = {
            "two": np.array(2, np.float32),
            "ones": np.ones((1, 1, 1), np.float32),
        }
        constants = {name: array for name, array in constants.items() if name in body}
        model = shaped(net(f"(float[2,5] x, {more}) => (a)", body, constants))
        assert len(origins(model.graph.outputs[0])) == 1
