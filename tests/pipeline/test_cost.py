import numpy as np
import onnx_ir as ir
import pytest

from edgepress.passes.analysis import node_macs
from edgepress.pipeline.cost import cost
from tests.graphs import net, random


def test_a_convolution_and_a_dense_layer() -> None:
    model = net(
        "(float[1,4,8,8] x) => (float[1,10] y)",
        """c = Conv<strides=[2,2], pads=[1,1,1,1], group=2>(x, w, b)
           f = Flatten(c)
           y = Gemm<transB=1>(f, d)""",
        {"w": random(6, 2, 3, 3), "b": random(6), "d": random(10, 96)},
    )
    shapes(model, c=(1, 6, 4, 4), f=(1, 96))
    figures = cost(model)
    assert figures.parameters == 6 * 2 * 9 + 6 + 960
    assert figures.size_bytes == 4 * figures.parameters
    assert figures.macs == 6 * 16 * 2 * 9 + 960


def test_a_transposed_convolution_counts_its_inputs() -> None:
    model = net(
        "(float[1,2,4,4] x) => (float[1,3,6,6] y)",
        "y = ConvTranspose(x, w)",
        {"w": random(2, 3, 3, 3)},
    )
    assert cost(model).macs == 2 * 16 * 3 * 9


def test_a_product_of_two_activations() -> None:
    model = net("(float[2,5,7] x, float[2,7,3] w) => (float[2,5,3] y)", "y = MatMul(x, w)")
    assert cost(model).macs == 2 * 5 * 3 * 7
    assert cost(model).parameters == 0


def test_a_transposed_dense_layer() -> None:
    model = net("(float[7,5] x, float[7,3] w) => (float[5,3] y)", "y = Gemm<transA=1>(x, w)")
    assert cost(model).macs == 5 * 3 * 7


def test_scales_and_shapes_are_no_parameters() -> None:
    model = net(
        "(float[4] x) => (float[2,2] y)",
        "d = DequantizeLinear(w, s, z)\n a = Add(x, d)\n y = Reshape(a, shape)",
        {
            "w": np.array([1, 2, 3, 4], np.int8),
            "s": np.array(0.5, np.float32),
            "z": np.array(0, np.int8),
            "shape": np.array([2, 2]),
        },
    )
    assert cost(model).parameters == 4
    assert cost(model).size_bytes == 4 + 4 + 1 + 16


def test_integer_products_and_tables() -> None:
    model = net(
        "(uint8[5,7] x, int64[2] i) => (int32[5,3] y, int8[2,4] z)",
        "y = MatMulInteger(x, w) z = Gather(t, i)",
        {"w": np.ones((7, 3), np.int8), "t": np.ones((6, 4), np.int8)},
    )
    assert cost(model).parameters == 7 * 3 + 6 * 4
    assert cost(model).macs == 5 * 7 * 3


@pytest.mark.parametrize("operator", ["Conv", "MatMul"])
def test_an_unknown_shape_counts_nothing(operator: str) -> None:
    model = net("(float[N,4,8,8] x, float[4,4,8,8] w) => (float[M] y)", f"y = {operator}(x, w)")
    assert node_macs(next(iter(model.graph))) == 0


def shapes(model: ir.Model, **known: tuple[int, ...]) -> None:
    for node in model.graph:
        for value in node.outputs:
            if value.name in known:
                value.shape = ir.Shape(known[value.name])
