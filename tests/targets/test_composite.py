"""Element-wise sub-graphs become one table: what is recognised, and what it holds."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from edgepress.passes._functions import ELEMENTWISE
from edgepress.targets.lowering.build import lower
from edgepress.targets.lowering.composite import OPERATORS
from edgepress.targets.lowering.dialect import array_of
from edgepress.targets.lowering.integer_rules import to_integers
from edgepress.targets.lowering.tables import FUNCTIONS
from edgepress.targets.program import Array
from edgepress.targets.reference import Reference
from tests.graphs import answers, net, nodes
from tests.targets.interpret import run_program
from tests.targets.kernels import native_isas, target_of
from tests.targets.qdq import Qdq, Scale, check_graphs, drawn, inputs_of, merged_graphs

X: Scale = (0.05, 128)
Y: Scale = (0.02, 20)
EVERY = ((np.arange(256) - 128) * np.float32(0.05)).astype(np.float32)


def start() -> tuple[Qdq, str]:
    graph = Qdq((256,))
    return graph, graph.pair("x", X)


def number(graph: Qdq, value: float) -> str:
    return graph.constant(np.float32(value))


def gelu(graph: Qdq, x: str) -> str:
    scaled = graph.op("Div", x, number(graph, 2**0.5))
    shifted = graph.op("Add", number(graph, 1), graph.op("Erf", scaled))
    return graph.op("Mul", graph.op("Mul", x, shifted), number(graph, 0.5))


def entries(model: ir.Model) -> Array:
    (found,) = (v for n, v in model.graph.initializers.items() if n.endswith("_table"))
    array = array_of(found)
    assert array is not None
    return array


def test_gelu_is_one_table() -> None:
    graph, x = start()
    model = to_integers(graph.model(graph.pair(gelu(graph, x), Y)), "uint8")
    assert [node.op_type for node in model.graph] == ["Quantize", "Table", "Dequantize"]
    root, half = float(np.float32(2**0.5)), 0.5
    for q, entry in enumerate(entries(model)):
        real = float(np.float32(0.05)) * (q - 128)
        wanted = round(real * (1 + math.erf(real / root)) * half / float(np.float32(0.02))) + 20
        assert entry == min(max(wanted, 0), 255)


def test_numbers_behind_a_dequantize_count() -> None:
    graph, x = start()
    three = graph.weight(np.array(30, np.uint8), 0.1)
    power = graph.op("Pow", x, three)
    reference = Reference(graph.model(graph.pair(power, Y)))
    assert reference.exact
    (answer,) = reference.run({"x": EVERY}).values()
    exponent = np.float64(np.float32(30) * np.float32(0.1))  # 3.0000001: negative numbers have none
    with np.errstate(invalid="ignore"):
        real = np.float64(EVERY) ** exponent
    wanted = np.where(np.isnan(real), 235 * 0.02, np.clip(real, -20 * 0.02, 235 * 0.02))
    assert np.abs(answer - wanted).max() <= 0.0101


def test_a_value_that_floats_read_is_computed_for_them_too() -> None:
    graph, x = start()
    shifted = graph.op("Add", x, number(graph, 1))
    root = graph.op("Mul", shifted, number(graph, 0.5))
    other = graph.op("CumSum", shifted, graph.constant(np.int64(0)))
    model = graph.model(graph.pair(root, Y), other)
    integers = to_integers(model, "uint8")
    kinds = [node.op_type for node in integers.graph]
    assert kinds == ["Quantize", "Dequantize", "Add", "CumSum", "Table", "Dequantize"]
    reference = Reference(model)
    assert reference.islands == ["Add_2", "CumSum_4"]
    for answer, wanted in zip(
        reference.run({"x": EVERY}).values(), answers(model, {"x": EVERY}), strict=True
    ):
        np.testing.assert_allclose(answer, wanted, atol=0.0201, rtol=1e-4)


def test_one_value_may_be_quantized_twice() -> None:
    graph, x = start()
    function = gelu(graph, x)
    model = graph.model(graph.pair(function, Y), graph.pair(function, (0.1, 3)))
    assert nodes(to_integers(model, "int8")).count("= Table(") == 2


@pytest.mark.parametrize(
    "lines",
    [
        "e = Exp(a) y = Mul(e, b)",  # of two values
        "e = Mul(a, k) y = Exp(e)",  # a constant per element
        "e = Exp(a) y = Add(e, wide)",  # another shape
        "e = Atan(a) y = Exp(e)",  # not in the list
    ],
)
def test_what_is_no_function_of_one_value_stays_float(lines: str) -> None:
    quantize = "q{0} = QuantizeLinear({0}, s, z) {1} = DequantizeLinear(q{0}, s, z)"
    text = f"{quantize.format('x', 'a')} {quantize.format('w', 'b')} {lines} "
    text += "qy = QuantizeLinear(y, s, z) r = DequantizeLinear(qy, s, z)"
    constants: dict[str, Array] = {
        "s": np.array(0.1, np.float32), "z": np.array(3, np.uint8),
        "k": np.ones(4, np.float32), "wide": np.ones((1, 1, 1), np.float32),
    }  # fmt: skip
    model = net("(float[4] x, float[4] w) => (float[] r)", text, constants)
    for value in (v for n in model.graph for v in n.outputs):
        value.shape = value.shape or ir.Shape([4])
        value.dtype = value.dtype or ir.DataType.FLOAT
    if "wide" in lines:
        for name in ("y", "qy", "r"):
            (value,) = (v for n in model.graph for v in n.outputs if v.name == name)
            value.shape = ir.Shape([1, 1, 4])
    assert not Reference(model).exact


def test_hostile_functions_are_defined() -> None:
    """What is no number is the highest entry; infinities saturate; depth costs nothing."""
    graph, x = start()
    root = graph.op("Sqrt", x)  # no number below 0
    (answer,) = Reference(graph.model(graph.pair(root, Y))).run({"x": EVERY}).values()
    assert set(answer[EVERY < 0]) == {np.float32(235) * np.float32(0.02)}
    graph, x = start()
    deep = x
    for _ in range(60):
        deep = graph.op("Mul", deep, deep)
    (answer,) = Reference(graph.model(graph.pair(deep, Y))).run({"x": EVERY}).values()
    assert answer[np.abs(EVERY) > 1.01].min() == np.float32(235) * np.float32(0.02)
    assert np.abs(answer[np.abs(EVERY) < 0.99]).max() == 0


TWO = {
    "Add": "1.5", "And": "p", "Div": "3.0", "Equal": "0.5", "Greater": "0.5",
    "GreaterOrEqual": "0.5", "Less": "0.5", "LessOrEqual": "0.5", "Max": "0.5", "Min": "0.5",
    "Mul": "-2.5", "Or": "p", "PRelu": "0.25", "Pow": "2.0", "Sub": "0.5", "Sum": "0.5",
}  # fmt: skip
ATTRIBUTES = {
    "Celu": "alpha=1.5",
    "Shrink": "bias=0.25, lambd=0.75",
    "ThresholdedRelu": "alpha=0.5",
}


@pytest.mark.parametrize("op_type", sorted(OPERATORS.keys() - {"Swish"}))
def test_operators_are_those_of_onnx(op_type: str) -> None:
    """As float functions of every value, compared with onnxruntime's in float32."""
    attributes = f"<{ATTRIBUTES[op_type]}>" if op_type in ATTRIBUTES else ""
    given = f"{op_type} {attributes} (x)"
    numbers = {"k": np.float32(0.5), "t": np.float32(2), "u": np.float32(-3)}
    if op_type in ("And", "Or"):
        given = f"{op_type}(p, r)"
    elif op_type == "Not":
        given = "Not(p)"
    elif op_type == "Where":
        given = "Where(p, x, k)"
    elif op_type == "Clip":
        given = "Clip(x, u, k)"
    elif op_type in TWO:
        numbers["k"] = np.float32(TWO[op_type])
        given = f"{op_type}(x, k)"
    logical = op_type in ("And", "Or", "Not", "Equal") or op_type.startswith(("Greater", "Less"))
    body = f"p = Greater(x, u) r = Less(x, t) v = {given} "
    body += "y = Where(v, t, u)" if logical else "y = Identity(v)"
    weights = {name: np.asarray(array) for name, array in numbers.items()}
    signature = f"(float[256] x) => (float[256] y) <{'bool' if logical else 'float'}[256] v>"
    model = net(signature, body, weights, opset=20, ir_version=10)
    x = EVERY + np.float32(0.0125)
    with np.errstate(all="ignore"):
        (wanted,) = answers(model, {"x": x})
    values: dict[str, Array] = {"x": x.astype(np.float64), **weights}
    for node in model.graph:
        operands = [values[value.name or ""] for value in node.inputs if value is not None]
        with np.errstate(all="ignore"):
            values[node.outputs[0].name or ""] = OPERATORS[node.op_type](node, *operands)
    np.testing.assert_allclose(values["y"], wanted, rtol=1e-5, atol=1e-6)


