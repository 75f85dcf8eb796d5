"""The NumPy reference against onnxruntime, operator by operator."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)

from edgepress.targets.load import load_target
from edgepress.targets.lowering.build import lower
from edgepress.targets.program import Array
from edgepress.targets.reference import Reference
from tests.graphs import answers, feeds, net, random
from tests.targets.interpret import run_program
from tests.targets.kernels import LOWEST, native_isas, target_of
from tests.targets.qdq import Qdq, Scale, shaped

KINDS = [
    "Conv", "ConvRelu", "Depthwise", "Gemm", "MatMul", "Add", "Sub", "Mul", "AddConstant", "Concat",
    "MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean", "Relu", "Clip", "Rescale",
    "Sigmoid", "Tanh", "HardSwish", "LeakyRelu", "Gelu", "Mish", "Exp",
    "Transpose", "Pad", "Slice", "Resize", "DepthToSpace",
]  # fmt: skip
STEP_SIZES = st.sampled_from([0.02, 0.05, 0.11, 0.5, 3.0, 1e-4, 50.0])
ANY_SCALE = st.tuples(STEP_SIZES, st.sampled_from([0, 1, 100, 128, 254, 255]))


def single(
    kind: str, dtype: str, scales: tuple[Scale, Scale, Scale], seed: int, fixed: bool = False
) -> ir.Model:
    """One operator on x and, where it has two operands, on x at another scale.

    With `fixed`, the scales of weights and constants are powers of two too.
    """
    draw = np.random.default_rng(seed)
    graph = Qdq((4, 8) if kind in ("Gemm", "MatMul") else (1, 8, 5, 6), dtype)
    x, other = graph.pair("x", scales[0]), graph.pair("x", scales[1])

    each = draw.uniform(0.001, 0.02, 8).astype(np.float32)
    if fixed:
        each = np.exp2(np.rint(np.log2(each)))

    def weight(*shape: int, axis: int = 0) -> str:
        return graph.weight(draw.integers(-127, 128, shape).astype(np.int8), each, axis)

    steps = draw.integers(-3000, 3000, 8).astype(np.int32)
    bias = graph.weight(steps, each * np.float32(scales[0][0]))
    if kind in ("Conv", "ConvRelu", "Depthwise"):
        depthwise = kind == "Depthwise"
        w = weight(8, 1 if depthwise else 8, 3, 2)
        text = f"pads=[1,0,1,2], strides=[2,1], group={8 if depthwise else 1}"
        y = graph.op("Conv", x, w, bias, attributes=text)
        y = graph.op("Relu", y) if kind == "ConvRelu" else y
    elif kind == "Gemm":
        y = graph.op("Gemm", x, weight(8, 8), bias, attributes="transB=1")
    elif kind == "MatMul":
        y = graph.op("MatMul", x, weight(8, 8, axis=1))
    elif kind in ("Add", "Sub", "Mul", "Concat"):
        y = graph.op(kind, x, other, attributes="axis=-3" if kind == "Concat" else "")
    elif kind == "AddConstant":
        array = (draw.integers(0, 256, (8, 1, 1)) + max(LOWEST[dtype], -128)).astype(dtype)
        y = graph.op("Add", graph.weight(array, 2.0**-5 if fixed else 0.03), x)
    elif kind in ("MaxPool", "AveragePool"):
        y = graph.op(kind, x, attributes="kernel_shape=[3,2], strides=[1,2], pads=[1,0,2,1]")
    elif kind == "ReduceMean":
        if dtype == "int16":  # its opset has the axes as an input
            y = graph.op(kind, x, graph.constant(np.array([3, 2])), attributes="keepdims=0")
        else:
            y = graph.op(kind, x, attributes="axes=[3,2], keepdims=0")
    elif kind == "Clip":
        limits = [graph.constant(np.float32(bound)) for bound in (-0.7, 1.3)]
        y = graph.op(kind, x, *limits)
    elif kind == "Transpose":
        y = graph.op(kind, x, attributes="perm=[0,3,1,2]")
    elif kind == "Pad":
        y = graph.op(kind, x, graph.constant(np.array([0, 1, 2, 0, 0, 0, 0, 1])))
    elif kind == "Slice":
        bounds = [graph.constant(np.array(n)) for n in ([-1, 1], [0, 9], [1, 3], [-2, 2])]
        y = graph.op(kind, x, *bounds)
    elif kind == "Resize":
        factors = graph.constant(np.array([1, 1, 2, 2], np.float32))
        text = 'mode="nearest", nearest_mode="floor", coordinate_transformation_mode="asymmetric"'
        y = graph.op(kind, x, "", factors, attributes=text)
    elif kind == "DepthToSpace":
        y = graph.op(kind, x, attributes="blocksize=2")
    else:
        y = x if kind == "Rescale" else graph.op(kind, x)
    opset = 21 if dtype == "int16" else 20 if kind in ("Gelu", "Mish") else 17
    return graph.model(graph.pair(y, scales[2]), opset=opset)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    dtype=st.sampled_from(["uint8", "int8"]),
    scales=st.tuples(ANY_SCALE, ANY_SCALE, ANY_SCALE),
    seed=st.integers(0, 99),
)
def test_within_one_step_of_onnxruntime(
    kind: str, dtype: str, scales: tuple[Scale, Scale, Scale], seed: int
) -> None:
    model = single(kind, dtype, scales, seed)
    x = feeds(model, seed)
    x["x"] *= scales[0][0] * 90
    x["x"].flat[:3] = [1e30, -1e30, 0]
    reference = Reference(model)
    assert reference.exact, reference.islands
    (wanted,) = answers(model, x)
    (answer,) = reference.run(x).values()
    assert (answer.dtype, answer.shape) == (wanted.dtype, wanted.shape)
    steps = np.abs(answer - wanted) / np.float32(scales[2][0])
    assert steps.max() < 1.01, scales


WIDE_STEPS = st.sampled_from([1e-4, 2e-4, 4.3e-4, 2e-3, 1e-2, 1e-6, 0.2])
TABLED = ["Sigmoid", "Tanh", "HardSwish", "LeakyRelu", "Gelu", "Mish", "Exp"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    steps=st.tuples(WIDE_STEPS, WIDE_STEPS, WIDE_STEPS),
    seed=st.integers(0, 99),
    fixed=st.booleans(),
)
def test_16_bits_within_one_step_of_onnxruntime(
    kind: str, steps: tuple[float, float, float], seed: int, fixed: bool
) -> None:
    """And fixed point; the smallest operand of a sum and a table may add half a step or one."""
    if fixed:
        steps = tuple(float(np.exp2(np.rint(np.log2(step)))) for step in steps)  # type: ignore[assignment]
    first, second, third = ((step, 0) for step in steps)
    model = single(kind, "int16", (first, second, third), seed, fixed)
    x = feeds(model, seed)
    x["x"] *= steps[0] * 20_000
    x["x"].flat[:3] = [1e30, -1e30, 0]
    reference = Reference(model)
    assert reference.exact, reference.islands
    multipliers = [n.attributes.get("multiplier") for n in reference.model.graph]
    assert not (fixed and any(multipliers))
    (wanted,), (answer,) = answers(model, x), reference.run(x).values()
    allowed = {"Add": 0.5, "Sub": 0.5, "AddConstant": 0.5}.get(kind, 0) * max(steps) / steps[2]
    if kind in TABLED:
        table = next(node for node in reference.model.graph if node.op_type == "Table")
        allowed = 1 if table.attributes["bits"].as_int() > 4 else np.inf
    assert (np.abs(answer - wanted) / np.float32(steps[2])).max() < 1.01 + allowed, steps


def test_ties_round_half_to_even() -> None:
    graph = Qdq((8,))
    x = graph.pair("x", (1.0, 128))
    model = graph.model(graph.pair(x, (2.0, 128)))
    values = np.array([1, 3, 5, -1, -3, -5, 2, 4], np.float32)
    (answer,) = Reference(model).run({"x": values}).values()
    assert (answer / 2).tolist() == [0, 2, 2, 0, -2, -2, 1, 2]


def test_what_is_no_number_becomes_the_highest() -> None:
    graph = Qdq((4,))
    model = graph.model(graph.pair("x", (0.5, 100)))
    values = np.array([np.nan, np.inf, -np.inf, 1e38], np.float32)
    (answer,) = Reference(model).run({"x": values}).values()
    assert answer.tolist() == [77.5, 77.5, -50, 77.5]


def test_what_is_exact() -> None:
    graph = Qdq()
    x = graph.pair("x", (0.05, 128))
    exact = graph.model(graph.pair(graph.op("Relu", x), (0.05, 0)))
    assert Reference(exact).exact
    island = graph.model(graph.op("Softmax", x))
    reference = Reference(island)
    assert not reference.exact
    assert reference.islands == ["Softmax_5"]
    with pytest.raises(ValueError, match="no QuantizeLinear"):
        Reference(net("(float[2] x) => (float[2] y)", "y = Relu(x)"))


def test_floats_that_only_move_are_exact() -> None:
    graph = Qdq((2, 3, 4, 5))
    x = graph.pair("x", (0.05, 100))
    turned = graph.op("Transpose", x, attributes="perm=[0,1,3,2]")
    joined = graph.op("Concat", turned, turned, attributes="axis=1")
    padded = graph.op("Pad", joined, graph.constant(np.array([0, 0, 1, 0, 0, 0, 0, 2])))
    model = graph.model(graph.op("Gather", padded, graph.constant(np.array([1, 0, 1]))))
    reference = Reference(model)
    assert reference.exact
    target = target_of(native_isas()[0])
    (wanted,) = reference.run(feeds(model)).values()
    (answer,) = run_program(lower(model, target), target, feeds(model)).values()
    np.testing.assert_array_equal(answer, wanted)


def test_the_model_is_left_alone() -> None:
    model = single("Conv", "uint8", ((0.05, 3), (0.05, 3), (0.1, 9)), 0)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    Reference(model).run(feeds(model))
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_8_bit_inputs_and_outputs() -> None:
    scale: dict[str, Array] = {"s": np.array(0.1, np.float32), "z": np.array(-5, np.int8)}
    body = "d = DequantizeLinear(x, s, z) r = Relu(d) y = QuantizeLinear(r, s, z)"
    model = shaped(net("(int8[256] x) => (int8[256] y)", body, scale))
    x = np.arange(-128, 128).astype(np.int8)
    answer = Reference(model).run({"x": x})["y"]
    assert answer.dtype == np.int8
    np.testing.assert_array_equal(answer, np.maximum(x, -5))


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self.left = [{"x": random(1, 3, 8, 8, seed=seed)} for seed in range(4)]

    def get_next(self) -> Any:
        return self.left.pop() if self.left else None


def float_model(path: Path) -> None:
    weights = {
        "w1": random(8, 3, 3, 3) * 0.3,
        "b1": random(8),
        "w2": random(8, 1, 3, 3),
        "w3": random(5, 8) * 0.4,
        "b3": random(5, seed=1),
    }
    body = """a = Conv <pads=[1,1,1,1], strides=[2,2]> (x, w1, b1) b = Relu(a)
    c = Conv <pads=[1,1,1,1], group=8> (b, w2) d = Add(c, b) e = MaxPool <kernel_shape=[2,2]> (d)
    f = GlobalAveragePool(e) g = Flatten(f) h = Gemm <transB=1> (g, w3, b3) y = Sigmoid(h)"""
    model = shaped(net("(float[1,3,8,8] x) => (float[1,5] y)", body, weights))
    onnx.save(ir.to_proto(model), path)


@pytest.mark.parametrize(
    ("activation", "weight", "symmetric", "options"),
    [
        (QuantType.QUInt8, QuantType.QInt8, True, {}),
        (QuantType.QInt8, QuantType.QInt8, True, {"per_channel": True}),
        (QuantType.QInt8, QuantType.QInt8, True, {"reduce_range": True}),
        (QuantType.QUInt8, QuantType.QUInt8, False, {}),
        (QuantType.QInt8, QuantType.QInt8, False, {}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_models_of_onnxruntime(
    tmp_path: Path,
    activation: QuantType,
    weight: QuantType,
    symmetric: bool,
    options: dict[str, Any],
) -> None:
    float_model(tmp_path / "float.onnx")
    quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "int8.onnx",
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=activation,
        weight_type=weight,
        extra_options={"WeightSymmetric": symmetric},
        **options,
    )
    model = shaped(ir.load(tmp_path / "int8.onnx"))
    x = {"x": random(1, 3, 8, 8, seed=9)}
    reference, (wanted,) = Reference(model), answers(model, x)
    assert reference.exact == symmetric
    (answer,) = reference.run(x).values()
    step = np.unique(np.diff(np.unique(wanted))).min() if len(np.unique(wanted)) > 1 else 1e-2
    assert np.abs(answer - wanted).max() <= (2.01 * step if symmetric else 1e-4)
    target = target_of(native_isas()[0]) if native_isas() else load_target("native")
    compiled = run_program(lower(model, target), target, x)["y"]
    if symmetric:
        np.testing.assert_array_equal(compiled, answer)
    else:
        np.testing.assert_allclose(compiled, wanted, atol=1e-4)
