"""Values as strided views of other values: what reshapes, transposes and slices come to.

A kernel that takes strides can read what a chain of such nodes would copy, from where it was
computed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from edgepress.targets.lowering.dialect import array_of, dtype_of, shape_of

_RESHAPES = ("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class View:
    """Elements of a value in another order, perhaps scaled.

    Attributes:
        source: the value.
        start: index of the first element.
        shape: of the view.
        strides: how many elements of the source neighbours along each axis are apart.
        scale: factor of all elements.
    """

    source: ir.Value
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    scale: float = 1.0

    @classmethod
    def whole(cls, source: ir.Value) -> View:
        """See a value as it is."""
        shape = shape_of(source)
        return cls(source, 0, shape, contiguous(shape))

    @property
    def is_contiguous(self) -> bool:
        """Tell whether elements lie in the order of the view, without gaps."""
        pairs = zip(self.shape, self.strides, contiguous(self.shape), strict=True)
        return all(stride == wanted for size, stride, wanted in pairs if size > 1)

    def adjacent(self, axis: int) -> bool:
        """Tell whether neighbours along an axis are neighbours in memory."""
        return self.strides[axis] == 1 or self.shape[axis] == 1

    def transposed(self, order: tuple[int, ...]) -> View:
        """Permute the axes."""
        shape, strides = (tuple(axes[i] for i in order) for axes in (self.shape, self.strides))
        return replace(self, shape=shape, strides=strides)

    def sliced(self, axis: int, start: int, step: int, size: int) -> View:
        """Take every `step`-th index of an axis from `start` on."""
        axis %= len(self.shape)
        first = self.start + start * self.strides[axis]
        strides = _with(self.strides, axis, self.strides[axis] * step)
        return replace(self, start=first, shape=_with(self.shape, axis, size), strides=strides)

    def broadcast(self, shape: tuple[int, ...]) -> View | None:
        """Repeat along axes as NumPy does; None where the shapes do not agree."""
        missing = len(shape) - len(self.shape)
        if missing < 0:
            return None
        given, strides = (1,) * missing + self.shape, (0,) * missing + self.strides
        if any(size not in (1, wanted) for size, wanted in zip(given, shape, strict=True)):
            return None
        repeated = tuple(0 if g == 1 else s for g, s in zip(given, strides, strict=True))
        return replace(self, shape=shape, strides=repeated)

    def reshaped(self, shape: tuple[int, ...]) -> View | None:
        """See the same elements in another shape; None where that takes a copy.

        Axes are matched in groups of equal size. Those of a group that are split or joined must
        follow each other in memory.
        """
        if math.prod(shape) != math.prod(self.shape) or 0 in shape:
            return None
        old = [(n, s) for n, s in zip(self.shape, self.strides, strict=True) if n > 1]
        strides = [0] * len(shape)
        new = [axis for axis, size in enumerate(shape) if size > 1]
        while new:
            group, axes = [old.pop(0)], [new.pop(0)]
            while (here := math.prod(n for n, _ in group)) != (
                there := math.prod(shape[axis] for axis in axes)
            ):
                if here < there:
                    group.append(old.pop(0))
                else:
                    axes.append(new.pop(0))
            if any(a[1] != b[0] * b[1] for a, b in itertools.pairwise(group)):
                return None
            stride = group[-1][1]
            for axis in reversed(axes):
                strides[axis] = stride
                stride *= shape[axis]
        return replace(self, shape=shape, strides=tuple(strides))


Step = Callable[[View], View | None]


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a row-major tensor.

    >>> contiguous((2, 3, 4))
    (12, 4, 1)
    """
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _with(values: tuple[int, ...], index: int, value: int) -> tuple[int, ...]:
    return (*values[:index], value, *values[index + 1 :])


def place_of(view: View, row: int, column: int) -> tuple[int, ...]:
    """Return where a view starts, and its strides by batch, head, and two other axes."""
    apart = (1 if view.shape[axis] == 1 else view.strides[axis] for axis in (row, column))
    return (view.start, *view.strides[:2], *apart)


def is_float(value: ir.Value) -> bool:
    """Tell whether a value is float32 and has a static shape."""
    known = value.shape is not None and value.shape.is_static() and value.dtype is not None
    return known and dtype_of(value) == "float32"


