from __future__ import annotations

import math

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnxruntime.quantization.quant_utils import compute_scale_zp

from edgepress.calibration.base import CalibrationError, Range
from edgepress.calibration.qparams import (
    LARGEST_BIAS,
    LIMITS,
    SMALLEST_SCALE,
    activation_qparams,
    dequantize,
    fit_bias,
    quantize,
    quantize_bias,
    weight_qparams,
)

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
DTYPES = st.sampled_from(["uint8", "int8"])


@given(ends=st.tuples(FLOATS, FLOATS), dtype=DTYPES, symmetric=st.booleans())
@settings(deadline=None, max_examples=50)
def test_the_range_and_zero_are_representable(
    ends: tuple[float, float], dtype: str, symmetric: bool
) -> None:
    low, high = sorted(ends)
    scale, zero_point = activation_qparams(Range(low, high), dtype, symmetric=symmetric)
    qmin, qmax = LIMITS[dtype]
    assert scale.dtype == np.float32
    assert SMALLEST_SCALE <= scale < math.inf
    assert qmin <= zero_point <= qmax
    assert quantize(np.array([0], "f"), scale, zero_point, dtype) == zero_point
    slack = float(scale) * 0.51
    assert (qmin - zero_point) * float(scale) - slack <= low
    assert (qmax - zero_point) * float(scale) + slack >= high


@given(ends=st.tuples(FLOATS, FLOATS), dtype=DTYPES)
@settings(deadline=None, max_examples=50)
def test_it_is_onnxruntimes_formula(ends: tuple[float, float], dtype: str) -> None:
    low, high = np.sort(np.array(ends, "f"))
    if max(high, 0) - min(low, 0) < 255 * SMALLEST_SCALE * 2:
        return  # onnxruntime has no floor
    qmin, qmax = (np.array(limit, dtype) for limit in LIMITS[dtype])
    zero_point, scale = compute_scale_zp(low, high, qmin, qmax)
    assert activation_qparams(Range(float(low), float(high)), dtype) == (scale, zero_point)


@pytest.mark.parametrize(
    ("dtype", "symmetric", "zero_point"),
    [("uint8", False, 0), ("int8", False, 0), ("uint8", True, 128), ("int8", True, 0)],
)
def test_nothing_but_zeros_has_scale_one(dtype: str, symmetric: bool, zero_point: int) -> None:
    expected = (np.float32(1), zero_point)
    assert activation_qparams(Range(0, 0), dtype, symmetric=symmetric) == expected


def test_symmetric_uses_the_same_steps_on_both_sides() -> None:
    assert activation_qparams(Range(-1.27, 0.5), "int8", symmetric=True) == (np.float32(0.01), 0)
    assert activation_qparams(Range(-0.5, 1.27), "uint8", symmetric=True) == (np.float32(0.01), 128)


@pytest.mark.parametrize("ends", [(math.nan, 1), (0, math.inf), (2, 1)])
def test_a_range_that_is_none_is_refused(ends: tuple[float, float]) -> None:
    with pytest.raises(CalibrationError, match=r"not finite|reversed"):
        activation_qparams(Range(*ends))


def onnxruntime_answer(
    op_type: str, x: np.ndarray, scale: np.ndarray, zero: np.ndarray
) -> np.ndarray:
    float_type = onnx.TensorProto.FLOAT
    integer = onnx.helper.np_dtype_to_tensor_dtype(zero.dtype)
    types = (float_type, integer) if op_type == "QuantizeLinear" else (integer, float_type)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(op_type, ["x", "s", "z"], ["y"], axis=0)],
        "g",
        [onnx.helper.make_tensor_value_info("x", types[0], x.shape)],
        [onnx.helper.make_tensor_value_info("y", types[1], x.shape)],
        [onnx.numpy_helper.from_array(scale, "s"), onnx.numpy_helper.from_array(zero, "z")],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return np.asarray(session.run(None, {"x": x})[0])


