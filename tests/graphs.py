"""Tiny nets as ONNX text, and the oracle that all pass tests share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
from hypothesis import strategies as st

from edgepress.passes.base import Context, Outcome, Pass

Array = npt.NDArray[Any]


def net(
    signature: str,
    body: str,
    weights: Mapping[str, Array] | None = None,
    *,
    opset: int = 17,
    ir_version: int = 8,
) -> ir.Model:
    """Build a model from `"float[1,3,8,8] x) => (float[N,M] y"`-like text and NumPy weights."""
    text = f'<ir_version: {ir_version}, opset_import: ["": {opset}]> g {signature} {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    for name, array in (weights or {}).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    model = ir.from_proto(proto)
    for index, node in enumerate(model.graph):
        node.name = node.name or f"{node.op_type}_{index}"
    return model


def random(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Normal float32 numbers that depend on the shape and the seed alone."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def nodes(model: ir.Model) -> str:
    """List the nodes, one a line, as `y = Conv(x, w) {pads=[1,1,1,1]}`, for golden comparisons."""
    lines = []
    for node in model.graph:
        outputs = ", ".join(value.name or "_" for value in node.outputs)
        inputs = ", ".join(value.name or "_" if value else "_" for value in node.inputs)
        attributes = ", ".join(
            f"{name}={_plain(a.value)}" for name, a in sorted(node.attributes.items())
        )
        lines.append(
            f"{outputs} = {node.op_type}({inputs})" + (f" {{{attributes}}}" * bool(attributes))
        )
    return "\n".join(lines)


def _plain(value: object) -> str:
    return re.sub(r"\s", "", str(list(value) if isinstance(value, tuple) else value))


def weight(model: ir.Model, name: str) -> Array:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def feeds(model: ir.Model, seed: int = 0) -> dict[str, Array]:
    """Random inputs: normal floats, small non-negative integers."""
    result: dict[str, Array] = {}
    rng = np.random.default_rng(seed)
    for value in model.graph.inputs:
        assert value.shape is not None
        assert value.dtype is not None
        assert value.name is not None
        shape = [d if isinstance(d, int) else 2 for d in value.shape]
        dtype = value.dtype.numpy()
        floats = np.issubdtype(dtype, np.floating)
        result[value.name] = (
            rng.standard_normal(shape) if floats else rng.integers(0, 2, shape)
        ).astype(dtype)
    return result


def answers(model: ir.Model, inputs: Mapping[str, Array]) -> list[Array]:
    """What onnxruntime computes with its optimisations off."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    wanted = {i.name for i in session.get_inputs()}
    results = session.run(None, {k: v for k, v in inputs.items() if k in wanted})
    return [np.asarray(result) for result in results]


def apply(step: Pass, model: ir.Model, context: Context | None = None) -> Outcome:
    """Run a pass as the driver does and check what every lossless pass promises.

    The model stays valid; inputs and outputs keep name, order and dtype; onnxruntime answers the
    same; a second run changes nothing and says so.
    """
    context = context or Context()
    before = model.clone()
    step.requires(model, context)
    outcome = step.call(model, context)
    step.ensures(outcome.model)
    onnx.checker.check_model(ir.to_proto(outcome.model), full_check=True)
    initializers = set(before.graph.initializers)
    kept = [v for v in before.graph.inputs if v.name not in initializers]
    assert _signature(outcome.model.graph.inputs) == _signature(kept)
    assert _signature(outcome.model.graph.outputs) == _signature(before.graph.outputs)
    if step.lossless:
        inputs = feeds(outcome.model)
        for want, got in zip(answers(before, inputs), answers(outcome.model, inputs), strict=True):
            assert want.shape == got.shape
            assert want.dtype == got.dtype
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    text = ir.to_proto(outcome.model).SerializeToString(deterministic=True)
    step.requires(outcome.model, context)
    again = step.call(outcome.model, context)
    assert not again.modified
    assert ir.to_proto(again.model).SerializeToString(deterministic=True) == text
    return outcome


def _signature(values: object) -> list[tuple[str | None, object]]:
    return [(value.name, value.dtype) for value in values]  # type: ignore[attr-defined]


_STEPS = ("conv", "conv_shared", "depthwise", "norm", "relu", "add", "concat", "pad", "identity")


@st.composite
def conv_nets(draw: st.DrawFn) -> ir.Model:
    """Random small CNNs: branches, residuals, Concat, groups, shared weights, Pad, no-ops."""
    width = draw(st.sampled_from([2, 4]))
    steps = draw(st.lists(st.sampled_from(_STEPS), min_size=1, max_size=7))
    weights: dict[str, Array] = {}
    values = [("x", width)]
    lines: list[str] = []

    def weighted(name: str, *shape: int) -> str:
        weights[name] = random(*shape, seed=len(weights)) * 0.5
        return name

    for index, step in enumerate(steps):
        source, channels = values[draw(st.integers(max(0, len(values) - 2), len(values) - 1))]
        out = f"v{index}"
        made = channels
        if step == "conv":
            made = width
            bias = ", " + weighted(f"b{index}", made) if draw(st.booleans()) else ""
            w = weighted(f"w{index}", made, channels, 3, 3)
            lines.append(f"{out} = Conv <pads=[1,1,1,1]> ({source}, {w}{bias})")
        elif step == "conv_shared":
            w = f"shared{channels}"
            if w not in weights:
                weighted(w, channels, channels, 1, 1)
            lines.append(f"{out} = Conv({source}, {w})")
        elif step == "depthwise":
            w = weighted(f"w{index}", channels, 1, 3, 3)
            lines.append(f"{out} = Conv <pads=[1,1,1,1], group={channels}> ({source}, {w})")
        elif step == "norm":
            names = [weighted(f"{p}{index}", channels) for p in ("s", "c", "m", "q")]
            weights[names[3]] = np.abs(weights[names[3]]) + np.float32(0.5)
            lines.append(f"{out} = BatchNormalization({source}, {', '.join(names)})")
        elif step == "relu":
            lines.append(f"{out} = Relu({source})")
        elif step == "add":
            other = draw(st.sampled_from([v for v in values if v[1] == channels]))[0]
            operand = draw(st.sampled_from([other, weighted(f"a{index}", channels, 1, 1)]))
            lines.append(f"{out} = Add({source}, {operand})")
        elif step == "concat":
            other, more = draw(st.sampled_from(values))
            made = channels + more
            lines.append(f"{out} = Concat <axis=1> ({source}, {other})")
        elif step == "pad":
            weights["pads"] = np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64)
            w = weighted(f"w{index}", channels, channels, 3, 3)
            lines.append(f"p{index} = Pad({source}, pads) {out} = Conv(p{index}, {w})")
        else:
            lines.append(f"{out} = Identity({source})")
        values.append((out, made))
    last, channels = values[-1]
    body = " ".join(lines)
    model = net(f"(float[1,{width},6,6] x) => (float[1,{channels},6,6] {last})", body, weights)
    for name in [n for n, v in model.graph.initializers.items() if not v.uses()]:
        del model.graph.initializers[name]
    return model
