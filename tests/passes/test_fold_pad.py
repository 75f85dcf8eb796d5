from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.passes._shapes import refresh_shapes
from edgepress.passes.base import Outcome
from edgepress.passes.fold_pad import FoldPad
from tests.graphs import apply, conv_nets, net, nodes, random

WEIGHTS = {
    "w": random(2, 2, 3, 3),
    "p": np.array([0, 0, 0, 1, 0, 0, 1, 2]),
    "spatial": np.array([0, 1, 1, 2]),
    "two_three": np.array([2, -1]),
    "channels": np.array([0, 1, 0, 0, 0, 0, 0, 0]),
    "crop": np.array([0, 0, -1, 0, 0, 0, 0, 0]),
    "zero": np.array(0, np.float32),
    "half": np.array(0.5, np.float32),
    "low": np.array(-np.inf, np.float32),
}


def folded(body: str, opset: int = 18) -> Outcome:
    model = net("(float[1,2,6,6] x) => (float[1,2,H,W] y)", body, WEIGHTS, opset=opset)
    refresh_shapes(model)
    for name in [n for n, v in model.graph.initializers.items() if not v.uses()]:
        del model.graph.initializers[name]
    return apply(FoldPad(), model)


@pytest.mark.parametrize(
    ("body", "golden"),
    [
        ("a = Pad(x, p) y = Conv(a, w)", "y = Conv(x, w) {pads=[0,1,1,2]}"),
        ("a = Pad(x, p, zero) y = Conv(a, w)", "y = Conv(x, w) {pads=[0,1,1,2]}"),
        (
            "a = Pad(x, spatial, zero, two_three) y = Conv <pads=[1,0,0,1]> (a, w)",
            "y = Conv(x, w) {pads=[1,1,1,3]}",
        ),
        (
            'a = Pad(x, p) y = Conv <auto_pad="VALID", strides=[2,2]> (a, w)',
            "y = Conv(x, w) {pads=[0,1,1,2], strides=[2,2]}",
        ),
        (
            "a = Pad(x, p) y = AveragePool <kernel_shape=[3,4]> (a)",
            "y = AveragePool(x) {count_include_pad=1, kernel_shape=[3,4], pads=[0,1,1,2]}",
        ),
        (
            "a = Pad(x, p, low) y = MaxPool <kernel_shape=[3,3]> (a)",
            "y = MaxPool(x) {kernel_shape=[3,3], pads=[0,1,1,2]}",
        ),
        (
            "a = Pad(x, p) b = Conv(a, w) c = Conv(a, w) y = Add(b, c)",
            "b = Conv(x, w) {pads=[0,1,1,2]}\nc = Conv(x, w) {pads=[0,1,1,2]}\ny = Add(b, c)",
        ),
    ],
)
def test_folds(body: str, golden: str) -> None:
    outcome = folded(body)
    assert nodes(outcome.model) == golden
    assert outcome.stats == {"folded": 1}


def test_the_form_until_opset_10() -> None:
    outcome = folded("a = Pad <pads=[0,0,1,1,0,0,1,1]> (x) y = Conv(a, w)", opset=10)
    assert nodes(outcome.model) == "y = Conv(x, w) {pads=[1,1,1,1]}"


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("a = Pad(x, p, half) y = Conv(a, w)", "it pads with 0.5, Conv_1 with zeros"),
        ('a = Pad <mode="edge"> (x, p) y = Conv(a, w)', "does not pad with a constant"),
        ("a = Pad(x, crop) y = Conv(a, w)", "it crops"),
        ("b = Pad(x, channels) a = Concat <axis=1> (b, x) y = Relu(a)", "batch or the channels"),
        ("a = Pad(x, p) y = Relu(a)", "no Conv and no pool"),
        ("y = Pad(x, p)", "is an output of the model"),
        ("a = Pad(x, p) b = Relu(a) c = Conv(a, w) y = Concat <axis=1> (c, c)", "no Conv"),
        ('a = Pad(x, p) y = Conv <auto_pad="SAME_UPPER"> (a, w)', "auto_pad"),
        ("a = Pad(x, p) y = MaxPool <kernel_shape=[3,3]> (a)", "MaxPool_1 with -inf"),
        ("a = Pad(x, p) y = AveragePool <kernel_shape=[2,2]> (a)", "nothing but padding"),
        (
            "a = Pad(x, p) y = AveragePool <kernel_shape=[3,3], ceil_mode=1, strides=[2,2]> (a)",
            "rounds its output up",
        ),
        (
            "a = Pad(x, p) y = AveragePool <kernel_shape=[5,5], pads=[1,1,1,1]> (a)",
            "leaves its own padding out",
        ),
        (
            "a = Pad(x, p, low) y, i = MaxPool <kernel_shape=[3,3]> (a) j = Neg(i)",
            "answers indices",
        ),
    ],
)
def test_says_why_not(body: str, why: str) -> None:
    outcome = folded(body)
    assert not outcome.modified
    assert [why in reason for _, reason in outcome.skipped] == [True]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 2), min_size=4, max_size=4),
    st.lists(st.integers(0, 2), min_size=4, max_size=4),
    st.integers(1, 3),
    st.sampled_from(["Conv", "AveragePool"]),
)
def test_random_amounts(amounts: list[int], own: list[int], stride: int, reader: str) -> None:
    count = ", count_include_pad=1" if reader == "AveragePool" else ""
    text = f"<kernel_shape=[3,3], pads={own}, strides=[{stride},{stride}]{count}>"
    weights = {"w": random(2, 2, 3, 3), "p": np.array([0, 0, *amounts[:2], 0, 0, *amounts[2:]])}
    arguments = "a, w" if reader == "Conv" else "a"
    body = f"a = Pad(x, p) y = {reader} {text} ({arguments})"
    model = net("(float[1,2,6,6] x) => (float[1,2,H,W] y)", body, weights)
    if reader == "AveragePool":
        del model.graph.initializers["w"]
    refresh_shapes(model)
    outcome = apply(FoldPad(), model)
    fits = all(a + b < 3 for a, b in zip(amounts, own, strict=True))
    assert outcome.modified == (reader == "Conv" or fits)


@settings(deadline=None, max_examples=25)
@given(conv_nets())
def test_random_nets(model: ir.Model) -> None:
    refresh_shapes(model)
    outcome = apply(FoldPad(), model)
    assert not any(node.op_type == "Pad" for node in outcome.model.graph)
