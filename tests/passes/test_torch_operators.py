from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import tests.torch_needed as needed
from edgepress.passes._shapes import refresh_shapes, shape_of
from edgepress.passes._torch_graph import TorchGraph
from edgepress.passes._torch_operators import OPERATORS
from edgepress.passes.base import PassRefused
from tests.graphs import Array, answers, net
from tests.passes.finite_differences import ints, positive, spaced

torch = needed.torch

SAMPLES = 3


@dataclass(frozen=True)
class Case:
    """Nodes that compute y, ending with the operator that is tested.

    Attributes:
        body: reads `x`, and the constants.
        x: the shape of the input.
        constants: float64 ones become float32, and are trained.
        opset: of the model.
    """

    body: str
    x: tuple[int, ...]
    constants: Mapping[str, Array]
    opset: int

    def model(self) -> ir.Model:
        weights = {
            name: array.astype(np.float32) if array.dtype == np.float64 else array
            for name, array in self.constants.items()
        }
        version = 8 if self.opset < 20 else 10
        signature = f"(float{list(self.x)} x) => (float[N] y)"
        model = net(signature, self.body, weights, opset=self.opset, ir_version=version)
        refresh_shapes(model)
        return model

    @property
    def operator(self) -> str:
        operators: list[str] = re.findall(r"= (\w+)", self.body)
        return operators[-1]

    def __str__(self) -> str:
        return f"{self.body} {list(self.x)} opset {self.opset}"


def case(body: str, *x: int, opset: int = 18, **constants: Array) -> Case:
    return Case(body, x or (1, 2, 3, 4), constants, opset)


def number(value: float) -> Array:
    return np.array(value, np.float32)


W = spaced(4, 2, 3, 3)
IMAGE = (1, 2, 7, 6)

