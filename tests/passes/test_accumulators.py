"""16-bit activations: what is written, and that no sum leaves int32."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.calibration.base import Samples
from edgepress.passes._accumulators import ACCUMULATOR, reach
from edgepress.passes._quantized_layer import quantize_layer
from edgepress.passes._shapes import refresh_shapes
from edgepress.passes.base import PassRefused
from tests.graphs import conv_nets, nodes, random, weight
from tests.passes.int8_nets import PAIR, conv_relu, made, quantized, small_cnn, sqnr_db


def dtypes(model: ir.Model) -> dict[str, str]:
    """The dtype of every quantized activation."""
    quantizing = [node for node in model.graph if node.op_type == PAIR[0]]
    return {str(n.inputs[0] and n.inputs[0].name): str(n.outputs[0].dtype) for n in quantizing}


def wide(inputs: int) -> ir.Model:
    return made(
        f"(float[1,{inputs},2,2] x) => (float[1,2] y)",
        "p = ReduceMean <axes=[2,3], keepdims=0> (x) h = Gemm(p, w, b) y = Relu(h)",
        w=np.sign(random(inputs, 2)) / 2,
        b=np.array([3.0, -9.0], np.float32),
    )


def test_a_node_reads_and_writes_16_bits() -> None:
    model = conv_relu()
    outcome = quantized(model, int16=("Conv_0",))
    after = outcome.model
    assert after.graph.opset_imports[""] == 21
    assert dtypes(after) == {"x": "INT16", "y_QuantizeLinear_Input": "INT16"}
    assert outcome.stats["activations_int16"] == 2
    for name in ("x", "y"):
        assert weight(after, f"{name}_zero_point") == 0
    assert weight(after, "w_quantized").dtype == np.int8
    assert weight(after, "b_quantized").dtype == np.int32
    assert "Clip" not in nodes(after)
    assert sqnr_db(model, after) > 40


def test_names_stay_and_only_named_nodes_change() -> None:
    model = small_cnn()
    names = [node.name for node in model.graph]
    after = quantized(model, int16=("Add_4",)).model
    kept = [node.name for node in after.graph if node.op_type not in PAIR]
    assert kept == names
    found = dtypes(after)
    # the pool behind the addition moves what it read
    assert {name for name, dtype in found.items() if dtype == "INT16"} == {"r", "e", "a", "m"}
    assert set(found.values()) == {"INT16", "UINT8"}


def test_outputs_alone_may_have_16_bits() -> None:
    model = small_cnn()
    after = quantized(model, int16_outputs=True).model
    found = dtypes(after)
    assert [name for name, dtype in found.items() if dtype == "INT16"] == ["y_QuantizeLinear_Input"]
    # there is room for values that no sample showed
    low, high = (-(2**15) * weight(after, "y_scale"), (2**15 - 1) * weight(after, "y_scale"))
    shown = small_cnn()
    assert quantized(shown).modified
    assert high - low > 3 * 255 * weight(shown, "y_scale")


def test_long_sums_get_fewer_steps_and_a_clamp() -> None:
    model = wide(2048)
    after = quantized(model, int16=(".*",)).model
    assert "p_Clip_Output = Clip(p, p_low, p_high)" in nodes(after)
    steps = np.abs(weight(after, "w_quantized").astype(np.int64)).sum(axis=0)
    scale = weight(after, "p_scale").astype(np.float64)
    largest = np.rint(weight(after, "p_high") / scale)
    assert (steps * largest + np.abs(weight(after, "b_quantized").astype(np.int64))).max() < 2**31
    assert largest > 2**31 / (2048 * 127) * 0.98
    assert sqnr_db(model, after) > 50


@pytest.mark.parametrize("op_type", ["Gemm", "MatMul"])
def test_the_reach_of_a_sum_counts_its_bias(op_type: str) -> None:
    node = ir.node(op_type, [ir.val("x"), ir.val("w"), ir.val("b")])
    bias = np.array([-5000.0, 0.0], np.float32)
    weights = np.array([[1, -2], [3, 4], [0, 0.5]], np.float32)
    layer = quantize_layer(node, weights, bias, np.float32(1.0), per_channel=True)
    sums = np.abs(layer.weight.astype(int)).sum(axis=0) * 1000
    assert layer.bias is not None
    assert reach(node, layer, 1000) == (sums + np.abs(layer.bias)).max() > sums.max()


def test_large_pools_get_fewer_steps() -> None:
    model = made(
        "(float[1,1,300,300] x) => (float[1,1,1,1] y)",
        "c = Conv(x, w) y = GlobalAveragePool(c)",
        w=random(1, 1, 1, 1),
    )
    after = quantized(model, int16=(".*",), samples=Samples({"x": random(1, 1, 300, 300)})).model
    largest = np.rint(weight(after, "c_high") / weight(after, "c_scale").astype(np.float64))
    assert largest * 300 * 300 < ACCUMULATOR


def test_a_pattern_without_a_match_is_refused() -> None:
    with pytest.raises(PassRefused, match="it matches no node's whole name"):
        quantized(conv_relu(), int16=("Conv",))


@given(model=conv_nets(), data=st.data())
@settings(deadline=None, max_examples=15)
def test_random_nets_run_with_16_bits_here_and_there(model: ir.Model, data: Any) -> None:
    refresh_shapes(model)
    names = [str(node.name) for node in model.graph]
    pattern = data.draw(st.sampled_from([".*", *names]))
    before = model.clone()
    outcome = quantized(model, int16=(pattern,))
    if pattern == ".*" and not outcome.skipped:
        assert set(dtypes(outcome.model).values()) <= {"INT16"}
        assert sqnr_db(before, outcome.model) > 25
    for node in outcome.model.graph:
        if node.op_type == "Concat":
            makers = [value.producer() for value in node.inputs if value is not None]
            made_by = {str(maker.inputs[0].dtype) for maker in makers if maker and maker.inputs[0]}
            assert len(made_by) == 1 or pattern != ".*"