def test_swish() -> None:
    model = net("(float[5] x) => (float[5] y)", "y = Swish <alpha=1.5> (x)", opset=24)
    x = np.array([-700.0, -1, 0, 1, 700])
    real = OPERATORS["Swish"](next(iter(model.graph)), x)
    np.testing.assert_allclose(real, x / (1 + np.exp(-1.5 * x.clip(-400))), atol=1e-12)


def test_what_passes_quantize_as_one_is_known_here() -> None:
    assert set(FUNCTIONS) <= OPERATORS.keys()
    assert OPERATORS.keys() >= ELEMENTWISE


UNARY = [
    "Abs", "Celu", "Ceil", "Erf", "Exp", "Floor", "Log", "Neg", "Reciprocal", "Relu", "Round",
    "Shrink", "Sigmoid", "Sign", "Softplus", "Sqrt", "Tanh", "ThresholdedRelu",
]  # fmt: skip
BINARY = ["Add", "Div", "Max", "Min", "Mul", "Pow", "Sub", "Sum"]
SCALES = [0.02, 0.3, 1e-6, 40.0, 2.0**-4]


@st.composite
def function_nets(draw: st.DrawFn) -> ir.Model:
    """Any expression of one value, steep ones and all, at hostile scales, of 8 or 16 bits."""
    graph = Qdq((1, 3, 4, 5))
    dtypes = st.sampled_from(["uint8", "int8", "int16"])

    def pair(value: str) -> str:
        dtype = draw(dtypes)
        zero = 2**15 if dtype == "int16" else draw(st.sampled_from([0, 3, 128, 255]))
        return graph.pair(value, (draw(st.sampled_from(SCALES)), zero), dtype)

    values = [pair("x")]
    if draw(st.booleans()):
        values = [
            pair(graph.op("MaxPool", values[0], attributes="kernel_shape=[2,2], pads=[0,1,1,0]"))
        ]
    for _ in range(draw(st.integers(2, 6))):
        operand = st.sampled_from(values)
        kind = draw(st.sampled_from(["unary", "binary", "where"]))
        if kind == "unary":
            values.append(graph.op(draw(st.sampled_from(UNARY)), draw(operand)))
        elif kind == "where":
            condition = graph.op("Greater", draw(operand), number(graph, 0.25))
            values.append(graph.op("Where", condition, draw(operand), draw(operand)))
        else:
            constant = draw(st.sampled_from([0.5, -3, 1e30, 0]))
            both = [draw(operand), draw(st.one_of(operand, st.just(number(graph, constant))))]
            values.append(graph.op(draw(st.sampled_from(BINARY)), *draw(st.permutations(both))))
    return graph.model(pair(values[-1]), opset=21)