CASES = [
    case("y = Relu(x)"),
    case("y = LeakyRelu(x)"),
    case("y = LeakyRelu <alpha=0.3> (x)"),
    case("y = PRelu(x, slope)", slope=spaced(2, 1, 1)),
    case("y = Elu <alpha=0.7> (x)"),
    case("y = Erf(x)"),
    case("y = Gelu(x)", opset=20),
    case('y = Gelu <approximate="tanh"> (x)', opset=20),
    case("y = Sigmoid(x)"),
    case("y = Tanh(x)"),
    case("y = HardSwish(x)"),
    case("y = HardSigmoid(x)"),
    case("y = HardSigmoid <alpha=0.7, beta=0.3> (x)"),
    case("y = Identity(x)"),
    case("y = Dropout(x)"),
    case("y = Dropout(x, ratio, no)", ratio=number(0.5), no=np.array(False)),
    case("y = Clip(x)"),
    case("y = Clip(x, low)", low=number(-0.7)),
    case("y = Clip(x, , high)", high=number(0.7)),
    case("y = Clip(x, low, high)", low=number(-0.7), high=number(1.1)),
    case("y = Add(x, b)", b=spaced(2, 1, 4)),
    case("h = Tanh(x) y = Add(x, h)"),
    case("y = Sub(b, x)", b=spaced(1, 2, 1, 1)),
    case("y = Mul(x, b)", b=spaced(4)),
    case("y = Mul(x, x)"),
    case("y = Div(x, b)", b=positive(3, 1)),
    case("h = Sigmoid(x) y = Div(b, h)", b=positive(1)),
    case("h = Tanh(x) y = Sum(x, h, b)", b=spaced(1, 1, 4)),
    # a batch behind which the other operand has more axes
    case("y = Add(x, b)", 1, 4, b=spaced(3, 4)[None]),
    case("h = ReduceMean <axes=[0,1], keepdims=0> (x) y = Mul(x, h)", 1, 3, 4, opset=17),
    case("y = MatMul(x, w)", 1, 6, w=spaced(6, 3)),
    case("y = MatMul(x, w)", 1, 3, 4, w=spaced(4, 2)),
    case("y = MatMul(w, x)", 1, 3, 4, w=spaced(2, 3)),
    case("t = Transpose <perm=[0,2,1]> (x) y = MatMul(x, t)", 1, 3, 4),
    case("y = Gemm(x, w)", 1, 6, w=spaced(6, 3)),
    case("y = Gemm(x, w, b)", 1, 6, w=spaced(6, 3), b=spaced(3)),
    case("y = Gemm <transB=1, alpha=0.5, beta=2.0> (x, w, b)", 1, 6, w=spaced(3, 6), b=positive(1)),
    case("y = Gemm <transA=1, alpha=0.5> (x, w)", 1, 3, w=spaced(1, 4)),
    case("y = Conv(x, w)", *IMAGE, w=W),
    case("y = Conv(x, w, b)", *IMAGE, w=W, b=spaced(4)),
    case("y = Conv <pads=[1,0,2,1], strides=[2,1]> (x, w, b)", *IMAGE, w=W, b=spaced(4)),
    case("y = Conv <dilations=[2,1], pads=[2,1,2,1]> (x, w)", *IMAGE, w=W),
    case("y = Conv <strides=[3,2]> (x, w)", *IMAGE, w=W),
    case("y = Conv <group=2> (x, w)", *IMAGE, w=spaced(4, 1, 3, 3)),
    case("y = Conv <group=2, pads=[1,1,1,1]> (x, w, b)", *IMAGE, w=spaced(2, 1, 3, 3), b=spaced(2)),
    case('y = Conv <auto_pad="SAME_UPPER", strides=[2,2]> (x, w)', *IMAGE, w=W),
    case('y = Conv <auto_pad="SAME_LOWER", strides=[2,2]> (x, w)', *IMAGE, w=W),
    case('y = Conv <auto_pad="VALID", strides=[2,2]> (x, w)', *IMAGE, w=W),
    case("y = Conv <pads=[1,0]> (x, w, b)", 1, 2, 6, w=spaced(3, 2, 3), b=spaced(3)),
    case("y = Conv <pads=[0,1,0,0,0,1]> (x, w)", 1, 1, 3, 3, 4, w=spaced(2, 1, 2, 2, 3)),
    case("y = ConvTranspose(x, w)", 1, 2, 3, 4, w=spaced(2, 3, 3, 2)),
    case(
        "y = ConvTranspose <strides=[2,3], pads=[1,0,0,1], output_padding=[1,2]> (x, w, b)",
        1, 2, 3, 4, w=spaced(2, 3, 3, 3), b=spaced(3),
    ),
    case("y = ConvTranspose <group=2, dilations=[2,1]> (x, w, b)", 1, 2, 3, 4,
         w=spaced(2, 2, 2, 2), b=spaced(4)),
    case('y = ConvTranspose <auto_pad="SAME_UPPER", strides=[2,2]> (x, w)', 1, 2, 3, 4,
         w=spaced(2, 1, 3, 3)),
    case('y = ConvTranspose <auto_pad="SAME_LOWER", strides=[2,2]> (x, w)', 1, 2, 3, 4,
         w=spaced(2, 1, 3, 3)),
    case("y = ConvTranspose <output_shape=[6,9], strides=[2,2]> (x, w)", 1, 2, 3, 4,
         w=spaced(2, 1, 3, 3)),
    case("y = ConvTranspose <pads=[1,1], strides=[2]> (x, w)", 1, 2, 5, w=spaced(2, 1, 3)),
    case("y = MaxPool <kernel_shape=[2,2]> (x)", *IMAGE),
    case("y = MaxPool <kernel_shape=[3,2], strides=[2,2], pads=[1,0,1,1]> (x)", *IMAGE),
    case("y = MaxPool <kernel_shape=[2,2], strides=[2,4], ceil_mode=1> (x)", *IMAGE),
    case("y = MaxPool <kernel_shape=[2,2], dilations=[2,3]> (x)", *IMAGE),
    case('y = MaxPool <kernel_shape=[2,3], strides=[2,2], auto_pad="SAME_UPPER"> (x)', *IMAGE),
    case('y = MaxPool <kernel_shape=[2,3], strides=[2,2], auto_pad="SAME_LOWER"> (x)', *IMAGE),
    case("y = MaxPool <kernel_shape=[3], strides=[2], pads=[1,1]> (x)", 1, 2, 7),
    case("y = MaxPool <kernel_shape=[2,2,2], strides=[2,1,1]> (x)", 1, 1, 4, 3, 3),
    case("y = AveragePool <kernel_shape=[2,2]> (x)", *IMAGE),
    case("y = AveragePool <kernel_shape=[3,2], strides=[2,2], pads=[1,0,1,1]> (x)", *IMAGE),
    case("y = AveragePool <kernel_shape=[3,3], pads=[1,1,0,2], count_include_pad=1> (x)", *IMAGE),
    case("y = AveragePool <kernel_shape=[2,2], strides=[2,4], ceil_mode=1> (x)", *IMAGE),
    case("y = AveragePool <kernel_shape=[3,3], strides=[2,3], pads=[1,1,1,1], ceil_mode=1, "
         "count_include_pad=1> (x)", *IMAGE, opset=17),
    case('y = AveragePool <kernel_shape=[3,3], strides=[2,2], auto_pad="SAME_UPPER"> (x)', *IMAGE),
    case('y = AveragePool <kernel_shape=[2,2], strides=[2,2], auto_pad="SAME_LOWER", '
         "count_include_pad=1> (x)", *IMAGE),
    case("y = AveragePool <kernel_shape=[3], pads=[1,1]> (x)", 1, 2, 7),
    case("y = AveragePool <kernel_shape=[2,2,2]> (x)", 1, 1, 4, 3, 3),
    case("y = GlobalAveragePool(x)", *IMAGE),
    case("y = GlobalAveragePool(x)", 1, 3, 5),
    case("y = ReduceMean <axes=[2,3]> (x)", opset=17),
    case("y = ReduceMean <axes=[-1], keepdims=0> (x)", opset=17),
    case("y = ReduceMean <keepdims=1> (x)", opset=17),
    case("y = ReduceMean(x, axes)", axes=ints(1, -1)),
    case("y = ReduceMean(x)"),
    case("y = ReduceMean <noop_with_empty_axes=1> (x)"),
    case("y = Softmax(x)"),
    case("y = Softmax <axis=1> (x)"),
    case("y = LogSoftmax <axis=-2> (x)"),
    case("y = LayerNormalization(x, s)", s=positive(4)),
    case("y = LayerNormalization <axis=2, epsilon=0.1> (x, s, b)", s=positive(3, 4),
         b=spaced(3, 4)),
    case("y = BatchNormalization <epsilon=0.1> (x, s, b, m, v)", s=positive(2), b=spaced(2),
         m=spaced(2, seed=1), v=positive(2, seed=1)),
    case("y = Reshape(x, to)", to=ints(1, -1)),
    case("y = Reshape(x, to)", to=ints(0, 3, -1)),
    case("y = Reshape(x, to)", to=ints(2, 12)),
    case("y = Flatten(x)"),
    case("y = Flatten <axis=0> (x)"),
    case("y = Flatten <axis=2> (x)"),
    case("y = Squeeze(x, axes)", 1, 3, 1, 4, axes=ints(2)),
    case("y = Squeeze(x)", 1, 3, 1, 4),
    case("y = Unsqueeze(x, axes)", axes=ints(0, -1)),
    case("y = Expand(x, to)", 1, 1, 4, to=ints(2, 3, 4)),
    case("y = Transpose <perm=[0,2,3,1]> (x)"),
    case("y = Transpose(x)"),
    case("h = Tanh(x) y = Concat <axis=1> (x, h, x)"),
    case("y = Concat <axis=-1> (x, w)", 1, 3, w=spaced(1, 4)),
    case("y = Concat <axis=0> (x, x)", 1, 3),
    case("y = Pad(x, pads)", pads=ints(0, 0, 1, 0, 0, 1, 0, 2)),
    case("y = Pad(x, pads, v)", pads=ints(0, 0, 1, 2, 0, 0, 0, -1), v=number(2.5)),
    case("y = Pad(x, pads, v, axes)", pads=ints(1, 0, 2, 1), v=number(1.5), axes=ints(-1, 1)),
]  # fmt: skip


