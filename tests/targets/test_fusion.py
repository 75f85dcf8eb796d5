"""Which additions a product takes along, and that the answers stay what they were."""

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.targets.lowering.build import lower
from edgepress.targets.lowering.floats import claim_float_operators
from edgepress.targets.lowering.fusion import fuse_residuals
from edgepress.targets.lowering.nhwc import to_nhwc
from edgepress.targets.reference import Reference
from tests.graphs import answers, feeds, net, nodes, random
from tests.targets.interpret import run_program
from tests.targets.kernels import native_isas, target_of
from tests.targets.qdq import Qdq, shaped

ISAS = native_isas()[:1]
X = "(float[2,3,5,6] x) => (float y)"
W = {"w": random(3, 3, 1, 1), "v": random(3, 3, 3, 3), "u": random(3, 1, 1, 1)}
SAME = "<pads=[1,1,1,1]>"


def operators(model: ir.Model) -> list[str]:
    """What is left, without changes of layout."""
    fused = fuse_residuals(to_nhwc(claim_float_operators(model)))
    return [
        line for line in nodes(fused).splitlines() if "Transpose" not in line and "View" not in line
    ]


def check(model: ir.Model, isa: str) -> None:
    inputs = feeds(model)
    results = run_program(lower(model, target_of(isa)), target_of(isa), inputs)
    for value, wanted in zip(model.graph.outputs, answers(model, inputs), strict=True):
        np.testing.assert_allclose(results[value.name or ""], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("c = Conv(x, w) y = Add(c, x)", ["Conv"]),
        ("c = Conv(x, w) s = Add(x, c) y = Relu(s)", ["Conv"]),
        ("c = Conv(x, w) r = Relu(c) y = Add(r, x)", ["Conv"]),
        (f"a = Conv {SAME} (x, v) b = Conv(x, w) y = Add(a, b)", ["Conv", "Conv"]),
        (f"a = Conv {SAME} (x, v) b = Sigmoid(a) c = Conv(x, w) y = Add(c, b)",
         ["Conv", "Sigmoid", "Conv"]),
        ("a = Conv(x, w) b = Add(a, x) y = Add(b, x)", ["Conv", "Add"]),
        # somebody else wants the product, or it is added to itself
        ("c = Conv(x, w) s = Add(c, x) y = Mul(s, c)", ["Conv", "Add", "Mul"]),
        ("c = Conv(x, w) y = Add(c, c)", ["Conv", "Add"]),
        # a value per channel is no residual
        ("m = ReduceMax <axes=[2,3]> (x) c = Conv(x, w) y = Add(c, m)",
         ["ReduceMax", "Conv", "Add"]),
        ("c = Conv <group=3> (x, u) y = Add(c, x)", ["Conv", "Add"]),
    ],
)  # fmt: skip
def test_additions(isa: str, body: str, left: list[str]) -> None:
    model = shaped(net(X, body, W))
    lines = operators(model)
    assert [line.split(" = ")[1].split("(")[0] for line in lines] == left
    check(model, isa)


def test_the_later_product_takes_the_earlier_ones_output() -> None:
    body = f"a = Conv {SAME} (x, v) b = Conv(x, w) s = Add(a, b) y = Relu(s)"
    first, second = operators(shaped(net(X, body, W)))
    assert first.startswith("a_nhwc = Conv(x_nhwc, ")
    assert second.startswith("y_nhwc = Conv(x_nhwc, Conv_1_weights, Conv_1_bias, a_nhwc)")
    assert "sum_low=0.0" in second


def test_an_output_of_the_graph_is_still_made() -> None:
    model = shaped(net("(float[2,3,5,6] x) => (float c, float y)",
                       "c = Conv(x, w) y = Add(c, x)", W))  # fmt: skip
    assert sum("Add" in line for line in operators(model)) == 1


@pytest.mark.parametrize("isa", ISAS)
def test_matrix_products(isa: str) -> None:
    weights = {"w": random(6, 6), "b": random(6), "v": random(6, 6)}
    body = "m = MatMul(x, w) a = Add(b, m) s = Add(a, x) n = MatMul(s, v) t = Add(x, n) y = Relu(t)"
    model = shaped(net("(float[2,3,6] x) => (float y)", body, weights))
    assert [line.split(" = ")[1].split("(")[0] for line in operators(model)] == ["Gemm", "Gemm"]
    check(model, isa)


@pytest.mark.parametrize("isa", native_isas())
@pytest.mark.parametrize(("op_type", "turned"), [("Add", False), ("Sub", True), ("Sub", False)])
def test_integers_stay_the_same_bits(isa: str, op_type: str, turned: bool) -> None:
    for dtypes in (("uint8", "uint8", "int8"), ("uint8", "int16", "uint8")):
        graph = Qdq()
        x = graph.pair("x", (0.05, 128), dtypes[0])
        w = np.random.default_rng(0).integers(-127, 128, (3, 3, 3, 3)).astype(np.int8)
        made = graph.op("Conv", x, graph.weight(w, 0.01), attributes="pads=[1,1,1,1]")
        c = graph.pair(made, (0.07, 100), dtypes[1])
        total = graph.op("Relu", graph.op(op_type, *((x, c) if turned else (c, x))))
        model = graph.model(graph.pair(total, (0.061, 10), dtypes[2]))
        program = lower(model, target_of(isa))
        assert not any(name.startswith("qadd") for name in program.kernels)
        results = run_program(program, target_of(isa), feeds(model))
        for key, wanted in Reference(model).run(feeds(model)).items():
            assert np.unique(wanted).size > 9
            np.testing.assert_array_equal(results[key], wanted)
