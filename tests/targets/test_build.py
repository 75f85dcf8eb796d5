import contextlib

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.calibration.base import Samples
from edgepress.passes.base import Context
from edgepress.passes.calibrate import Calibrate
from edgepress.passes.quantize_int8 import QuantizeInt8
from edgepress.targets.base import UnsupportedModel
from edgepress.targets.lowering.build import lower
from edgepress.targets.lowering.dialect import Builder, shape_of
from edgepress.targets.program import Array
from edgepress.targets.reference import Reference
from tests.graphs import answers, conv_nets, feeds, net, random
from tests.targets.interpret import run_program
from tests.targets.kernels import native_isas, target_of
from tests.targets.qdq import Qdq, check_graphs, drawn, inputs_of, merged_graphs, shaped

ISAS = native_isas()[:1]
AVX2 = target_of("avx2")
W = random(3, 3, 3, 3)
SIGNATURE = "(float[1,3,6,6] x) => (float y)"


def check(model: ir.Model, isa: str, inputs: dict[str, Array] | None = None) -> None:
    """Compile, run and compare with onnxruntime."""
    inputs = inputs or feeds(model)
    compare(model, isa, inputs, answers(model, inputs))


def compare(model: ir.Model, isa: str, inputs: dict[str, Array], wanted: list[Array]) -> None:
    """Compile, run and compare with answers."""
    results = run_program(lower(model, target_of(isa)), target_of(isa), inputs)
    for value, each in zip(model.graph.outputs, wanted, strict=True):
        answer = results[value.name or ""]
        assert (answer.dtype, answer.shape) == (each.dtype, each.shape)
        np.testing.assert_allclose(answer, each, rtol=1e-4, atol=1e-5)


def test_equal_layers_share_a_kernel_but_not_weights() -> None:
    body = "a = Conv <pads=[1,1,1,1]> (x, w) y = Conv <pads=[1,1,1,1]> (a, v)"
    program = lower(shaped(net(SIGNATURE, body, {"w": W, "v": W + 1})), AVX2)
    calls = [call for call in program.calls if call.kernel.startswith("conv")]
    assert len({call.kernel for call in calls}) == 1
    assert len({call.arguments[1] for call in calls}) == 2
    assert program.inputs == ("x",)
    assert program.outputs == ("y",)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["same", ""])
def test_nodes_may_share_a_name_or_have_none(isa: str, name: str) -> None:
    body = "a = Conv <pads=[1,1,1,1]> (x, w) y = Conv <pads=[1,1,1,1]> (a, v)"
    model = shaped(net(SIGNATURE, body, {"w": W, "v": W + 1}))
    wanted = answers(model, feeds(model))
    for node in model.graph:
        node.name = name
    compare(model, isa, feeds(model), wanted)
    graph = Qdq()
    x = graph.pair("x", (0.05, 128))
    for seed in range(2):
        w = np.random.default_rng(seed).integers(-127, 128, (3, 3, 1, 1)).astype(np.int8)
        x = graph.pair(graph.op("Conv", x, graph.weight(w, 0.01)), (0.1, 100))
    model = graph.model(x)
    for node in model.graph:
        node.name = name
    results = run_program(lower(model, target_of(isa)), target_of(isa), feeds(model))
    for key, answer in Reference(model).run(feeds(model)).items():
        np.testing.assert_array_equal(results[key], answer)


@pytest.mark.parametrize("isa", ISAS)
def test_values_may_be_called_like_scratch_or_constants(isa: str) -> None:
    text = "(float[1,3,6,6] x) => (float conv_weights, float y)"
    body = """y_nhwc_staged = Relu(x) conv_weights = Neg(y_nhwc_staged)
    y = Conv <pads=[1,1,1,1]> (y_nhwc_staged, w, b)"""
    model = shaped(net(text, body, {"w": W, "b": random(3)}))
    wanted = answers(model, feeds(model))
    model.graph.initializers["b"].name = "conv.bias"
    for node in model.graph:
        node.name = "conv"
    compare(model, isa, feeds(model), wanted)


def test_progress_is_told() -> None:
    seen: list[tuple[str, int, int]] = []
    body = "a = Conv(x, w) b = Softmax(a) y = Conv(b, w)"
    model = shaped(net(SIGNATURE, body, {"w": W}))
    lower(model, AVX2, lambda what, done, total: seen.append((what, done, total)))
    assert {what for what, _, _ in seen} == {"lowering"}
    assert [done for _, done, _ in seen] == list(range(seen[-1][2] + 1))


