from __future__ import annotations

import numpy as np
import pytest

from edgepress.calibration.base import Array, Samples
from edgepress.passes._shapes import refresh_shapes
from edgepress.passes.base import Context
from edgepress.passes.calibrate import Calibrate
from edgepress.passes.quantize_int8 import QuantizeInt8
from tests.graphs import apply, net, random
from tests.passes.int8_nets import (
    PAIR,
    SQNR_BUDGET_DB,
    consumers,
    made,
    maker,
    parameters,
    quantized,
    small_cnn,
    sqnr_db,
)


def test_float_readers_get_the_dequantized_value_and_are_reported() -> None:
    model = made(
        "(float[1,4] x) => (float[1,4] y, float[1,3] z)",
        "h = Gemm(x, w) y = LogSoftmax(h) e = Sub(y, h) z = Gemm(e, v)",
        w=random(4, 4),
        v=random(4, 3),
    )
    before = model.clone()
    outcome = quantized(model)
    assert outcome.skipped == [
        ("LogSoftmax_1", "LogSoftmax has no 8-bit form here"),
        ("Sub_2", "its input 'y' is float"),
    ]
    assert outcome.stats["float_nodes"] == 2
    assert outcome.stats["float_islands"] == 1
    assert [maker(v) for n, v in consumers(model) if n.op_type == "LogSoftmax"] == [PAIR[1]]
    assert [maker(v) for n, v in consumers(model) if n.op_type == "Sub"] == ["LogSoftmax", PAIR[1]]
    assert maker(model.graph.outputs[0]) == "LogSoftmax"
    assert sqnr_db(before, model) >= SQNR_BUDGET_DB


def test_a_float_output_that_integers_read_stays_as_exact_as_it_was() -> None:
    model = made(
        "(float[1,4] x) => (float[1,4] y, float[1,3] z)",
        "h = Gemm(x, w) y = LogSoftmax(h) z = Gemm(y, v)",
        w=random(4, 4),
        v=random(4, 3),
    )
    quantized(model)
    assert maker(model.graph.outputs[0]) == "LogSoftmax"
    assert maker(model.graph.outputs[1]) == PAIR[1]


def test_a_rectifier_folds_only_into_a_node_that_nobody_else_reads() -> None:
    model = made(
        "(float[1,4] x) => (float[1,4] y, float[1,4] g)",
        "h = Gemm(x, w) r = Relu(h) y = Add(r, h) g = Gemm(x, v) z = Relu(g) q = Mul(z, z)",
        w=random(4, 4),
        v=random(4, 4, seed=1),
    )
    quantized(model)
    read = [maker(v) for node, v in consumers(model) if node.op_type == "Relu"]
    assert read == [PAIR[1], PAIR[1]]


def test_a_constant_of_a_concat_takes_its_scale() -> None:
    model = made(
        "(float[1,4] x) => (float[1,6] y)",
        "h = Gemm(x, w) y = Concat <axis=1> (h, p)",
        w=random(4, 4),
        p=random(1, 2),
    )
    quantized(model)
    (constant,) = (n for n in model.graph if n.name == "p_DequantizeLinear")
    assert [v.name for v in constant.inputs[1:] if v] == ["y_scale", "y_zero_point"]
    assert parameters(model, "h") == ("y_scale", "y_zero_point")


def test_followers_and_carriers_in_a_float_island_stay_float() -> None:
    model = made(
        "(float[1,4] x) => (float[1,4] y)",
        "l = LayerNormalization(x, s) r = Reshape(l, shape) a = Add(r, r) t = Tanh(a) "
        "u = Reshape(t, back) y = Gemm(u, w)",
        s=random(4), w=random(4, 4), shape=np.array([2, 2]), back=np.array([1, 4]),
    )  # fmt: skip
    outcome = quantized(model)
    assert dict(outcome.skipped) == {
        "LayerNormalization_0": "LayerNormalization has no 8-bit form here",
        "Reshape_1": "its input 'l' is float",
        "Add_2": "its input 'r' is float",
        "Tanh_3": "its input 'a' is float",
    }
    # the last Reshape carries integers to its consumer
    assert parameters(model, "u") == parameters(model, "t") == ("t_scale", "t_zero_point")


def test_carriers_and_followers_between_the_input_and_an_anchor_are_quantized() -> None:
    model = made(
        "(float[1,4,4,3] x) => (float[1,2,4,4] y)",
        "t = Transpose <perm=[0,3,1,2]> (x) m = Mul(t, k) a = Add(m, o) y = Conv(a, w)",
        k=np.array(0.5, np.float32), o=random(3, 1, 1), w=random(2, 3, 1, 1),
    )  # fmt: skip
    assert quantized(model).skipped == []
    assert parameters(model, "t") == parameters(model, "x")


CARRIED = {
    "Transpose <perm=[0,1,3,2]> (r)": {},
    "Reshape(r, p)": {"p": np.array([1, 4, 2, 18])},
    "Flatten(r)": {},
    "Unsqueeze(r, p)": {"p": np.array([1])},
    "Slice(r, p, q)": {"p": np.array([0, 0, 1, 1]), "q": np.array([1, 2, 4, 4])},
    "Gather <axis=1> (r, p)": {"p": np.array([2, 0])},
    "Pad(r, p)": {"p": np.array([0, 0, 1, 1, 0, 0, 1, 1])},
    'Pad <mode="edge"> (r, p)': {"p": np.array([0, 0, 1, 1, 0, 0, 1, 1])},
    'Pad <mode="reflect"> (r, p)': {"p": np.array([0, 0, 1, 1, 0, 0, 1, 1])},
    "DepthToSpace <blocksize=2> (r)": {},
    "SpaceToDepth <blocksize=2> (r)": {},
    "Expand(r, p)": {"p": np.array([2, 4, 6, 6])},
    "MaxPool <kernel_shape=[2,2]> (r)": {},
    "Resize(r, , p)": {"p": np.array([1, 1, 2, 2], np.float32)},
}


