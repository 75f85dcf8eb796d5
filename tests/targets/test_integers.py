"""What QDQ groups become, as text."""

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.targets.lowering.dialect import array_of
from edgepress.targets.lowering.integer_rules import to_integers
from edgepress.targets.lowering.integers import is_quantized
from edgepress.targets.program import Array
from tests.graphs import net, nodes
from tests.targets.qdq import Qdq, Scale, shaped

X: Scale = (0.05, 120)
Y: Scale = (0.1, 30)
IN = "v2 = Quantize(x) {scale=0.05000000074505806, zero_point=120}"
OUT = "= Dequantize({}) {{scale=0.10000000149011612, zero_point=30}}"


def weights(*shape: int) -> Array:
    return np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8)


def start(shape: tuple[int, ...] = (1, 3, 6, 6), dtype: str = "uint8") -> tuple[Qdq, str]:
    graph = Qdq(shape, dtype)
    return graph, graph.pair("x", X)


def inside(graph: Qdq, value: str, storage: str = "uint8", scale: Scale = Y) -> list[str]:
    """Integer nodes between the first Quantize and the last Dequantize."""
    lines = nodes(to_integers(graph.model(graph.pair(value, scale)), storage)).splitlines()
    assert "= Quantize(x)" in lines[0]
    assert "= Dequantize(" in lines[-1]
    return lines[1:-1]


def constant(model: ir.Model, name: str) -> Array:
    array = array_of(model.graph.initializers[name])
    assert array is not None
    return array


def test_conv_with_relu() -> None:
    graph, x = start()
    scale = np.array([0.01, 0.02], np.float32)
    w = weights(2, 3, 3, 3)
    bias = graph.constant(np.array([0.5, -1], np.float32))
    conv = graph.op("Conv", x, graph.weight(w, scale), bias, attributes="pads=[1,0,0,1]")
    y = graph.pair(graph.op("Relu", conv), Y)
    model = to_integers(graph.model(y), "uint8")
    assert nodes(model).splitlines() == [
        "v2 = Quantize(x) {scale=0.05000000074505806, zero_point=120}",
        "v13 = QConv(v2, Conv_3_weights, Conv_3_bias, Conv_3_multipliers) "
        "{dilations=[1,1], group=1, high=255, kernel=[3,3], low=30, pads=[1,0,0,1], "
        "strides=[1,1], x_zero_point=120, zero_point=30}",
        "v14 = Dequantize(v13) {scale=0.10000000149011612, zero_point=30}",
    ]
    np.testing.assert_array_equal(constant(model, "Conv_3_weights"), w)
    np.testing.assert_array_equal(constant(model, "Conv_3_bias"), [1000, -1000])
    np.testing.assert_allclose(constant(model, "Conv_3_multipliers"), [0.005, 0.01])
    assert constant(model, "Conv_3_multipliers").dtype == np.float32


def test_int8_storage_shifts_every_zero_point() -> None:
    graph, x = start()
    lines = inside(graph, graph.op("Relu", x), "int8")
    assert lines == [
        "v7 = Rescale(v2) {high=127, low=-98, multiplier=0.5, x_zero_point=-8, zero_point=-98}"
    ]


def test_clip6() -> None:
    graph, x = start()
    bounds = [graph.constant(np.float32(bound)) for bound in (0, 6)]
    (line,) = inside(graph, graph.op("Clip", x, *bounds))
    assert "high=90, low=30" in line


def test_clamps_compose() -> None:
    """A Clip to [-6, -3] after a ReLU leaves only -3, one with min > max only max."""
    for bounds in ((-6, -3), (3, -3)):
        graph, x = start()
        limits = [graph.constant(np.float32(bound)) for bound in bounds]
        (line,) = inside(graph, graph.op("Clip", graph.op("Relu", x), *limits))
        assert "high=0, low=0" in line


def test_residual_add() -> None:
    graph, x = start()
    other = graph.pair(graph.op("Relu", x), (0.025, 0))
    lines = inside(graph, graph.op("Add", x, other))
    assert lines[1].startswith("v12 = QAdd(v2, v7) {a_factor=2097152, a_zero_point=120, ")
    assert "b_factor=1048576, b_zero_point=0, high=255, low=0" in lines[1]
    graph, x = start()
    other = graph.pair(graph.op("Relu", x), (0.025, 0))
    assert "b_factor=-1048576" in inside(graph, graph.op("Sub", x, other))[1]


