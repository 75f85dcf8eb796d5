"""Products take along the addition that follows them: a residual costs no pass over memory.

A convolution or matrix product whose output only an Add of two tensors of one shape reads gets the
other tensor as one more input, its residual, and gives the sum: `Added` in `schedules.epilogue`.
Of two products that meet, the later one takes the other's output. Integers stay the same bits.
"""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir

from edgepress.targets.lowering.depthwise_kernels import is_depthwise
from edgepress.targets.lowering.dialect import DOMAIN, dtype_of, shape_of
from edgepress.targets.lowering.floats import clamped_by, sole_user
from edgepress.targets.lowering.node_attributes import float_of, integer_of, residual_of

_FLOAT, _INTEGER = ("Conv", "Gemm"), ("QConv", "QGemm")


def fuse_residuals(model: ir.Model) -> ir.Model:
    """Fuse every addition that a product can take. Changes the model and returns it."""
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type == "QAdd":
            _fuse(node, _INTEGER, model.graph)
        elif node.domain == "" and node.op_type == "Add":
            _fuse(node, _FLOAT, model.graph)
    return model


def _fuse(add: ir.Node, products: tuple[str, ...], graph: ir.Graph) -> None:
    """Replace an addition and one of its operands' products by that product with a residual."""
    first, second = add.inputs
    assert first is not None
    assert second is not None
    shape = shape_of(add.outputs[0])
    if shape_of(first) != shape or shape_of(second) != shape or math.prod(shape) == 0:
        return
    fitting = [
        (product, own)
        for own, value in enumerate((first, second))
        if (product := _product(value, products)) is not None
    ]
    if not fitting:
        return
    product, own = max(fitting, key=lambda pair: graph.index(pair[0]))
    residual = add.inputs[1 - own]
    if add.op_type == "QAdd":
        last, followers = add, list[ir.Node]()
        attributes = _integer_attributes(product, add, "ab"[own])
    else:
        last, followers, bounds = clamped_by(add)
        attributes = {f"sum_{name}": bound for name, bound in bounds.items()}
    old = last.outputs[0]
    fused = ir.Node(
        DOMAIN,
        product.op_type,
        [*product.inputs, residual],
        [*product.attributes.values(), *ir.convenience.convert_attributes(attributes)],
        name=product.name,
        outputs=[ir.Value(name=old.name, shape=old.shape, type=old.type)],
    )
    # Here, both operands and everything that the product reads are there.
    replaced = [product, add, *followers]
    ir.convenience.replace_nodes_and_values(
        graph, add, replaced, [fused], [old], list(fused.outputs)
    )


def _product(value: ir.Value, products: tuple[str, ...]) -> ir.Node | None:
    """Return the product that makes a value for one reader and can add to it."""
    product = value.producer()
    if product is None or product.domain != DOMAIN or product.op_type not in products:
        return None
    if sole_user(value) is None or residual_of(product) is not None:
        return None
    return None if product.op_type in ("Conv", "QConv") and is_depthwise(product) else product


def _integer_attributes(product: ir.Node, add: ir.Node, own: str) -> dict[str, Any]:
    """Return what the QAdd says, of which the product is operand `own`, a or b."""
    other = "b" if own == "a" else "a"
    attributes: dict[str, Any] = {
        "inner_dtype": dtype_of(product.outputs[0]),
        "sum_factor": integer_of(add, f"{own}_factor"),
        "residual_factor": integer_of(add, f"{other}_factor"),
        "residual_zero_point": integer_of(add, f"{other}_zero_point"),
        **{f"sum_{name}": integer_of(add, name) for name in ("zero_point", "low", "high")},
    }
    if "shift" in add.attributes:
        return {**attributes, "sum_shift": integer_of(add, "shift")}
    return {**attributes, "sum_multiplier": float_of(add, "multiplier")}
