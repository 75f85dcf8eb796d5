"""The float model of a bundle: quantization taken out of a graph computes what its weights say."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.calibration.base import Array, Samples
from edgepress.passes.base import Context, refresh_shapes
from edgepress.passes.calibrate import Calibrate
from edgepress.passes.quantize_int8 import QuantizeInt8
from edgepress.pipeline._explain_workbench import to_float
from edgepress.pipeline.oracle import Oracle, sqnr_db
from tests.graphs import net, random
from tests.pipeline.conftest import cnn


def quantized(model: ir.Model, x: Array) -> ir.Model:
    """Quantize with the default passes."""
    refresh_shapes(model, "test")
    context = Context(samples=Samples(inputs={"x": x}))
    for step in (Calibrate(), QuantizeInt8()):
        model = step.call(model, context).model
        refresh_shapes(model, "test")
    return model


def small() -> tuple[ir.Model, Array]:
    model = cnn()
    model.graph.inputs[0].shape = ir.Shape([1, 3, 8, 8])
    return model, random(4, 3, 8, 8)


def test_nothing_quantized_is_left_and_names_stay() -> None:
    model, x = small()
    names = [node.name for node in model.graph]
    plain = to_float(quantized(model, x))
    assert [node.name for node in plain.graph] == names
    assert [value.name for value in plain.graph.outputs] == ["y"]
    constants = plain.graph.initializers.values()
    assert {str(value.dtype) for value in constants} == {"FLOAT"}


def test_it_computes_with_the_weights_that_the_integers_stand_for() -> None:
    model, x = small()
    original = Oracle(model.clone())
    plain = Oracle(to_float(quantized(model, x)))
    answers = [[oracle.run({"x": sample[None]}) for sample in x] for oracle in (original, plain)]
    assert 35 < sqnr_db(*answers) < 100  # rounding weights to 8 bits costs something, not much


def test_quantizing_it_again_gives_the_same_weights() -> None:
    model, x = small()
    first = quantized(model, x)
    weights = {v.name: v.const_value.numpy() for v in first.graph.initializers.values()
               if v.const_value is not None and v.dtype == ir.DataType.INT8}  # fmt: skip
    again = quantized(to_float(first.clone()), x)
    found = [v.const_value.numpy() for v in again.graph.initializers.values()
             if v.const_value is not None and v.dtype == ir.DataType.INT8]  # fmt: skip
    assert len(found) == len(weights) > 0
    for one, other in zip(weights.values(), found, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "body",
    [
        "q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)",
        "r = Relu(x) q = QuantizeLinear(r, s, z) y = DequantizeLinear(q, s, z)",
        "r = Relu(x) q = QuantizeLinear(r, s, z) d = DequantizeLinear(q, s, z) y = Neg(d)",
    ],
)
def test_outputs_keep_their_names(body: str) -> None:
    parameters: dict[str, Array] = {
        "s": np.array(0.1, np.float32),
        "z": np.array(3, np.uint8),
    }
    model = net("(float[1,4] x) => (float[1,4] y)", body, parameters)
    refresh_shapes(model, "test")
    plain = to_float(model)
    x = random(1, 4)
    (answer,) = Oracle(plain).run({"x": x}).values()
    wanted = np.maximum(x, 0) if "Relu" in body else x
    np.testing.assert_array_equal(answer, -wanted if "Neg" in body else wanted)
    assert plain.graph.outputs[0].name == "y"