def test_mul() -> None:
    graph, x = start()
    (line,) = inside(graph, graph.op("Mul", x, x), scale=(0.0025, 0))
    assert line.startswith("v7 = QMul(v2, v2) {a_zero_point=120, b_zero_point=120, ")
    assert "multiplier=1.0" in line


def test_concat_rescales_only_what_differs() -> None:
    graph, x = start()
    other = graph.pair(graph.op("Relu", x), Y)
    lines = inside(graph, graph.op("Concat", x, other, attributes="axis=1"))
    assert len(lines) == 3
    assert lines[1].startswith("v12_part_0 = Rescale(v2) {high=255, low=0, multiplier=0.5")
    assert lines[2] == "v12 = Concat(v12_part_0, v7) {axis=1}"


def test_depthwise() -> None:
    graph, x = start()
    conv = graph.op("Conv", x, graph.weight(weights(3, 1, 3, 3), 0.01), attributes="group=3")
    (line,) = inside(graph, conv)
    assert "QConv(" in line
    assert "group=3" in line


def test_pools() -> None:
    graph, x = start()
    pool = graph.op("MaxPool", x, attributes="kernel_shape=[2,2], strides=[2,2]")
    lines = inside(graph, pool)
    assert lines[0] == (
        "v7_pooled = MaxPool(v2) {dilations=[1,1], kernel=[2,2], pads=[0,0,0,0], strides=[2,2]}"
    )
    assert lines[1].startswith("v7 = Rescale(v7_pooled)")
    assert len(lines) == 2

    graph, x = start()
    pool = graph.op("MaxPool", x, attributes="kernel_shape=[2,2]")
    assert [line.split(" ")[2][:8] for line in inside(graph, pool, scale=X)] == ["MaxPool("]

    graph, x = start()
    pool = graph.op("AveragePool", x, attributes="kernel_shape=[2,2], pads=[1,0,0,0]")
    (line,) = inside(graph, pool)
    assert line.startswith("v7 = QAveragePool(v2, v7_factors) {dilations=[1,1], high=255")

    graph, x = start()
    (line,) = inside(graph, graph.op("GlobalAveragePool", x))
    assert "kernel=[6,6]" in line

    graph, x = start()
    mean = graph.op("ReduceMean", x, attributes="axes=[-1,2], keepdims=0")
    lines = inside(graph, mean)
    assert "kernel=[6,6]" in lines[0]
    assert " = Reshape(" in lines[1]


def test_a_sigmoid_is_a_table() -> None:
    graph, x = start()
    y = graph.pair(graph.op("Sigmoid", x), (1 / 256, 0))
    model = to_integers(graph.model(y), "uint8")
    (line,) = nodes(model).splitlines()[1:-1]
    assert line == "v7 = Table(v2, v7_table)"
    steps = (np.arange(256) - 120) * np.float64(np.float32(0.05))
    wanted = np.clip(np.rint(256 / (1 + np.exp(-steps))), 0, 255)
    np.testing.assert_array_equal(constant(model, "v7_table"), wanted)


MOVES = {
    "Transpose": ("perm=[0,2,3,1]", []),
    "Flatten": ("", []),
    "Identity": ("", []),
    "Reshape": ("", [np.array([1, -1])]),
    "Slice": ("", [np.array([1]), np.array([3]), np.array([2])]),
    "Gather": ("axis=1", [np.array([2, 0])]),
    "Tile": ("", [np.array([1, 2, 1, 1])]),
    "Expand": ("", [np.array([2, 3, 6, 6])]),
    "Unsqueeze": ("", [np.array([0])]),
    "Squeeze": ("", [np.array([0])]),
    "SpaceToDepth": ("blocksize=2", []),
    "Pad": ("", [np.array([0, 0, 1, 1, 0, 0, 1, 1])]),
}


@pytest.mark.parametrize("op_type", sorted(MOVES))
def test_moves_copy_bytes(op_type: str) -> None:
    attributes, constants = MOVES[op_type]
    graph, x = start()
    names = [graph.constant(array) for array in constants]
    lines = inside(graph, graph.op(op_type, x, *names, attributes=attributes), scale=X)
    assert len(lines) == 1
    assert f" = {op_type}(v2" in lines[0]


def test_a_pad_fills_with_the_zero_point() -> None:
    graph, x = start()
    pads = graph.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1]))
    model = to_integers(graph.model(graph.pair(graph.op("Pad", x, pads), X)), "uint8")
    (fill,) = [v for name, v in model.graph.initializers.items() if name.endswith("_fill")]
    assert array_of(fill) == np.uint8(120)


