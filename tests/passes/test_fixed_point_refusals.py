"""What quantize-fixed-point refuses, and what it says then."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.calibration.base import Range
from edgepress.passes._shapes import refresh_shapes
from edgepress.passes.base import Context, PassRefused
from edgepress.passes.quantize_fixed_point import QuantizeFixedPoint
from tests.graphs import net, random
from tests.passes.fixed_point_nets import fixed
from tests.passes.int8_nets import conv_relu, made, quantized


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 12}, "bits: it is 12; choose 8 or 16"),
        ({"rounding": "up"}, "choose 'nearest' or 'stochastic'"),
        ({"floats": "keep"}, "choose 'refuse' or 'allow'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassRefused, match=message):
        fixed(conv_relu(), **options)


def test_what_would_compute_in_float_is_refused_by_name() -> None:
    signature = "(float[1,3,6,6] x) => (float[1,4] y, double[1,3,6,6] z)"
    body = "c = Conv(x, w) n = Sin(c) g = GlobalAveragePool(n) y = Flatten(g) z = Cast <to=11> (x)"
    model = made(signature, body, w=random(4, 3, 3, 3))
    with pytest.raises(PassRefused) as caught:
        fixed(model.clone(), bits=8)
    for word in ("Sin_1", "Cast_4", 'floats = "allow"', "of 5 nodes have no integer form"):
        assert word in str(caught.value)
    assert "Conv_0" not in str(caught.value)
    outcome = fixed(model, bits=8, floats="allow")
    assert "Sin_1" in [what for what, _ in outcome.skipped]
    assert outcome.stats["float_islands"] >= 1


@pytest.mark.parametrize(
    ("signature", "body", "message"),
    [
        ("(float[1,2,8] x) => (float[1,2,6] y)", "y = Conv(x, c)", "a Conv over 1 axes"),
        ("(float[1,2,8] x) => (float[1,2,2] y)", "t = Transpose <perm=[0,2,1]> (x) "
         "y = MatMul(x, t)", "only a product with a constant matrix"),
        ("(float[1,2,5,5] x) => (float[1,2,3,3] y)",
         "y = MaxPool <kernel_shape=[2,2], strides=[2,2], ceil_mode=1> (x)", "set ceil_mode = 0"),
        ("(float[1,2,8] x) => (float[1,2,1] y)", "y = GlobalAveragePool(x)", "not over 2 axes"),
        ("(float[1,1,300,300] x) => (float[1,1,1,1] y)", "y = GlobalAveragePool(x)",
         "a sum of 90000 values of 16 bits may overflow"),
        ("(float[1,2,2,2] x) => (float[1,2,4,4] y)",
         'y = Resize <mode="linear"> (x, none, scales)', "nearest neighbour"),
    ],
)  # fmt: skip
def test_operators_without_integer_form_are_refused(
    signature: str, body: str, message: str
) -> None:
    given = {
        "c": random(2, 2, 3),
        "none": np.zeros(0, np.float32),
        "scales": np.array([1, 1, 2, 2], np.float32),
    }
    model = net(signature, body, {name: array for name, array in given.items() if name in body})
    refresh_shapes(model)
    with pytest.raises(PassRefused, match=message):
        fixed(model)


def test_missing_ranges_and_an_old_opset_are_refused() -> None:
    with pytest.raises(PassRefused, match="no calibrated range for value 'x'; put `calibrate`"):
        QuantizeFixedPoint().requires(conv_relu(), Context())
    old = made("(float[1,4] x) => (float[1,4] y)", "y = Gemm(x, w)", opset=12, w=random(4, 4))
    with pytest.raises(PassRefused, match="it has opset 12, per-channel scales need 13"):
        fixed(old)


def test_numbers_that_are_not_finite_are_refused() -> None:
    model = made(
        "(float[1,4] x) => (float[1,4] y)", "h = Gemm(x, w) y = Mul(h, c)",
        w=random(4, 4), c=np.array([1, 2, np.inf, 0], np.float32),
    )  # fmt: skip
    for value in (*model.graph.inputs, *(v for n in model.graph for v in n.outputs)):
        value.meta["range"] = Range(-1.0, 1.0)
    with pytest.raises(PassRefused, match=r"constant 'c': the range 0.0 to inf is not finite"):
        QuantizeFixedPoint().call(model.clone(), Context())
    bad = random(4, 4)
    bad[1, 2] = np.nan
    model.graph.initializers["w"].const_value = ir.tensor(bad, name="w")
    with pytest.raises(PassRefused, match=r"node 'Gemm_0': .* not finite.*check its weights"):
        QuantizeFixedPoint().call(model, Context())


def test_a_model_quantized_otherwise_is_refused() -> None:
    model = quantized(conv_relu()).model
    with pytest.raises(PassRefused, match="nodes quantize it already, not in fixed point"):
        QuantizeFixedPoint().requires(model, Context())