def origins(value: ir.Value) -> list[View]:
    """Return all views that show a value, of itself first, then of what it was made from."""
    found, steps = [View.whole(value)], list[Step]()
    while (node := value.producer()) is not None:
        step, source = step_of(value), node.inputs[0] if node.inputs else None
        if node.op_type == "Mul" and array_of(source) is not None:
            source = node.inputs[1]
        if step is None or source is None or source.shape is None:
            break
        steps.append(step)
        view: View | None = View.whole(source)
        for step in reversed(steps):
            view = None if view is None else step(view)
        if view is None:
            break
        found.append(view)
        value = source
    return found


def step_of(value: ir.Value) -> Step | None:
    """Return what turns a view of a node's operand into one of `value`; None where nothing does."""
    node = value.producer()
    if node is None or node.domain not in ("", "ai.onnx") or value.shape is None:
        return None
    if node.op_type in _RESHAPES:
        shape = shape_of(value)
        return lambda view: view.reshaped(shape)
    make = _STEPS.get(node.op_type)
    return None if make is None else make(node, value)


def _cast(node: ir.Node, value: ir.Value) -> Step | None:
    source = node.inputs[0]
    same = source is not None and source.dtype is not None and dtype_of(source) == dtype_of(value)
    return (lambda view: view) if same else None


def _transpose(node: ir.Node, value: ir.Value) -> Step | None:
    rank = len(shape_of(value))
    order = tuple(node.attributes.get_ints("perm", range(rank)[::-1]))
    return lambda view: view.transposed(order)


def _expand(_node: ir.Node, value: ir.Value) -> Step | None:
    shape = shape_of(value)
    return lambda view: view.broadcast(shape)


def _split(node: ir.Node, value: ir.Value) -> Step | None:
    axis, shape = node.attributes.get_int("axis", 0), shape_of(value)
    before = node.outputs[: node.outputs.index(value)]
    start = sum(shape_of(other)[axis] for other in before)
    return lambda view: view.sliced(axis, start, 1, shape[axis])


def _gather(node: ir.Node, value: ir.Value) -> Step | None:
    """Take one index of an axis, which vanishes."""
    axis, index, shape = node.attributes.get_int("axis", 0), array_of(node.inputs[1]), None
    if index is None or index.ndim:
        return None
    shape, place = shape_of(value), int(index)

    def step(view: View) -> View | None:
        start = place % view.shape[axis]
        return view.sliced(axis, start, 1, 1).reshaped(shape)

    return step


def _slice(node: ir.Node, value: ir.Value) -> Step | None:
    shape = shape_of(value)
    source = node.inputs[0]
    arrays = [array_of(given) for given in node.inputs[1:]]
    if source is None or source.shape is None or any(array is None for array in arrays):
        return None
    given = shape_of(source)
    lists = [array.ravel().tolist() for array in arrays if array is not None]
    starts = lists[0]
    axes = lists[2] if len(lists) > 2 else list(range(len(starts)))
    steps = lists[3] if len(lists) > 3 else [1] * len(starts)
    if any(step < 0 for step in steps):
        return None

    def slice_all(view: View) -> View | None:
        for start, axis, step in zip(starts, axes, steps, strict=True):
            size = given[axis]
            first = min(max(start + size if start < 0 else start, 0), size)
            view = view.sliced(axis, first, step, shape[axis])
        return view

    return slice_all


def _scale(node: ir.Node, value: ir.Value) -> Step | None:
    """Multiply all elements by one constant."""
    factor = scale_of(node)
    if factor is None or not any(
        operand is not None and operand.shape == value.shape for operand in node.inputs
    ):
        return None
    return lambda view: replace(view, scale=view.scale * factor)


def scale_of(node: ir.Node) -> float | None:
    """Return the one constant that a Mul or Div multiplies a value by; None for other nodes."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in ("Mul", "Div"):
        return None
    arrays = [array_of(value) for value in node.inputs]
    if node.op_type == "Mul" and arrays[1] is None:
        arrays.reverse()
    first, constant = arrays
    if first is not None or constant is None or constant.size != 1:
        return None
    factor = float(constant.ravel()[0])
    if node.op_type == "Div":
        factor = 1 / factor if factor else math.nan
    return factor if np.isfinite(np.float32(factor)) and factor != 0 else None


_STEPS: dict[str, Callable[[ir.Node, ir.Value], Step | None]] = {
    "Cast": _cast,
    "Div": _scale,
    "Expand": _expand,
    "Gather": _gather,
    "Mul": _scale,
    "Slice": _slice,
    "Split": _split,
    "Transpose": _transpose,
}
