from __future__ import annotations

import numpy as np
import onnx.version_converter
import onnx_ir as ir
import pytest
from hypothesis import given, settings

from edgepress.passes._shapes import refresh_shapes
from edgepress.passes.base import Context, PassRefused
from edgepress.passes.raise_opset import RaiseOpset
from tests.graphs import Array, apply, conv_nets, net, random, weight


def test_golden() -> None:
    model = net(
        "(float[1,3,8,8] x) => (float[4,36] y)",
        "c = Conv(x, w) s = Squeeze <axes=[0]> (c) y = Flatten(s)",
        {"w": random(4, 3, 3, 3)},
        opset=9,
        ir_version=4,
    )
    model.metadata_props["made"] = "by hand"
    model.producer_name = "hand"
    refresh_shapes(model)
    outcome = apply(RaiseOpset(), model)
    assert outcome.stats == {"opset_before": 9, "opset": 17}
    after = outcome.model
    work = [node for node in after.graph if node.op_type != "Constant"]
    assert [node.name for node in work] == ["Conv_0", "Squeeze_1", "Flatten_2"]
    assert [value.name for node in work for value in node.outputs] == ["c", "s", "y"]
    assert not work[1].attributes
    assert after.metadata_props["made"] == "by hand"
    assert after.producer_name == "hand"
    assert after.ir_version == 8
    np.testing.assert_array_equal(weight(after, "w"), random(4, 3, 3, 3))


SCALES = np.array([1, 1, 1.7, 1.7], np.float32)


@pytest.mark.parametrize(
    ("opset", "signature", "body", "weights"),
    [
        (7, "[1,3,8,8] x) => (float[1,3,16,16]", "Upsample<scales=[1.0,1.0,2.0,2.0]>(x)", {}),
        (9, "[1,3,8,8] x) => (float[1,3,13,13]", 'Upsample<mode="linear">(x,s)', {"s": SCALES}),
        (10, "[1,3,8,8] x) => (float[1,3,13,13]", 'Resize<mode="linear">(x,s)', {"s": SCALES}),
        (10, "[1,3,8,8] x) => (float[1,3,13,13]", "Resize(x,s)", {"s": SCALES}),
        (10, "[1,3,8,8] x) => (float[1,3,4,4]", "Resize(x,s)", {"s": 1 / SCALES[[0, 1, 2, 2]]}),
        (7, "[2,3,4] x) => (float[2,3,4]", "Softmax<axis=1>(x)", {}),
        (10, "[1,2,3,3] x) => (float[1,2,5,5]", "Pad<pads=[0,0,1,1,0,0,1,1],value=0.5>(x)", {}),
        (9, "[1,3,4] x) => (float[1,2,4]", "Slice<axes=[1],starts=[0],ends=[2]>(x)", {}),
        (7, "[2,3] x) => (float[2,3]", "Clip<min=0.0,max=6.0>(x)", {}),
        (7, "[2,3] x) => (float[2,3]", "Dropout<ratio=0.3>(x)", {}),
        (11, "[2,3] x) => (float[2,1]", "ReduceSum<axes=[1]>(x)", {}),
        (
            9,
            "[2,3] x) => (float[2,3]",
            "Scatter(x,i,u)",
            {"i": np.zeros((1, 3), int), "u": random(1, 3)},
        ),
        (8, "[1,64] x) => (float[1,64]", "MatMul(x,w)", {"w": random(64, 64)}),
    ],
)
def test_old_forms_compute_the_same(
    opset: int, signature: str, body: str, weights: dict[str, Array]
) -> None:
    model = net(f"(float{signature} y)", f"y = {body}", weights, opset=opset)
    refresh_shapes(model)
    outcome = apply(RaiseOpset(), model)
    assert outcome.modified
    assert outcome.model.graph.opset_imports == {"": 17}


def test_a_new_model_stays() -> None:
    outcome = RaiseOpset().call(
        net("(float[2] x) => (float[2] y)", "y = Relu(x)", opset=21), Context()
    )
    assert not outcome.modified
    assert outcome.stats == {"opset_before": 21, "opset": 21}


def test_an_old_ir_version_rises() -> None:
    model = net("(float[2] x) => (float[2] y)", "y = Relu(x)", ir_version=4)
    refresh_shapes(model)
    assert apply(RaiseOpset(), model).modified
    assert model.ir_version == 8


@pytest.mark.parametrize(("opset", "refused"), [(12, True), (13, False)])
def test_where_the_converter_fails(
    monkeypatch: pytest.MonkeyPatch, opset: int, refused: bool
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no adapter")

    monkeypatch.setattr(onnx.version_converter, "convert_version", fail)
    model = net("(float[2] x) => (float[2] y)", "y = Relu(x)", opset=opset)
    if refused:
        with pytest.raises(PassRefused, match=r"opset 12: onnx cannot convert .*no adapter"):
            RaiseOpset().call(model, Context())
    else:
        outcome = RaiseOpset().call(model, Context())
        assert not outcome.modified
        assert "stays at opset 13" in outcome.notes[0]


@settings(deadline=None, max_examples=20)
@given(conv_nets())
def test_random_nets_compute_the_same(model: ir.Model) -> None:
    pads = [node for node in model.graph if node.op_type == "Pad"]
    model.graph.opset_imports[""] = 13 if pads else 9
    refresh_shapes(model)
    apply(RaiseOpset(), model)
