"""Dynamically quantized products on CUDA: the answers of NumPy, to the bit."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.targets.cuda.dynamic_gemm import DynamicProduct, dynamic_gemm
from edgepress.targets.cuda.quantised_rows import padded_width, quantise_rows
from edgepress.targets.load import load_target
from edgepress.targets.lowering.build import lower
from edgepress.targets.lowering.dynamic_reference import quantised_rows
from edgepress.targets.program import Array
from edgepress.targets.reference import Reference
from edgepress.targets.schedules.epilogue import Clip
from tests.cuda.cases import MULTIPROCESSORS
from tests.cuda.emulation import emulate, emulate_kernel
from tests.graphs import feeds, net, random
from tests.targets.dynamic import broken_rows, dynamic_nets, hostile_rows, product_net, quantized
from tests.targets.qdq import drawn
from tests.targets.test_dynamic import CLAMPS

TARGET = load_target("cuda-sm90")


def same(model: ir.Model, feed: dict[str, Array]) -> None:
    """Compare the first product's outputs to the bit, NaN included.

    Sums of float32 between products may be taken in another order, and flip a step.
    """
    wanted = Reference(model).run(feed)
    got = emulate(lower(model, TARGET), feed)
    for name in wanted:
        if name != "y" or len(wanted) == 1:
            np.testing.assert_array_equal(got[name], wanted[name], name)


SIZES = [(1, 1, 1), (23, 7, 3), (11, 64, 16), (24, 97, 50), (3, 1536, 7), (70, 130, 65)]


@pytest.mark.parametrize("index", range(len(SIZES)))
def test_products_answer_as_numpy(index: int) -> None:
    rows, width, outputs = SIZES[index]
    clamp = CLAMPS[index % len(CLAMPS)]
    single = product_net((rows, width), outputs, bias=index % 2 == 1, clamp=clamp, seed=index)
    same(quantized(single), {"x": hostile_rows(rows, width, index)})


def test_products_of_one_value_share_its_rows() -> None:
    for index, model in enumerate(drawn(dynamic_nets(), 3)):
        shape = feeds(model)["x"].shape
        x = hostile_rows(int(np.prod(shape[:-1])), shape[-1], index).reshape(shape)
        same(model, {"x": x})
        calls = [call.kernel for call in lower(model, TARGET).calls]
        assert sum(name.startswith("quantise_rows") for name in calls) == 2


def test_rows_with_nan_answer_nan() -> None:
    for clamp in CLAMPS:
        same(quantized(product_net((8, 20), 9, clamp=clamp)), {"x": broken_rows(20)})


def test_normalised_rows_are_quantized_at_once() -> None:
    body = "n = LayerNormalization <axis=-1> (x, s) y = MatMul(n, w)"
    weights = {"s": random(40), "w": random(40, 12)}
    model = quantized(net("(float[3,5,40] x) => (float[3,5,12] y, float n)", body, weights))
    given = feeds(model)
    program = lower(model, TARGET)
    assert not any(call.kernel.startswith("quantise_rows") for call in program.calls)
    got = emulate(program, given)
    (node,) = (n for n in Reference(model).model.graph if n.op_type == "DynamicGemm")
    first = net("(float[3,5,40] n) => (float[3,5,12] y)", "y = MatMul(n, w)", {"w": weights["w"]})
    (wanted,) = Reference(quantized(first)).run({"n": got["n"]}).values()
    assert node.outputs[0].name
    np.testing.assert_array_equal(got["y"], wanted)


@pytest.mark.parametrize("multiprocessors", [1, 8, 132])
def test_every_tile(multiprocessors: int) -> None:
    rows, inputs, outputs = 90, 320, 70
    given = np.random.default_rng(multiprocessors)
    q, weights = (
        given.integers(-128, 128, size).astype(np.int8)
        for size in ((rows, inputs), (outputs, inputs))
    )
    step, scales, bias = (
        given.uniform(0.1, 1, size).astype(np.float32) for size in (rows, outputs, outputs)
    )
    point = given.integers(-128, 128, rows).astype(np.int32)
    sums = weights.sum(axis=1, dtype=np.int32)
    size = DynamicProduct(rows, inputs, outputs, Clip(low=-500.0))
    kernel = dynamic_gemm("k", size, "float32", multiprocessors)
    y = np.zeros((rows, outputs), np.float32)
    emulate_kernel(kernel, [q, step, point, weights, sums, scales, bias, y])
    total = (q.astype(np.int32) - point[:, None]) @ weights.T.astype(np.int32)
    wanted = total.astype(np.float32) * step[:, None] * scales + bias
    np.testing.assert_array_equal(y, np.maximum(wanted, np.float32(-500)))
    halves = np.zeros((rows, outputs), np.float16)
    size = dataclasses.replace(size, clip=Clip(-2000.0, 2000.0))
    kernel = dynamic_gemm("k", size, "float16", multiprocessors)
    emulate_kernel(kernel, [q, step, point, weights, sums, scales, bias, halves])
    np.testing.assert_array_equal(halves, np.clip(wanted, -2000, 2000).astype(np.float16))


@pytest.mark.parametrize(("rows", "width", "dtype"), [(13, 100, "float16"), (2, 40000, "float32")])
def test_rows_of_any_length(rows: int, width: int, dtype: str) -> None:
    x = hostile_rows(rows, width)
    if dtype == "float16":
        x = np.clip(x, -60000, 60000)
    x = x.astype(dtype)
    factors = np.abs(random(width)) + np.float32(0.1)
    ties = min(width, 255)  # nearly, in the first row
    x[0], factors[:ties] = 0, 2
    x[0, :ties] = (np.arange(ties) + 0.5) * np.float32(0.03)
    x[0, 0] = np.float32(0.03) * 255
    made = (
        np.zeros((rows, padded_width(width)), np.int8),
        np.zeros(rows, np.float32),
        np.zeros(rows, np.int32),
    )
    kernel = quantise_rows("k", rows, width, dtype, True, MULTIPROCESSORS)
    emulate_kernel(kernel, [x, factors, *made])
    steps, size, point = quantised_rows(x.astype(np.float32) * factors)
    np.testing.assert_array_equal(made[0][:, :width], steps.astype(np.int32) - 128)
    assert not made[0][:, width:].any()
    np.testing.assert_array_equal(made[1], size[:, 0])
    np.testing.assert_array_equal(made[2], point[:, 0] - 128)
