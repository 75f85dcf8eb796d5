"""Shapes and dtypes of every value, inferred anew: never stale, never failing silently."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from edgepress.passes.base import PassRefused

# onnx 1.23 infers nothing for these, or fails; their first output is like their first input.
_LIKE_INPUT = ("GroupNormalization", "MeanVarianceNormalization")
# Tensors above this size steer no shape, so inference does without their bytes.
_SMALL_BYTES = 4096


def refresh_shapes(model: ir.Model, pass_name: str = "shapes", *, static: bool = False) -> bool:
    """Infer shape and dtype of every value from the graph's inputs and initializers.

    Returns whether any of them is another than before.

    What was known about inner values and outputs before is forgotten, so an edited weight or
    attribute cannot leave a stale shape behind. `pass_name` is the pass to blame in errors.

    Raises PassRefused where inference contradicts itself, where an output's dtype changed, and,
    with `static`, where a value that is read has no dtype or fixed shape; it then names them all.
    """
    graph = model.graph
    declared = {value.name: (value.dtype, value.shape) for value in graph.outputs}
    for value in graph.initializers.values():
        if value.const_value is not None:
            value.shape = ir.Shape(value.const_value.shape.numpy())
            value.dtype = value.const_value.dtype
    inner = [value for node in graph for value in node.outputs]
    before = [(value.shape, value.type) for value in inner]
    for value in inner:
        value.shape, value.type = None, None
    inferred = _infer(model, pass_name)
    for value in inner:
        found = inferred.get(value.name or "")
        if found is not None:
            value.shape, value.type = found.shape, found.type
    for value in graph.outputs:
        dtype, shape = declared[value.name]
        if value.dtype is None and dtype is not None:
            value.dtype = dtype
        if value.shape is None and shape is not None:
            # ONNX wants a shape for every output; of the declared one, only the rank is safe.
            value.shape = ir.Shape([None] * len(shape))
        if dtype is not None and value.dtype is not None and value.dtype != dtype:
            raise PassRefused(
                pass_name,
                f"output {value.name}",
                f"it was declared {dtype} and computes {value.dtype}; outputs keep their dtype",
            )
    if static:
        demand_static(model, pass_name)
    return before != [(value.shape, value.type) for value in inner]


def shape_of(value: ir.Value | None) -> tuple[int, ...]:
    """Return a shape that is known to be fixed. Raises ValueError where it is not.

    >>> shape_of(ir.val("x", ir.DataType.FLOAT, [1, 3]))
    (1, 3)
    """
    shape = static_shape(value)
    if shape is None:
        raise ValueError(f"{value} has no fixed shape")
    return shape


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return the shape where all of it is known.

    >>> static_shape(ir.val("x", ir.DataType.FLOAT, [1, 3]))
    (1, 3)
    >>> static_shape(ir.val("x", ir.DataType.FLOAT, ["N", 3])) is None
    True
    """
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    return value.shape.numpy()


def without_big_tensors(model: ir.Model) -> onnx.ModelProto:
    """Serialise the model with big initializers as inputs, which keeps it far below 2 GiB."""
    slim = model.clone()
    for name, value in list(slim.graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > _SMALL_BYTES:
            del slim.graph.initializers[name]
            value.const_value = None
            if value not in slim.graph.inputs:
                slim.graph.inputs.append(value)
    # From version 4 on, an initializer need not be an input as well.
    slim.ir_version = max(slim.ir_version, 8)
    return ir.to_proto(slim)


def _infer(model: ir.Model, pass_name: str) -> dict[str, ir.Value]:
    """Run onnx's strict inference with data propagation; return its values by name."""
    slim = without_big_tensors(model)
    for node in slim.graph.node:
        if node.op_type in _LIKE_INPUT:
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
    try:
        proto = onnx.shape_inference.infer_shapes(
            slim, check_type=True, strict_mode=True, data_prop=True
        )
    except Exception as error:
        text = " ".join(str(error).split())
        raise PassRefused(
            pass_name,
            "shape inference",
            f"the shapes of this graph contradict each other ({text}); check the input shapes that "
            "were asked for against those the model was made for",
        ) from error
    return ir.convenience.create_value_mapping(ir.from_proto(proto).graph)


def demand_static(model: ir.Model, pass_name: str) -> None:
    """Raise PassRefused naming every value that is read and has no dtype, shape or element."""
    graph = model.graph
    inner = (value for node in graph for value in node.outputs)
    values = [*graph.inputs, *(v for v in inner if v.uses() or v.is_graph_output())]
    unknown = [
        f"{value.name} {value.shape if value.shape is not None else '[?]'}"
        for value in values
        if static_shape(value) is None or value.dtype is None
    ]
    if unknown:
        raise PassRefused(
            pass_name,
            ", ".join(unknown),
            "these values have no fixed shape, and the compiled model needs one for each; their "
            "shapes depend on the data, so cut these nodes off or fix what steers them",
        )
    empty = [
        f"{value.name} {value.shape}" for value in values if min(shape_of(value), default=1) < 1
    ]
    if empty:
        raise PassRefused(
            pass_name,
            ", ".join(empty),
            "these values have no elements; choose an input shape that the model's kernels fit in",
        )