def test_the_model_is_left_alone() -> None:
    model = shaped(net(SIGNATURE, "a = Conv(x, w) y = Relu(a)", {"w": W}))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    lower(model, AVX2)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_the_same_model_lowers_to_the_same_program() -> None:
    graph = Qdq()
    x = graph.pair("x", (0.05, 128))
    w = np.ones((4, 3, 3, 3), np.int8)
    y = graph.pair(graph.op("Conv", x, graph.weight(w, 0.01)), (0.1, 100))
    one, two = (lower(graph.model(y), AVX2) for _ in range(2))
    assert one.calls == two.calls
    assert one.tensors == two.tensors
    assert list(one.kernels) == list(two.kernels)
    for name, array in one.constants.items():
        np.testing.assert_array_equal(array, two.constants[name])


def test_an_output_that_is_an_input_is_refused() -> None:
    model = net("(float[2] x) => (float[2] y, float[2] x)", "y = Relu(x)")
    with pytest.raises(UnsupportedModel, match=r"x: .* put an Identity between"):
        lower(model, AVX2)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("zero", [np.uint16(30_000), np.int16(-3)])
def test_16_bit_activations_are_right_or_refused(isa: str, zero: np.generic) -> None:
    """An 8-bit operator between 16-bit ones, an 8-bit output of one, and 16 bits throughout."""
    scales = {"s": np.array(1e-3, np.float32), "t": np.array(0.05, np.float32)}
    weights = {**scales, "z": np.asarray(zero), "u": np.array(128, np.uint8)}
    bodies = [
        "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = Sigmoid(d)",
        """q = QuantizeLinear(x, t, u) d = DequantizeLinear(q, t, u) a = Relu(d)
        r = QuantizeLinear(a, s, z) y = DequantizeLinear(r, s, z)""",
        """q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) a = Relu(d)
        r = QuantizeLinear(a, t, u) y = DequantizeLinear(r, t, u)""",
    ]
    for body in bodies:
        model = shaped(net(SIGNATURE, body, weights, opset=21, ir_version=10))
        with contextlib.suppress(UnsupportedModel):
            check(model, isa)


@pytest.mark.parametrize("isa", ISAS)
def test_scales_that_depend_on_data_are_right_or_refused(isa: str) -> None:
    scales: dict[str, Array] = {"c": np.array(100, np.float32), "t": np.array(0.05, np.float32)}
    weights = {**scales, "u": np.array(128, np.uint8)}
    scale = "m = ReduceMax <keepdims=0> (x) s = Div(m, c) "
    bodies = [
        "q = QuantizeLinear(x, s, u) d = DequantizeLinear(q, s, u) y = Sigmoid(d)",
        """q = QuantizeLinear(x, t, u) d = DequantizeLinear(q, t, u) a = Relu(d)
        r = QuantizeLinear(a, s, u) y = DequantizeLinear(r, s, u)""",
    ]
    for body in bodies:
        model = shaped(net(SIGNATURE, scale + body, weights))
        with contextlib.suppress(UnsupportedModel):
            check(model, isa)


@pytest.mark.parametrize("isa", ISAS)
def test_other_dtypes_pass_through(isa: str) -> None:
    boolean = net("(bool[1,3] x) => (bool y)", "y = Concat <axis=1> (x, b)",
                  {"b": np.array([[True, False, True, True]])})  # fmt: skip
    check(shaped(boolean), isa, {"x": np.array([[True, False, True]])})
    integer = net("(int64[2,3] x) => (int64 y)", "a = Reshape(x, s) y = Concat <axis=0> (a, a)",
                  {"s": np.array([3, 2])})  # fmt: skip
    check(shaped(integer), isa)


def quantized(model: ir.Model, activation: str) -> ir.Model:
    """What edgepress itself makes of a float model."""
    model = shaped(model)
    shape = shape_of(model.graph.inputs[0])
    context = Context(samples=Samples({"x": random(4, *shape[1:])}))
    model = Calibrate().call(model, context).model
    return shaped(QuantizeInt8(activation=activation).call(model, context).model)


@pytest.mark.parametrize("isa", native_isas()[-1:])
def test_graphs_that_edgepress_quantized(isa: str) -> None:
    floats = drawn(conv_nets(), 12)
    models = [quantized(m, "int8" if i % 2 else "uint8") for i, m in enumerate(floats)]
    models = [m for m in models if any(n.op_type == "QuantizeLinear" for n in m.graph)]
    assert len(models) >= 8
    inputs = inputs_of(models)
    program, joined = merged_graphs(models, target_of(isa), inputs)
    check_graphs(models, inputs, run_program(program, target_of(isa), joined))


def test_names_that_are_taken_move_aside() -> None:
    builder = Builder()
    first = builder.constant("a", np.zeros(1, np.float32))
    second = builder.node("Relu", [first], {}, "b", "float32", (1,), "")
    assert builder.unique("a") == "a_2"
    builder.free("b")
    builder.free("a")
    assert (second.name, first.name) == ("b_2", "a_3")
    assert set(builder.initializers) == {"a_3"}
    third = builder.node("Relu", [second], {}, "b", "float32", (1,), "")
    assert third.name == "b"