@pytest.mark.parametrize("isa", native_isas())
def test_compiled_expressions_are_the_references(isa: str) -> None:
    models = drawn(function_nets(), 40 if isa == native_isas()[-1] else 5)
    inputs = inputs_of(models)
    program, joined = merged_graphs(models, target_of(isa), inputs)
    results = run_program(program, target_of(isa), joined)
    assert check_graphs(models, inputs, results) == len(models)


@settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    lines=st.lists(
        st.tuples(st.sampled_from(["Erf", "Tanh", "Sigmoid", "Softplus", "Neg"]), st.booleans()),
        min_size=2, max_size=5,
    ),
    zero=st.sampled_from([0, 90, 255]),
)  # fmt: skip
def test_within_one_step_of_onnxruntime(lines: list[tuple[str, bool]], zero: int) -> None:
    graph, x = start()
    value = x
    for op_type, twice in lines:
        value = graph.op(op_type, value)
        value = graph.op("Mul", value, x) if twice else value
    scale = 0.01 if zero else 3.0
    model = graph.model(graph.pair(value, (scale, zero)))
    (answer,) = Reference(model).run({"x": EVERY}).values()
    (wanted,) = answers(model, {"x": EVERY})
    assert np.abs(answer - wanted).max() <= 1.01 * scale


@pytest.mark.parametrize("op_type", ["Pow", "Celu", "Shrink", "Mish", "Softplus"])
def test_operators_that_floats_decompose_are_kept_whole(op_type: str) -> None:
    graph, x = start()
    operands = (x, number(graph, 3)) if op_type == "Pow" else (x,)
    function = graph.op("Mul", graph.op(op_type, *operands), number(graph, 0.3))
    model = graph.model(graph.pair(function, Y), opset=20)
    target = target_of(native_isas()[0])
    program = lower(model, target)
    assert [call.kernel.split("_")[0] for call in program.calls] == [
        "quantise", "table", "dequantise",
    ]  # fmt: skip
    (wanted,) = Reference(model).run({"x": EVERY}).values()
    (answer,) = run_program(program, target, {"x": EVERY}).values()
    np.testing.assert_array_equal(answer, wanted)
