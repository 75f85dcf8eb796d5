"""Operators become simpler ones that compute the same, checked without compiling anything."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from edgepress.targets.base import UnsupportedModel
from edgepress.targets.lowering.decompose import EXPANDED, RULES, decompose, simplify
from edgepress.targets.lowering.operators import unsupported
from edgepress.targets.program import Array
from tests.targets.conformance import NodeTest, difference, node_tests

OLDEST_OPSET = 13  # older models are converted before they are lowered


def concerned(case: NodeTest) -> bool:
    nodes = case.model.graph.node
    return (
        len(nodes) == 1
        and case.opset >= OLDEST_OPSET
        and nodes[0].op_type in RULES.keys() | EXPANDED
        and not unsupported(case.model)
    )


def evaluate(model: onnx.ModelProto, feeds: dict[str, Array]) -> dict[str, Array]:
    names = [value.name for value in model.graph.output]
    with np.errstate(all="ignore"):
        answers: Any = ReferenceEvaluator(model).run(None, feeds)
    return dict(zip(names, answers, strict=True))


def test_every_decomposition_computes_what_the_operator_does() -> None:
    wrong = {}
    tried = set()
    for name, case in node_tests().items():
        if not concerned(case):
            continue
        answers = evaluate(decompose(case.model), case.feeds)
        tried |= set(case.operators)
        whys = [difference(answers[key], value) for key, value in case.wanted.items()]
        if any(whys):
            wrong[name] = whys
    assert wrong == {}
    assert len(tried) > 40


def model_of(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model('<ir_version: 8, opset_import: ["":19]> ' + text)


@settings(deadline=None, max_examples=40)
@given(
    before=st.integers(1, 7),
    after=st.integers(1, 9),
    mode=st.sampled_from(["nearest", "linear", "cubic"]),
    coordinates=st.sampled_from(
        ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "half_pixel_symmetric"]
    ),
    rounding=st.sampled_from(["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]),
    antialias=st.booleans(),
    exclude=st.booleans(),
)
def test_resize_is_the_reference(
    before: int,
    after: int,
    mode: str,
    coordinates: str,
    rounding: str,
    antialias: bool,
    exclude: bool,
) -> None:
    attributes: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": coordinates}
    attributes |= {"nearest_mode": rounding} if mode == "nearest" else {}
    attributes |= {"antialias": int(antialias and mode != "nearest")}
    attributes |= {"exclude_outside": int(exclude and mode == "cubic")}
    node = onnx.helper.make_node("Resize", ["x", "", "", "s"], ["y"], **attributes)
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", kind, [1, before])],
        [onnx.helper.make_tensor_value_info("y", kind, [1, after])],
        [onnx.numpy_helper.from_array(np.array([1, after]), "s")],
    )
    opset = onnx.helper.make_opsetid("", 19)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    x = np.random.default_rng(before).standard_normal((1, before)).astype(np.float32)
    got, wanted = evaluate(decompose(model), {"x": x})["y"], evaluate(model, {"x": x})["y"]
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_model_without_such_operators_is_left_alone() -> None:
    model = model_of("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    assert decompose(model) is model


def test_kept_operators_stay_and_constants_through_them() -> None:
    model = model_of(
        "g (float[2] x) => (float[2] y) <float s = {0.5}, uint8[2] q = {1, 2}> "
        "{ w = DequantizeLinear(q, s) a = Add(x, w) y = Softplus(a) }"
    )
    kinds = [node.op_type for node in decompose(model, ["DequantizeLinear"]).graph.node]
    assert kinds[:2] == ["DequantizeLinear", "Add"]
    assert "Softplus" not in kinds


def test_a_simplified_model_has_all_types_and_shapes() -> None:
    model = model_of(
        "g (float[4,3] x) => (float[N,3] y) <bool[4] c = {1, 0, 1, 1}> "
        "{ a = Compress<axis=0>(x, c) y = Softplus(a) }"
    )
    simple = simplify(ir.from_proto(model))
    values = [value for node in simple.graph for value in node.outputs]
    assert all(value.dtype is not None and value.shape is not None for value in values)
    assert simple.graph.outputs[0].shape == ir.Shape([3, 3])


def test_simplify_refuses_what_cannot_be_lowered() -> None:
    model = model_of("g (float[4] x) => (float[4] y) { y = Bernoulli(x) }")
    with pytest.raises(UnsupportedModel, match="random"):
        simplify(ir.from_proto(model))