@pytest.mark.parametrize("value", [0.023, -np.inf, 100.0])
def test_a_pad_with_what_8_bits_cannot_hold_stays_float(value: float) -> None:
    graph, x = start()
    pads = graph.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1]))
    fill = graph.constant(np.float32(value))
    lines = inside(graph, graph.op("Pad", x, pads, fill))
    assert [line.split(" ")[2].split("(")[0] for line in lines] == ["Dequantize", "Pad", "Quantize"]


def stays_float(graph: Qdq, value: str, op_type: str) -> None:
    lines = inside(graph, value)
    assert any(f" = {op_type}(" in line and "QConv" not in line for line in lines), lines
    assert " = Quantize(" in lines[-1]


def test_weights_with_a_zero_point_stay_float() -> None:
    graph, x = start()
    w = graph.constant(weights(2, 3, 3, 3).view(np.uint8))
    scale, zero = graph.constant(np.float32(0.01)), graph.constant(np.uint8(128))
    stays_float(graph, graph.op("Conv", x, graph.op("DequantizeLinear", w, scale, zero)), "Conv")


@pytest.mark.parametrize("scale", [np.float32(0), np.float32(1e-45), np.float32(np.inf)])
def test_weights_with_a_useless_scale_stay_float(scale: np.float32) -> None:
    graph, x = start()
    with np.errstate(invalid="ignore"):
        stays_float(graph, graph.op("Conv", x, graph.weight(weights(2, 3, 3, 3), scale)), "Conv")


def test_sums_that_could_overflow_stay_float() -> None:
    graph, x = start()
    bias = graph.constant(np.array([0.1, 3], np.float32))
    w = graph.weight(weights(2, 3, 3, 3), 1e-8)  # 3 / (0.05 * 1e-8) is more than int32 holds
    stays_float(graph, graph.op("Conv", x, w, bias), "Conv")
    graph, x = start((1, 140_000))
    w = graph.weight(np.full((140_000, 1), 127, np.int8), 0.01)
    stays_float(graph, graph.op("MatMul", x, w), "MatMul")


def test_a_gemm_bias_over_rows_stays_float() -> None:
    graph, x = start((4, 5))
    bias = graph.constant(np.arange(4, dtype=np.float32).reshape(4, 1))
    stays_float(graph, graph.op("Gemm", x, graph.weight(weights(5, 4), 0.01), bias), "Gemm")


@pytest.mark.parametrize("attributes", ["alpha=0.5", "transA=1", "beta=0.5"])
def test_other_gemms_stay_float(attributes: str) -> None:
    graph, x = start((4, 4))
    bias = graph.constant(np.arange(4, dtype=np.float32))
    gemm = graph.op("Gemm", x, graph.weight(weights(4, 4), 0.01), bias, attributes=attributes)
    stays_float(graph, gemm, "Gemm")


def test_a_bias_at_another_scale_is_rewritten() -> None:
    graph, x = start()
    w = graph.weight(weights(2, 3, 1, 1), 0.01)
    bias = graph.weight(np.array([100, -7], np.int32), 0.001)
    model = to_integers(graph.model(graph.pair(graph.op("Conv", x, w, bias), Y)), "uint8")
    np.testing.assert_array_equal(constant(model, "Conv_4_bias"), [200, -14])


def test_a_value_that_is_also_wanted_as_float_stays_float() -> None:
    graph, x = start()
    conv = graph.op("Conv", x, graph.weight(weights(2, 3, 1, 1), 0.01))
    model = to_integers(graph.model(conv, graph.pair(conv, Y)), "uint8")
    kinds = [node.op_type for node in model.graph]
    assert kinds == ["Quantize", "Dequantize", "Conv", "Quantize", "Dequantize"]
    (w,) = [v for v in model.graph.initializers.values() if v.shape == ir.Shape([2, 3, 1, 1])]
    assert w.dtype == ir.DataType.FLOAT


def test_8_bit_outputs_keep_name_and_dtype() -> None:
    for dtype, storage in (("int8", "uint8"), ("uint8", "int8"), ("uint8", "uint8")):
        weights = {"s": np.array(0.1, np.float32), "z": np.array(3, dtype)}
        body = "r = Relu(x) q = QuantizeLinear(r, s, z) y = DequantizeLinear(q, s, z)"
        signature = f"(float[2,3] x) => ({dtype}[2,3] q, float[2,3] y)"
        model = to_integers(shaped(net(signature, body, weights)), storage)
        names = [value.name for node in model.graph for value in node.outputs]
        assert len(set(names)) == len(names)
        assert [(v.name, str(v.dtype).lower()) for v in model.graph.outputs] == [
            ("q", dtype),
            ("y", "float"),
        ]


