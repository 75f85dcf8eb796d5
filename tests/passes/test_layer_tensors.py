from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.passes._layer_tensors import LayerTensor, Read, layer_reads, replace, why_not
from edgepress.passes._shapes import refresh_shapes
from tests.graphs import Array, answers, feeds, net, nodes, random, weight

LAYOUTS = [
    ("(float[1,4,5,5] x) => (float[N] y)", "y = Conv(x, w)", (6, 4, 3, 3), 1),
    ("(float[1,4,5,5] x) => (float[N] y)", "y = Conv<group=2>(x, w)", (6, 2, 3, 3), 1),
    ("(float[1,4,3,3] x) => (float[N] y)", "y = ConvTranspose(x, w)", (4, 6, 2, 2), 1),
    ("(float[1,4,3,3] x) => (float[N] y)", "y = ConvTranspose<group=2>(x, w)", (4, 3, 2, 2), 1),
    ("(float[1,4,7] x) => (float[N] y)", "y = ConvTranspose<group=4>(x, w)", (4, 1, 3), 1),
    ("(float[2,4] x) => (float[N] y)", "y = Gemm(x, w)", (4, 6), 1),
    ("(float[2,4] x) => (float[N] y)", "y = Gemm<transB=1>(x, w)", (6, 4), 1),
    ("(float[2,3,4] x) => (float[N] y)", "y = MatMul(x, w)", (4, 6), 2),
    ("(float[2,3,4] x) => (float[N] y)", "y = MatMul(x, w)", (2, 4, 6), 2),
]


def tensors(model: ir.Model, *, biases: bool = False) -> list[LayerTensor]:
    found: dict[ir.Value, list[Read]] = {}
    for read in layer_reads(model.graph, biases=biases):
        assert read.value is not None
        found.setdefault(read.value, []).append(read)
    return [LayerTensor(value, reads) for value, reads in found.items()]


@pytest.mark.parametrize(("signature", "body", "shape", "axis"), LAYOUTS)
def test_a_row_is_what_an_output_channel_reads(
    signature: str, body: str, shape: tuple[int, ...], axis: int
) -> None:
    model = net(signature, body, {"w": random(*shape)})
    refresh_shapes(model)
    (tensor,) = tensors(model)
    inputs = feeds(model)
    (before,) = answers(model, inputs)
    rows = tensor.rows()
    assert len(rows) == before.shape[axis]
    np.testing.assert_array_equal(tensor.from_rows(rows), random(*shape))
    for row in range(len(rows)):
        changed = rows.copy()
        changed[row] += 1
        array = tensor.from_rows(changed)
        replace(model.graph, tensor.value, tensor.readers, array, "changed")
        (after,) = answers(model, inputs)
        differs = np.moveaxis(before != after, axis, 0).reshape(len(rows), -1).any(axis=1)
        np.testing.assert_array_equal(np.flatnonzero(differs), [row])
        replace(model.graph, tensor.value, tensor.readers, random(*shape), "changed")


def test_one_output_of_a_vector() -> None:
    model = net("(float[2,4] x) => (float[2] y)", "y = MatMul(x, w)", {"w": random(4)})
    (tensor,) = tensors(model)
    np.testing.assert_array_equal(tensor.rows(), random(4)[None])


def test_other_arrays_are_laid_out_like_the_constant() -> None:
    model = net("(float[2,4] x) => (float[N] y)", "y = Gemm(x, w)", {"w": random(4, 6)})
    (tensor,) = tensors(model)
    np.testing.assert_array_equal(tensor.rows_of(random(4, 6, seed=1)), random(4, 6, seed=1).T)


