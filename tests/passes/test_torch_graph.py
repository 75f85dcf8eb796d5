from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings

import tests.torch_needed as needed
from edgepress.passes._gradients import open_gradients
from edgepress.passes._shapes import refresh_shapes, shape_of
from edgepress.passes._torch_graph import TorchGraph
from edgepress.passes.base import PassRefused
from tests.graphs import Array, answers, conv_nets, net, nodes, random, weight

torch = needed.torch

#: A LeNet of few channels, with the Reshape to a batch of 1 that exporters write.
LENET = """
c = Conv(x, w1, b1)
p = MaxPool <kernel_shape=[2,2], strides=[2,2]> (c)
d = Conv <group=2> (p, w2)
r = Relu(d)
f = Reshape(r, to)
g = Gemm <transB=1> (f, w3, b3)
s = Softmax(g)
"""
WEIGHTS: dict[str, Array] = {
    "w1": random(4, 1, 3, 3) / 3,
    "b1": random(4),
    "w2": random(6, 2, 3, 3) / 4,
    "to": np.array([1, 24], np.int64),
    "w3": random(5, 24) / 5,
    "b3": random(5),
}


def lenet() -> ir.Model:
    model = net("(float[1,1,10,10] x) => (float[1,5] s)", LENET, WEIGHTS)
    refresh_shapes(model)
    return model


def floats(model: ir.Model) -> list[str]:
    return [n for n, v in model.graph.initializers.items() if v.dtype == ir.DataType.FLOAT]


def value(model: ir.Model, name: str) -> ir.Value:
    return ir.convenience.create_value_mapping(model.graph)[name]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_net_answers_for_a_batch_of_any_size(count: int) -> None:
    model = lenet()
    x = random(count, 1, 10, 10)
    want = np.concatenate([answers(model, {"x": sample[None]})[0] for sample in x])
    got = TorchGraph("test", model, floats(model)).forward({"x": torch.tensor(x)})
    assert list(got) == ["s"]
    np.testing.assert_allclose(got["s"].detach().numpy(), want, rtol=1e-5, atol=1e-6)


def test_the_parameters_are_the_initializers_that_were_asked_for() -> None:
    model = lenet()
    graph = TorchGraph("test", model, ["w1", "b3"])
    assert list(graph.parameters) == ["w1", "b3"]
    for name, parameter in graph.parameters.items():
        assert parameter.requires_grad
        np.testing.assert_array_equal(parameter.detach().numpy(), WEIGHTS[name])
    graph.forward({"x": torch.tensor(random(2, 1, 10, 10))})["s"].square().sum().backward()
    for parameter in graph.parameters.values():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_other_values_than_the_outputs_can_be_asked_for() -> None:
    """What they do not need is not run: it may even be an operator without a rule."""
    model = net(
        "(float[1,4] x) => (float[1,4] z)", "h = Mul(x, w) y = Exp(h) z = Det(y)", {"w": random(4)}
    )
    for name in ("h", "y", "z"):
        value(model, name).shape = ir.Shape([1, 4])
    graph = TorchGraph("test", model, ["w"], outputs=[value(model, "h")])
    x = random(3, 4)
    np.testing.assert_allclose(
        graph.forward({"x": torch.tensor(x)})["h"].detach().numpy(), x * random(4)
    )


def test_given_weights_take_the_place_of_parameters() -> None:
    model = lenet()
    graph = TorchGraph("test", model, floats(model))
    x = torch.tensor(random(2, 1, 10, 10))
    twice = {"w3": 2 * graph.parameters["w3"]}
    got = graph.forward({"x": x}, twice)["s"].detach().numpy()
    model.graph.initializers["w3"].const_value = ir.tensor(2 * WEIGHTS["w3"], name="w3")
    want = TorchGraph("test", model, []).forward({"x": x})["s"].numpy()
    np.testing.assert_array_equal(got, want)


def test_what_is_written_back_answers_the_same_in_onnxruntime() -> None:
    model = lenet()
    before = nodes(model)
    graph = TorchGraph("test", model, ["w1", "b1", "w2", "w3"])
    with torch.no_grad():
        for parameter in graph.parameters.values():
            parameter += 0.1
    x = random(1, 1, 10, 10)
    want = graph.forward({"x": torch.tensor(x)})["s"].detach().numpy()
    graph.write_back()
    assert nodes(model) == before
    np.testing.assert_array_equal(weight(model, "w1"), WEIGHTS["w1"] + np.float32(0.1))
    np.testing.assert_array_equal(weight(model, "b3"), WEIGHTS["b3"])
    np.testing.assert_allclose(answers(model, {"x": x})[0], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["float16", "double", "bfloat16"])