def test_without_a_zero_point_the_dtype_is_that_of_the_data() -> None:
    body = "d = DequantizeLinear(x, s) r = Relu(d) q = QuantizeLinear(r, s) y = Cast<to=1>(q)"
    model = shaped(net("(int8[2,3] x) => (float[2,3] y)", body, {"s": np.array(0.1, np.float32)}))
    lines = nodes(to_integers(model, "uint8")).splitlines()
    assert lines[0].startswith("x_stored = Rescale(x) {high=255, low=0, multiplier=1.0")
    assert "x_zero_point=0, zero_point=128" in lines[0]
    assert "x_zero_point=128, zero_point=0" in lines[1]


def test_is_quantized() -> None:
    graph, x = start()
    assert is_quantized(graph.model(graph.op("Relu", x)))
    assert not is_quantized(net("(float[2] x) => (float[2] y)", "y = Relu(x)"))


# 16 bits -------------------------------------------------------------------------------------

X16: Scale = (1e-3, 0)
Y16: Scale = (2e-3, 0)


def wide_start(
    shape: tuple[int, ...] = (1, 3, 6, 6), limit: float | None = None
) -> tuple[Qdq, str]:
    graph, x = Qdq(shape, "int16"), "x"
    if limit is not None:
        x = graph.op("Clip", x, *(graph.constant(np.float32(v)) for v in (-limit, limit)))
    return graph, graph.pair(x, X16)


@pytest.mark.parametrize("storage", ["uint8", "int8"])
def test_16_bits_are_stored_as_they_are(storage: str) -> None:
    graph, x = wide_start()
    w = weights(2, 3, 3, 3)
    y = graph.op("Relu", graph.op("Conv", x, graph.weight(w, 0.01)))
    model = to_integers(graph.model(graph.pair(y, Y16)), storage)
    assert nodes(model).splitlines() == [
        "v2 = Quantize(x) {scale=0.0010000000474974513, zero_point=0}",
        "v12 = QConv(v2, Conv_3_weights, Conv_3_bias, Conv_3_multipliers) {dilations=[1,1], "
        "group=1, high=32767, kernel=[3,3], low=0, pads=[0,0,0,0], strides=[1,1], "
        "x_zero_point=0, zero_point=0}",
        "v13 = Dequantize(v12) {scale=0.0020000000949949026, zero_point=0}",
    ]
    assert [str(v.dtype) for node in model.graph for v in node.outputs][:2] == ["INT16", "INT16"]
    np.testing.assert_array_equal(constant(model, "Conv_3_weights"), w)


def test_weights_may_have_16_bits() -> None:
    graph, x = wide_start()
    w = weights(2, 3, 1, 1).astype(np.int16) * 100
    model = to_integers(
        graph.model(graph.pair(graph.op("Conv", x, graph.weight(w, 1e-4)), Y16)), "uint8"
    )
    assert constant(model, "Conv_3_weights").dtype == np.int16
    graph, x = start()
    model = to_integers(
        graph.model(graph.pair(graph.op("Conv", x, graph.weight(w, 1e-4)), Y)), "uint8"
    )
    assert constant(model, "Conv_3_weights").dtype == np.int16


def test_8_and_16_bits_meet() -> None:
    graph, x = start()
    wide = graph.pair(x, X16, "int16")
    lines = inside(graph, graph.op("Add", wide, x))
    assert lines[0].startswith("v6 = Rescale(v2) {high=32767, low=-32768, multiplier=50.")
    assert lines[1].startswith("v11 = QAdd(v6, v2) {a_factor=1, a_zero_point=0, b_factor=50, ")
    assert "b_zero_point=120" in lines[1]


def test_sums_of_16_bits_that_could_overflow_stay_float() -> None:
    """More than 65,535 steps of weights on values of 16 bits, unless a Clip makes them fewer."""
    w = np.full((700, 1), 100, np.int8)
    graph, x = wide_start((1, 700))
    stays_float(graph, graph.op("MatMul", x, graph.weight(w, 0.01)), "MatMul")
    graph, x = wide_start((1, 700), limit=30.0)
    lines = nodes(
        to_integers(
            graph.model(graph.pair(graph.op("MatMul", x, graph.weight(w, 0.01)), Y16)), "int8"
        )
    ).splitlines()
    assert (
        lines[0]
        == "v5 = Quantize(x) {high=30000, low=-30000, scale=0.0010000000474974513, zero_point=0}"
    )
    assert " = QGemm(" in lines[1]
    graph, x = wide_start((1, 700))
    w[::2] *= -1
    lines = inside(
        graph, graph.op("MatMul", graph.pair(graph.op("Relu", x), X16), graph.weight(w, 0.01))
    )
    assert " = QGemm(" in lines[1]  # half of the weights pull the other way


