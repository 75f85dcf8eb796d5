"""Products of one input that an attention reads become one product with wider rows.

On a GPU one kernel that computes Q, K and V takes hardly longer than one of the three.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgepress.targets.lowering.dialect import DOMAIN, shape_of, take_name
from edgepress.targets.lowering.floats import sole_user
from edgepress.targets.lowering.node_attributes import constant_of, residual_of

_PLACES = ("query", "key", "value")


def join_products(model: ir.Model) -> ir.Model:
    """Join the products that are the query, key and value of an attention. Changes the model."""
    taken = {value.name or "" for node in model.graph for value in node.outputs}
    taken.update(model.graph.initializers)
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type == "Attention":
            products = [_product(node, index) for index in range(len(_PLACES))]
            if all(product is not None for product in products):
                _join(node, [p for p in products if p is not None], model.graph, taken)
    return model


def _product(attention: ir.Node, index: int) -> ir.Node | None:
    """Return the plain product that makes an operand which nothing else reads."""
    value = attention.inputs[index]
    node = None if value is None else value.producer()
    if value is None or node is None or sole_user(value) is not attention:
        return None
    if node.domain != DOMAIN or node.op_type != "Gemm" or residual_of(node) is not None:
        return None
    return None if value.is_graph_output() or _moved(attention, index, 1, 0) is None else node


def _moved(attention: ir.Node, index: int, factor: int, offset: int) -> list[int] | None:
    """Return where an operand lies in rows `factor` times as long, from a column `offset` on.

    None where the place is not made of whole rows and of columns.
    """
    value = attention.inputs[index]
    assert value is not None
    columns = shape_of(value)[-1]
    place = [int(number) for number in attention.attributes[_PLACES[index]].as_ints()]
    batch, heads, queries, width, keys, value_width = (
        int(number) for number in attention.attributes["sizes"].as_ints()
    )
    across = (width, width, value_width)[index]
    sizes = (batch, heads, queries if index == 0 else keys, across)
    if index == 1:  # the key's place is that of K transposed, rows first all the same
        sizes = (batch, heads, keys, width)
    start, strides = place[0], place[1:]
    inside = start % columns
    moved = [start // columns * columns * factor + inside + offset]
    for stride, size in zip(strides, sizes, strict=True):
        if size == 1 or stride % columns == 0:
            moved.append(stride * factor)
            continue
        inside += stride * (size - 1)
        moved.append(stride)
    return moved if inside < columns else None


def _join(
    attention: ir.Node, products: Sequence[ir.Node], graph: ir.Graph, taken: set[str]
) -> None:
    first = products[0]
    if len(set(products)) < len(products) or any(_unlike(first, other) for other in products[1:]):
        return
    weights = [constant_of(product, 1) for product in products]
    biases = [constant_of(product, 2) for product in products]
    if len({array.shape for array in weights}) > 1:
        return
    columns, count = weights[0].shape[0], len(products)
    places = [_moved(attention, i, count, i * columns) for i in range(count)]
    old = first.outputs[0]
    name = take_name(f"{old.name}_joined", taken)
    output = ir.Value(
        name=name, shape=ir.Shape((*shape_of(old)[:-1], columns * count)), type=old.type
    )
    arrays = {"weights": np.concatenate(weights), "bias": np.concatenate(biases)}
    constants = [
        _constant(graph, take_name(f"{name}_{key}", taken), array) for key, array in arrays.items()
    ]
    joined = ir.Node(
        DOMAIN,
        "Gemm",
        [first.inputs[0], *constants],
        list(first.attributes.values()),
        name=first.name,
        outputs=[output],
    )
    graph.insert_before(min(products, key=list(graph).index), joined)
    for index, place in enumerate(places):
        assert place is not None
        attention.attributes.add(ir.AttrInt64s(_PLACES[index], place))
        attention.replace_input_with(index, output)
    graph.remove(list(products), safe=True)


def _unlike(first: ir.Node, other: ir.Node) -> bool:
    """Tell whether two products cannot be one: of other inputs, or with another last step."""
    same = first.inputs[0] is other.inputs[0]
    attributes = [
        {key: value.value for key, value in node.attributes.items()} for node in (first, other)
    ]
    return not same or attributes[0] != attributes[1]


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.Tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value