def graph_of(case: Case, model: ir.Model) -> TorchGraph:
    trained = [name for name, array in case.constants.items() if array.dtype == np.float64]
    return TorchGraph("test", model, trained, dtype=torch.float64)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_operator_computes_what_onnxruntime_does_sample_by_sample(case: Case) -> None:
    model = case.model()
    x = np.stack([spaced(*case.x, seed=seed) for seed in range(SAMPLES)]).astype(np.float32)
    want = np.stack([answers(model, {"x": sample})[0] for sample in x])
    shape = shape_of(model.graph.outputs[0])
    want = want.reshape(SAMPLES, *(shape[1:] if shape[:1] == (1,) else shape))
    batch = x.reshape(SAMPLES, *case.x[1:])
    graph = graph_of(case, model)
    for count in (SAMPLES, 1):
        got = graph.forward({"x": torch.tensor(batch[:count])})
        assert list(got) == ["y"]
        got_y = got["y"].detach().numpy()
        assert got_y.shape == want[:count].shape
        np.testing.assert_allclose(got_y, want[:count], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_operator_has_the_gradients_of_finite_differences(case: Case) -> None:
    graph = graph_of(case, case.model())
    x = np.stack([spaced(*case.x[1:], seed=seed) for seed in range(2)])
    names = list(graph.parameters)

    def function(x: Any, *weights: Any) -> Any:
        return graph.forward({"x": x}, dict(zip(names, weights, strict=True)))["y"]

    leaves = [torch.tensor(x, requires_grad=True), *graph.parameters.values()]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_every_rule_is_tested() -> None:
    assert {case.operator for case in CASES} == OPERATORS.keys()


@pytest.mark.parametrize(
    ("body", "constants", "why"),
    [
        ("y = LRN <size=3> (x)", {}, "LRN cannot be trained through; known are Add, AveragePool,"),
        ("l = Tanh(b) y = Clip(x, l)", {"b": number(0)}, "its input 'l' is not constant"),
        (
            'y = Pad <mode="edge"> (x, p)',
            {"p": ints(0, 0, 1, 1, 0, 0, 1, 1)},
            "it pads with mode 'edge'",
        ),
        (
            "y = AveragePool <kernel_shape=[2,2], dilations=[2,1]> (x)",
            {},
            "its windows are dilated",
        ),
        (
            "y = Dropout(x, r, t)",
            {"r": number(0.5), "t": np.array(True)},
            "it drops values; export the model for inference",
        ),
        (
            "y, m, v = BatchNormalization <training_mode=1> (x, s, s, s, s)",
            {"s": positive(2).astype(np.float32)},
            "it takes its statistics from the batch; export the model for inference",
        ),
        (
            "p, i = MaxPool <kernel_shape=[1,1]> (x) y = Cast <to=1> (i)",
            {},
            "its output 'i' is read, too",
        ),
    ],
)
def test_a_form_that_is_not_known_is_refused(
    body: str, constants: Mapping[str, Array], why: str
) -> None:
    model = net("(float[1,2,3,4] x) => (float[1,2,N,M] y)", body, constants, opset=19)
    refresh_shapes(model)
    with pytest.raises(PassRefused) as refused:
        TorchGraph("prune-and-retrain", model, [])
    assert why in str(refused.value)
    assert str(refused.value).startswith("prune-and-retrain: node '")