@pytest.mark.parametrize("text", CARRIED)
def test_carriers_pass_scale_and_zero_point_on(text: str) -> None:
    signature = "(float[1,4,6,6] x) => (float[] y)"
    body = f"c = Conv(x, w) r = Relu(c) y = {text}"
    model = net(signature, body, {"w": random(4, 4, 1, 1), **CARRIED[text]})
    model.graph.outputs[0].shape = None
    refresh_shapes(model)
    before = model.clone()
    assert quantized(model).skipped == []
    assert parameters(model, "y_QuantizeLinear_Input") == ("r_scale", "r_zero_point")
    assert sqnr_db(before, model) >= SQNR_BUDGET_DB


def test_every_output_of_a_split_shares_the_scale() -> None:
    model = made(
        "(float[1,4,6,6] x) => (float[1,2,6,6] y)",
        "c = Conv(x, w) s, t = Split <axis=1> (c, half) y = Add(s, t)",
        w=random(4, 4, 1, 1),
        half=np.array([2, 2]),
    )
    assert quantized(model).skipped == []
    shared = parameters(model, "c")
    assert parameters(model, "s") == parameters(model, "t") == shared == ("c_scale", "c_zero_point")


FOLLOWED = {
    "AveragePool <kernel_shape=[2,2]> (c)": {},
    "Elu(c)": {},
    "HardSigmoid(c)": {},
    "HardSwish(c)": {},
    "LeakyRelu(c)": {},
    "Mul(c, x)": {},
    "ReduceMean <axes=[-1, 2]> (c)": {},
    "Sigmoid(c)": {},
    "Tanh(c)": {},
    'Resize <mode="linear"> (c, , p)': {"p": np.array([1, 1, 2, 2], np.float32)},
    "Concat <axis=1> (c, x, p)": {"p": random(1, 1, 6, 6)},
    "Mul(p, c)": {"p": random(4, 1, 1)},
}


@pytest.mark.parametrize("text", FOLLOWED)
def test_followers_are_quantized_with_a_scale_of_their_own(text: str) -> None:
    body = f"c = Conv(x, w) y = {text}"
    model = net(
        "(float[1,4,6,6] x) => (float[] y)", body, {"w": random(4, 4, 1, 1), **FOLLOWED[text]}
    )
    model.graph.outputs[0].shape = None
    refresh_shapes(model)
    before = model.clone()
    assert quantized(model).skipped == []
    assert parameters(model, "y_QuantizeLinear_Input") == ("y_scale", "y_zero_point")
    assert sqnr_db(before, model) >= SQNR_BUDGET_DB


FLOATS: dict[str, tuple[str, dict[str, Array]]] = {
    "Gemm <alpha=2.0> (x, w)": ("alpha and beta must be 1", {"w": random(4, 4)}),
    "Gemm <transA=1> (x, w)": ("transA must be 0", {"w": random(4, 4)}),
    "Gemm(x, x)": ("its input 'x' is not constant", {}),
    "Gemm(x, w, b)": ("differs per row", {"w": random(4, 4), "b": random(4, 1)}),
    "MatMul(w, x)": ("its first input is constant", {"w": random(4, 4)}),
    "ConvTranspose(i, w)": ("ConvTranspose has no 8-bit form", {"w": random(1, 1, 3, 3)}),
    "Conv(i, i)": ("its input 'i' is not constant", {}),
    "ReduceMean <axes=[1]> (i)": ("does not reduce exactly the spatial axes", {}),
    "ReduceMean <axes=[1]> (x)": ("it has no spatial axes", {}),
    "Pad(x, p, f)": (
        "it pads with 1.5, which", {"p": np.array([0, 1, 0, 1]), "f": np.array(1.5, np.float32)},
    ),
    'Resize <mode="cubic"> (i, , s)': (
        "its mode 'cubic' overshoots", {"s": np.array([1, 1, 2, 2], np.float32)},
    ),
    "Div(x, x)": ("Div has no 8-bit form", {}),
    "LogSoftmax(x)": ("LogSoftmax has no 8-bit form", {}),
}  # fmt: skip


@pytest.mark.parametrize("text", FLOATS)
def test_what_cannot_be_an_integer_stays_float_and_says_why(text: str) -> None:
    why, weights = FLOATS[text]
    signature = "(float[4,4] x, float[1,1,4,4] i) => (float[] y, float[4,4] z)"
    model = net(signature, f"y = {text} z = Gemm(x, q)", {"q": random(4, 4), **weights})
    model.graph.outputs[0].shape = None
    refresh_shapes(model)
    context = Context(samples=Samples({"x": random(3, 4, 4), "i": random(3, 1, 4, 4)}))
    Calibrate().call(model, context)
    outcome = apply(QuantizeInt8(), model, context)
    ((name, said),) = outcome.skipped
    assert name == f"{text.split()[0].split('(')[0]}_0"
    assert why in said


def test_skipped_nodes_stay_float_with_what_follows_them() -> None:
    model = small_cnn()
    outcome = quantized(model, skip=("Conv_2", "Gemm.*"))
    assert dict(outcome.skipped) == {
        "Conv_2": "skipped by 'Conv_2'",
        "Clip_3": "its input 'd' is float",
        "Add_4": "its input 'e' is float",
        "Gemm_11": "skipped by 'Gemm.*'",
    }
    assert outcome.stats["float_islands"] == 2
    assert "w2" in model.graph.initializers