@given(
    x=arrays.arrays(np.float32, (4, 9), elements=st.floats(-1e4, 1e4, width=32)),
    scale=st.floats(2**-7, 10, width=32),
    dtype=DTYPES,
    zero=st.integers(0, 100),
)
@settings(deadline=None, max_examples=30)
def test_quantize_and_dequantize_are_onnxruntimes(
    x: np.ndarray, scale: float, dtype: str, zero: int
) -> None:
    scales = np.array([scale, scale * 2, scale / 2, 1], "f")
    zeros = np.array([zero, 0, 5, 7], dtype)
    integers = quantize(x, scales, zeros, dtype, axis=0)
    np.testing.assert_array_equal(integers, onnxruntime_answer("QuantizeLinear", x, scales, zeros))
    np.testing.assert_array_equal(
        dequantize(integers, scales, zeros, axis=0),
        onnxruntime_answer("DequantizeLinear", integers, scales, zeros),
    )


def test_ties_go_to_the_even_number_and_overflow_saturates() -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, 3e38, -3e38], "f")
    expected = [10, 12, 12, 10, 255, 0]
    assert quantize(x, np.float32(1), 10, "uint8").tolist() == expected
    assert quantize(x[4:], np.float32(1e-3), 0, "int8").tolist() == [127, -128]


def test_weights_get_one_scale_per_index_of_the_axis() -> None:
    weight = np.array([[1, -2, 0], [127, 3, 0]], "f")
    scales, zeros = weight_qparams(weight, 0)
    np.testing.assert_array_equal(scales, np.array([2 / 127, 1], "f"))
    assert zeros.dtype == np.int8
    assert zeros.tolist() == [0, 0]
    scale, zero = weight_qparams(weight, None)
    assert scale.shape == zero.shape == ()
    assert (float(scale), int(zero)) == (1, 0)
    scales, _ = weight_qparams(weight, 1)
    np.testing.assert_array_equal(scales, np.array([1, 3 / 127, 1], "f"))


def test_a_weight_of_zeros_gets_a_sane_scale() -> None:
    np.testing.assert_array_equal(
        weight_qparams(np.zeros((2, 3), np.float32), 0)[0], np.array([1 / 127] * 2, "f")
    )


@given(weight=arrays.arrays(np.float32, (3, 2, 2), elements=FLOATS), axis=st.integers(0, 2))
@settings(deadline=None, max_examples=50)
def test_weights_lose_at_most_half_a_step(weight: np.ndarray, axis: int) -> None:
    scales, zeros = weight_qparams(weight, axis)
    integers = quantize(weight, scales, zeros, "int8", axis)
    assert np.abs(integers.astype(int)).max() <= 127
    shape = [1, 1, 1]
    shape[axis] = -1
    error = integers * scales.astype(np.float64).reshape(shape) - weight
    assert (np.abs(error) <= 0.5001 * scales.reshape(shape)).all()


@given(
    bias=arrays.arrays(np.float32, 4, elements=st.floats(-1e6, 1e6, width=32)),
    weight_scales=arrays.arrays(np.float32, 4, elements=st.floats(2**-99, 1, width=32)),
    input_scale=st.floats(2**-66, 10, width=32),
)
@settings(deadline=None, max_examples=50)
def test_a_bias_always_fits(
    bias: np.ndarray, weight_scales: np.ndarray, input_scale: float
) -> None:
    fitted = fit_bias(weight_scales, np.float32(input_scale), bias)
    assert fitted.dtype == np.float32
    assert (fitted >= weight_scales).all()
    products = fitted * np.float32(input_scale)
    assert (products >= np.float32(SMALLEST_SCALE)).all()
    integers = quantize_bias(bias, products)
    assert integers.dtype == np.int32
    assert (np.abs(integers.astype(np.int64)) <= LARGEST_BIAS).all()
    fits = np.abs(bias) < LARGEST_BIAS / 2 * weight_scales.astype(float) * input_scale
    large = weight_scales.astype(float) * input_scale > 2 * SMALLEST_SCALE
    np.testing.assert_array_equal(fitted[fits & large], weight_scales[fits & large])


def test_one_scale_for_all_channels_fits_the_largest_bias() -> None:
    fitted = fit_bias(np.array(1e-9, np.float32), np.float32(1), np.array([0, 4, -8], "f"))
    assert fitted.shape == ()
    assert float(fitted) == pytest.approx(8 / LARGEST_BIAS, rel=1e-5)