def test_a_16_bit_zero_point_stays_float() -> None:
    graph = Qdq((2,), "int16")
    scale, zero = graph.constant(np.float32(0.1)), graph.constant(np.int16(5))
    x = graph.op("DequantizeLinear", graph.op("QuantizeLinear", "x", scale, zero), scale, zero)
    model = to_integers(graph.model(graph.op("Relu", x)), "uint8")
    assert [node.op_type for node in model.graph] == ["QuantizeLinear", "DequantizeLinear", "Relu"]


def test_large_windows_of_16_bits_stay_float() -> None:
    graph, x = wide_start((1, 1, 257, 257))
    stays_float(graph, graph.op("GlobalAveragePool", x), "GlobalAveragePool")


def test_a_sigmoid_of_16_bits_is_interpolated() -> None:
    graph, x = wide_start()
    model = to_integers(graph.model(graph.pair(graph.op("Sigmoid", x), (2.0**-15, 0))), "uint8")
    line = nodes(model).splitlines()[1]
    assert line.startswith("v7 = Table(v2, v7_table) {bits=")
    assert line.endswith("fraction=0}")


# Fixed point ---------------------------------------------------------------------------------


def fixed(dtype: str = "int8") -> tuple[Qdq, str]:
    graph = Qdq((1, 3, 6, 6), dtype)
    return graph, graph.pair("x", (2.0**-5, 128))


def test_powers_of_two_become_shifts() -> None:
    graph, x = fixed()
    scales = np.array([2.0**-7, 2.0**-9], np.float32)
    conv = graph.op("Conv", x, graph.weight(weights(2, 3, 3, 3), scales))
    model = to_integers(graph.model(graph.pair(conv, (2.0**-3, 128))), "int8")
    found = constant(model, "Conv_3_shifts")
    assert found.dtype == np.int32
    assert found.tolist() == [9, 11]
    assert nodes(model).splitlines()[1].startswith("v11 = QConv(v2, Conv_3_weights, Conv_3_bias, ")


def test_a_channel_that_vanishes_has_no_weights() -> None:
    graph, x = fixed()
    scales = np.array([2.0**-90, 2.0**40], np.float32)
    conv = graph.op("Conv", x, graph.weight(weights(2, 3, 3, 3), scales))
    model = to_integers(graph.model(graph.pair(conv, (2.0**-3, 128))), "int8")
    assert constant(model, "Conv_3_shifts").tolist() == [0, -17]
    assert not constant(model, "Conv_3_weights")[0].any()
    assert constant(model, "Conv_3_weights")[1].any()


@pytest.mark.parametrize(
    ("op_type", "wanted"),
    [("Relu", "shift=-2"), ("Add", "shift=19"), ("Sub", "shift=19"), ("Mul", "shift=3")],
)
def test_single_shifts(op_type: str, wanted: str) -> None:
    graph, x = fixed()
    operands = (x,) if op_type == "Relu" else (x, x)
    lines = inside(graph, graph.op(op_type, *operands), scale=(2.0**-7, 128))
    assert wanted in lines[0]
    assert "multiplier" not in lines[0]


def test_averages_have_integer_factors() -> None:
    graph, x = fixed("int16")
    y = graph.pair(graph.op("GlobalAveragePool", x), (2.0**-5, 128))
    model = to_integers(graph.model(y), "int8")
    assert "shift=36" in nodes(model).splitlines()[1]
    factors = constant(model, "v7_factors")
    assert factors.dtype == np.int32
    assert factors.item() == round(2**36 / 36)


def test_one_other_scale_takes_multipliers() -> None:
    graph, x = fixed()
    scales = np.array([2.0**-7, 0.01], np.float32)
    conv = graph.op("Conv", x, graph.weight(weights(2, 3, 3, 3), scales))
    assert "Conv_3_multipliers" in inside(graph, conv, scale=(2.0**-3, 128))[0]
    graph, x = start()
    assert "multiplier=1.0" in inside(graph, graph.op("Relu", x), scale=X)[0]