def test_biases_follow_their_layers() -> None:
    model = net(
        "(float[1,2,4,4] x) => (float[1,5] y)",
        "a = Conv(x, v, b) f = Flatten(a) g = Gemm<transB=1>(f, w, c) h = Relu(g) "
        "m = MatMul(h, u) p = Add(m, d) q = Mul(p, e) r = Add(q, z) y = Add(r, d2)",
        {
            "v": random(3, 2, 3, 3), "b": random(3), "w": random(6, 12), "c": random(1, 6),
            "u": random(6, 5), "d": random(5), "e": random(5), "z": random(5), "d2": random(5),
        },
    )  # fmt: skip
    found = [(t.value.name, t.name, t.is_bias, t.rows().shape) for t in tensors(model, biases=True)]
    assert found == [
        ("v", "Conv_0", False, (3, 18)),
        ("b", "Conv_0 bias", True, (3, 1)),
        ("w", "Gemm_2", False, (6, 12)),
        ("c", "Gemm_2 bias", True, (6, 1)),
        ("u", "MatMul_4", False, (5, 6)),
        ("d", "MatMul_4 bias", True, (5, 1)),
    ]
    bias = tensors(model, biases=True)[3]
    assert bias.from_rows(bias.rows()).shape == (1, 6)
    assert [t.value.name for t in tensors(model)] == ["v", "w", "u"]


def test_what_an_add_puts_on_a_matmul_is_a_bias_only_as_a_constant_vector_of_its_outputs() -> None:
    model = net(
        "(float[5,4] x, float[5] v) => (float[5,5] y, float[5,5] z, float[5,5] t)",
        "m = MatMul(x, u) y = Add(v, m) z = Add(m, w) t = Add(s, m)",
        {"u": random(4, 5), "w": random(5, 5), "s": random(5)},
    )
    assert [t.value.name for t in tensors(model, biases=True)] == ["u", "s"]


def test_only_layers_read_the_new_array() -> None:
    body = "a = Conv(x, w) b = Conv(a, w) s = ReduceSum(w) y = Add(b, s)"
    model = net("(float[1,4,3,3] x) => (float[1,4,3,3] y)", body, {"w": random(4, 4, 1, 1)})
    (tensor,) = tensors(model)
    assert [read.node.name for read in tensor.reads] == ["Conv_0", "Conv_1"]
    zeros = np.zeros((4, 4, 1, 1), np.float32)
    replace(model.graph, tensor.value, tensor.readers, zeros, "new")
    assert nodes(model) == (
        "a = Conv(x, w_new)\nb = Conv(a, w_new)\ns = ReduceSum(w)\ny = Add(b, s)"
    )
    assert not weight(model, "w_new").any()
    np.testing.assert_array_equal(weight(model, "w"), random(4, 4, 1, 1))


DENSE = "(float[2,3] x) => (float[2,4] y)"


@pytest.mark.parametrize(
    ("signature", "body", "weights", "why"),
    [
        (
            DENSE,
            "w = DequantizeLinear(q, s) y = MatMul(x, w)",
            {"q": np.ones((3, 4), np.int8), "s": np.array(0.5, np.float32)},
            "quantized already; bend before quantize-int8",
        ),
        (DENSE, "w = Exp(v) y = MatMul(x, w)", {"v": random(3, 4)}, "is not constant"),
        (
            DENSE.replace(" x)", " x, float[3,4] w)"),
            "y = MatMul(x, w)",
            {"w": random(3, 4)},
            "its weights are an input of the model",
        ),
        (
            DENSE.replace(" y)", " y, float[3,4] w)"),
            "y = MatMul(x, w)",
            {"w": random(3, 4)},
            "its weights are an output of the model",
        ),
        (
            DENSE.replace("float", "int32"),
            "y = MatMul(x, w)",
            {"w": np.ones((3, 4), np.int32)},
            "its weights are INT32",
        ),
        (
            DENSE.replace("4", "0"),
            "y = MatMul(x, w)",
            {"w": random(3, 0)},
            "it has no weights",
        ),
        (DENSE, "y = MatMul(x, w)", {"w": random(3, 4)}, ""),
    ],
)
def test_why_a_constant_cannot_be_changed(
    signature: str, body: str, weights: dict[str, Array], why: Any
) -> None:
    (read,) = layer_reads(net(signature, body, weights).graph, biases=False)
    assert why_not(read.value, "bend") == why or (why and why in why_not(read.value, "bend"))
    assert why_not(None, "bend") == "it has no weights"
