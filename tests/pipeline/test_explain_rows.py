"""Rows of a program: which calls and nodes belong together, their precision, bytes and work."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.passes.base import refresh_shapes
from edgepress.pipeline._explain_rows import Row, find_rows
from edgepress.targets.load import load_target
from edgepress.targets.lowering.build import lower
from edgepress.targets.program import Program
from tests.graphs import net, random

TARGET = load_target("x86-64-v3")


def rows_of(model: ir.Model) -> tuple[list[Row], Program]:
    refresh_shapes(model, "test")
    program = lower(model, TARGET)
    return find_rows(program, model), program


def pair(name: str, source: str) -> str:
    """QuantizeLinear and DequantizeLinear around a value, as text."""
    return f"""{name}_q = QuantizeLinear({source}, s, z)
               {name} = DequantizeLinear({name}_q, s, z)"""


def quantized(scale: float = 0.05, zero: int = 120) -> ir.Model:
    """A convolution with ReLU, a maximum, a softmax that stays float, and an output."""
    return net(
        "(float[1,4,6,6] x) => (float[1,144] y)",
        f"""{pair("xd", "x")}
            wd = DequantizeLinear(w, ws)
            c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(xd, wd)
            r = Relu(c)
            {pair("rd", "r")}
            f = Flatten(rd)
            {pair("fd", "f")}
            e = Exp(fd)
            o = Softmax(e)
            y = Mul(o, two)""",
        {
            "w": np.clip(random(4, 4, 3, 3) * 40, -127, 127).astype(np.int8),
            "ws": np.array(scale, np.float32),
            "s": np.array(scale, np.float32),
            "z": np.array(zero, np.uint8 if zero else np.int8),
            "two": np.array(2, np.float32),
        },
    )


def test_every_call_is_in_one_row_and_nodes_are_where_they_are_computed() -> None:
    rows, program = rows_of(quantized())
    assert sorted(number for row in rows for number in row.calls) == list(range(len(program.calls)))
    conv = next(row for row in rows if row.operator == "Conv")
    assert conv.name == "Conv_3"
    assert conv.nodes == ["Conv_3", "Relu_4"]
    assert conv.fused == ["Relu", "padding"]
    run = next(row for row in rows if "Softmax" in (*row.nodes, row.operator, *row.fused)[-1] or
               "Softmax" in row.operator)  # fmt: skip
    assert any(name.startswith("Softmax") for name in run.nodes)
    owners = [name for row in rows for name in row.nodes]
    assert len(owners) == len(set(owners))


def test_precisions() -> None:
    rows, _ = rows_of(quantized())
    precisions = {row.operator: row.precision for row in rows}
    assert precisions["Conv"] == "int8"
    assert precisions["Input"] == "float32 → uint8"
    assert rows[-1].is_float or rows[-1].conversion
    assert [row.conversion for row in rows if row.operator == "Input"] == [True]


def test_powers_of_two_are_named_by_their_format() -> None:
    rows, _ = rows_of(quantized(scale=2.0**-4, zero=0))
    assert {row.precision for row in rows if row.operator == "Conv"} == {"Q3.4"}


@pytest.mark.parametrize(("scale", "zero"), [(0.05, 0), (2.0**-4, 3)])
def test_other_scales_are_not(scale: float, zero: int) -> None:
    model = quantized(scale=scale, zero=zero)
    rows, _ = rows_of(model)
    assert {row.precision for row in rows if row.operator == "Conv"} == {"int8"}


def test_work_and_bytes_of_a_float_layer() -> None:
    model = net(
        "(float[3,8] x) => (float[3,5] y)",
        "y = Gemm<transB=1>(x, w, b)",
        {"w": random(5, 8), "b": random(5)},
    )
    rows, program = rows_of(model)
    gemm = next(row for row in rows if row.operator == "Gemm")
    assert gemm.macs == 3 * 8 * 5
    call = program.calls[gemm.calls[-1]]
    weights = sum(a.nbytes for name, a in program.constants.items() if name in call.arguments)
    assert weights >= 4 * (5 * 8 + 5)
    assert gemm.bytes_moved == gemm.working_set_bytes == 4 * (3 * 8 + 3 * 5) + weights


def test_a_layer_with_padding_moves_its_input_twice() -> None:
    model = net(
        "(float[1,8,6,6] x) => (float[1,8,4,4] y)",
        "y = Conv<kernel_shape=[5,5], pads=[1,1,1,1]>(x, w)",
        {"w": random(8, 8, 5, 5)},
    )
    rows, program = rows_of(model)
    conv = next(row for row in rows if row.operator == "Conv")
    staging, product = (program.calls[number] for number in conv.calls)
    assert conv.fused == ["padding"]
    assert conv.working_set_bytes < conv.bytes_moved
    assert conv.macs == 16 * 8 * 8 * 25
    assert staging.outputs[0] in product.arguments


def test_the_work_of_a_run_of_nodes_is_that_of_all() -> None:
    model = net(
        "(float[1,4,6] x) => (float[1,4,6] y)",
        "t = Transpose<perm=[0,2,1]>(x) p = MatMul(x, t) e = Exp(p) y = MatMul(e, x)",
    )
    rows, _ = rows_of(model)
    assert sum(row.macs for row in rows) == 2 * 4 * 4 * 6
    assert [name for row in rows for name in row.nodes] == [node.name for node in model.graph]


def test_a_gather_moves_the_rows_that_it_picks_not_the_table() -> None:
    model = net(
        "(int64[1,7] x) => (float[1,7,16] y)",
        "y = Gather(table, x)",
        {"table": random(5000, 16)},
    )
    rows, _ = rows_of(model)
    assert sum(row.bytes_moved for row in rows) < 10 * 7 * 16 * 4


def test_views_are_in_no_row() -> None:
    model = net(
        "(float[1,4,6] x) => (float[1,24] y)",
        "r = Relu(x) f = Flatten(r) y = Neg(f)",
    )
    rows, _ = rows_of(model)
    assert "Flatten_1" not in {row.name for row in rows if row.operator == "Flatten"}
    assert {name for row in rows for name in row.nodes} >= {"Relu_0", "Neg_2"}


def test_a_function_that_became_a_table_has_all_its_nodes() -> None:
    model = net(
        "(float[1,32] x) => (float[1,32] y)",
        f"""{pair("xd", "x")}
            g = Sigmoid(xd)
            m = Mul(xd, g)
            {pair("y", "m")}""",
        {"s": np.array(0.05, np.float32), "z": np.array(120, np.uint8)},
    )
    rows, _ = rows_of(model)
    assert {name for row in rows for name in row.nodes} == {"Sigmoid_2", "Mul_3"}