def test_every_float_dtype_is_computed_in_one_and_kept(kind: str) -> None:
    dtype = {"float16": ir.DataType.FLOAT16, "double": ir.DataType.DOUBLE,
             "bfloat16": ir.DataType.BFLOAT16}[kind]  # fmt: skip
    weights = {name: random(3, seed=ord(name)).astype(dtype.numpy()) for name in ("w", "b")}
    signature = f"({kind}[1,3] x) => ({kind}[1,3] y)"
    model = net(signature, "h = Mul(x, w) y = Add(h, b)", weights)
    refresh_shapes(model)
    graph = TorchGraph("test", model, ["w"])
    assert graph.parameters["w"].dtype == torch.float32
    y = graph.forward({"x": torch.ones(2, 3, dtype=torch.float64)})["y"]
    assert y.dtype == torch.float32
    want = weight(model, "w").astype(np.float32) + weight(model, "b").astype(np.float32)
    np.testing.assert_allclose(y.detach().numpy(), [want, want], rtol=1e-6)
    graph.write_back({"w": 2 * graph.parameters["w"]})
    assert model.graph.initializers["w"].dtype == dtype
    doubled = 2 * weights["w"].astype(float)
    np.testing.assert_allclose(weight(model, "w").astype(float), doubled, rtol=1e-7)


def test_inputs_that_are_no_batch_of_one_keep_their_shape_behind_the_samples() -> None:
    model = net(
        "(float[2,3] x, float[1,3] other, int64[1] unread) => (float[2,3] y, float y0)",
        "y = Add(x, other) y0 = ReduceMean <keepdims=0> (y)",
    )
    refresh_shapes(model)
    graph = TorchGraph("test", model, [])
    x, other = random(5, 2, 3), random(5, 3)
    batch = {"x": x, "other": other, "unread": np.zeros(5, np.int64)}
    got = graph.forward({name: torch.tensor(array) for name, array in batch.items()})
    np.testing.assert_allclose(got["y"].numpy(), x + other[:, None], rtol=1e-6)
    np.testing.assert_allclose(
        got["y0"].numpy(), (x + other[:, None]).mean(axis=(1, 2)), rtol=1e-5, atol=1e-6
    )


@given(model=conv_nets())
@settings(deadline=None, max_examples=25)
def test_any_net_agrees_with_onnxruntime_in_answers_and_gradients(model: ir.Model) -> None:
    """The gradients come from rules that append ONNX nodes, which onnxruntime runs."""
    refresh_shapes(model)
    (source,), (output,) = model.graph.inputs, model.graph.outputs
    x = random(2, *shape_of(source)[1:])
    direction = random(1, *shape_of(output)[1:], seed=1)
    graph = TorchGraph("test", model, [], dtype=torch.float64)
    leaf = torch.tensor(x.astype(np.float64), requires_grad=True)
    y = graph.forward({"x": leaf})[output.name or ""]
    (y * torch.tensor(direction)).sum().backward()
    differentiate = open_gradients("test", model, [source])
    for index, sample in enumerate(x[:, None]):
        want = answers(model, {"x": sample})[0][0]
        scale = 1 + np.abs(want).max()
        np.testing.assert_allclose(y[index].detach().numpy() / scale, want / scale, atol=1e-5)
        _, slope = differentiate({"x": sample}, {output.name or "": direction})["x"]
        scale = 1 + np.abs(slope).max()
        np.testing.assert_allclose(leaf.grad[index] / scale, slope[0] / scale, atol=1e-4)


def test_an_operator_without_a_rule_is_refused_by_name() -> None:
    model = net("(float[1,2,3,3] x) => (float[1,2,3,3] y)", "h = Exp(x) y = LRN <size=3> (h)")
    refresh_shapes(model)
    with pytest.raises(PassRefused) as refused:
        TorchGraph("tune-codebooks", model, [])
    assert str(refused.value).startswith(
        "tune-codebooks: node 'Exp_0': Exp cannot be trained through; known are Add, AveragePool, "
    )


def test_an_operator_of_another_domain_is_refused() -> None:
    model = net("(float[1,3] x) => (float[1,3] y)", "y = Relu(x)")
    refresh_shapes(model)
    next(iter(model.graph)).domain = "com.microsoft"
    with pytest.raises(PassRefused, match=r"com\.microsoft\.Relu cannot be trained through"):
        TorchGraph("test", model, [])


def test_an_open_shape_is_refused() -> None:
    model = net("(float[N,3] x) => (float[N,3] y)", "y = Relu(x)")
    with pytest.raises(PassRefused, match="value 'x': its shape is not fixed; run the canonical"):
        TorchGraph("test", model, [])
