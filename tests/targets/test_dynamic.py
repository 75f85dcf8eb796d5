"""Dynamically quantized products: one answer of NumPy, onnxruntime and all instruction sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.targets.base import UnsupportedModel
from edgepress.targets.lowering.build import lower
from edgepress.targets.lowering.dynamic import claim_dynamic_products, computes_integers
from edgepress.targets.program import Array
from edgepress.targets.reference import Reference
from tests.graphs import answers, feeds, net, random
from tests.targets.dynamic import (
    LARGEST,
    broken_rows,
    dynamic_nets,
    hostile_rows,
    product_net,
    quantized,
)
from tests.targets.interpret import run_program
from tests.targets.kernels import native_isas, target_of
from tests.targets.qdq import drawn, merged_graphs
from tests.targets.test_bit_equality import EMULATED, emulate, need_board

CLAMPS = ("", "Relu", "Clip")


def cases() -> tuple[list[ir.Model], list[dict[str, Array]]]:
    """Products of all sizes, some with a bias and a clamp, on rows of all kinds."""
    models, inputs = [], []
    sizes = [(1, 1, 1), (23, 7, 3), (11, 64, 16), (24, 97, 50), (3, 1536, 7), (40, 130, 65)]
    for i, (rows, width, outputs) in enumerate(sizes):
        clamp = CLAMPS[i % len(CLAMPS)]
        single = product_net((rows, width), outputs, bias=i % 2 == 1, clamp=clamp, seed=i)
        models.append(quantized(single))
        inputs.append({"x": hostile_rows(rows, width, i)})
    for i, model in enumerate(drawn(dynamic_nets(), 12)):
        shape = feeds(model)["x"].shape
        x = hostile_rows(int(np.prod(shape[:-1])), shape[-1], i)
        models.append(model)
        inputs.append({"x": x.reshape(shape)})
    return models, inputs


def reference(model: ir.Model, feed: dict[str, Array]) -> dict[str, Array]:
    return Reference(model).run(feed)


def same(got: dict[str, Array], model: ir.Model, feed: dict[str, Array], index: int) -> None:
    """Compare the first product's outputs to the bit, NaN included.

    Sums of float32 between products may be taken in another order, and flip a step.
    """
    wanted = reference(model, feed)
    exact = [name for name in wanted if name != "y" or len(wanted) == 1]
    for name in exact:
        np.testing.assert_array_equal(got[f"g{index}_{name}"], wanted[name], f"{index}: {name}")


def test_numpy_answers_as_onnxruntime() -> None:
    for model, feed in zip(*cases(), strict=True):
        wanted = answers(model, feed)
        for want, got in zip(wanted, reference(model, feed).values(), strict=True):
            tiny = np.abs(want) < np.finfo(np.float32).tiny  # of the one subnormal bias
            np.testing.assert_array_equal(got, np.where(tiny, 0, want))


@pytest.mark.parametrize("isa", native_isas())
def test_kernels_answer_as_numpy(isa: str) -> None:
    models, inputs = cases()
    program, joined = merged_graphs(models, target_of(isa), inputs)
    results = run_program(program, target_of(isa), joined)
    for index, (model, feed) in enumerate(zip(models, inputs, strict=True)):
        same(results, model, feed, index)


@pytest.mark.parametrize("isa", EMULATED)
def test_boards_answer_as_numpy(isa: str, tmp_path: Path) -> None:
    need_board(isa)
    models, inputs = cases()
    program, joined = merged_graphs(models, target_of(isa), inputs)
    results = emulate(program, isa, tmp_path, joined)
    for index, (model, feed) in enumerate(zip(models, inputs, strict=True)):
        same(results, model, feed, index)


# Edges ----------------------------------------------------------------------------------------


def test_rows_that_hold_nan_or_infinity_answer_nan_and_harm_no_other() -> None:
    model = quantized(product_net((8, 21), 18, bias=True, seed=1))
    x = broken_rows(21)
    wanted = reference(model, {"x": x})["y1"]
    broken = np.arange(8) % 2 == 0
    assert np.isnan(wanted[broken]).all()
    assert np.isfinite(wanted[~broken]).all()
    for isa in native_isas():
        program, joined = merged_graphs([model], target_of(isa), [{"x": x}])
        results = run_program(program, target_of(isa), joined)
        np.testing.assert_array_equal(results["g0_y1"], wanted, isa)


def test_a_smoothing_mul_is_part_of_the_rows() -> None:
    weights = {
        "w": random(21, 5),
        "v": random(21, 5, seed=1),
        "f": random(21) ** 2 * 1e3,
        "g": random(21, seed=1),
    }
    body = """s = Mul(f, x) p = MatMul(s, w) q = MatMul(s, v)
              t = Mul(x, g) u = MatMul(t, w) y = Sum(p, q, u)"""
    model = quantized(
        net("(float[11,21] x) => (float[11,5] p, float[11,5] q, float[11,5] u)", body, weights)
    )
    claimed = claim_dynamic_products(model)
    gemms = [node for node in claimed.graph if node.op_type == "DynamicGemm"]
    assert [node.inputs[0].name for node in gemms if node.inputs[0]] == ["x", "x", "x"]
    assert not any(node.op_type == "Mul" for node in claimed.graph)
    feed = {"x": hostile_rows(11, 21)}
    for want, got in zip(answers(model, feed), reference(model, feed).values(), strict=True):
        np.testing.assert_array_equal(got, want)
    for isa in native_isas():
        program, joined = merged_graphs([model], target_of(isa), [feed])
        kernels = [call.kernel for call in program.calls]
        assert sum("quantise_rows" in kernel for kernel in kernels) == 2  # p and q share one
        results = run_program(program, target_of(isa), joined)
        for name, wanted in reference(model, feed).items():
            np.testing.assert_array_equal(results[f"g0_{name}"], wanted, f"{isa} {name}")


def changed(model: ir.Model, op_type: str, index: int, array: Array) -> ir.Model:
    """The model with another constant at an input of its last node of an operator."""
    model = model.clone()
    node = next(node for node in reversed(model.graph) if node.op_type == op_type)
    value = ir.Value(
        name="other",
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.Tensor(array, name="other"),
    )
    model.graph.register_initializer(value)
    node.replace_input_with(index, value)
    return model


@pytest.mark.parametrize(
    ("op_type", "index", "array"),
    [
        ("Clip", 2, np.array(254, np.float32)),
        ("Clip", 1, np.array(1, np.float32)),
        ("Div", 0, np.array(2, np.float32)),
        ("Max", 1, np.array(2.0**-59, np.float32)),
        ("Mul", 1, np.full(5, 2.0**-61, np.float32)),  # a scale that is too small
        ("Mul", 1, np.ones((1, 5), np.float32)),
        ("MatMulInteger", 1, np.ones((21, 5), np.int8)),  # its sums are others
        ("MatMulInteger", 1, np.ones((21, 5), np.uint8)),
    ],
)
def test_what_differs_from_the_pattern_is_left_alone(
    op_type: str, index: int, array: Array
) -> None:
    model = quantized(product_net((3, 21), 5, bias=False))
    assert computes_integers(model)
    other = changed(model, op_type, index, array)
    assert not computes_integers(other)
    assert all(node.domain == "" for node in claim_dynamic_products(other).graph)


def test_a_value_of_the_pattern_that_something_else_reads_stays() -> None:
    model = quantized(product_net((3, 21), 5, bias=False))
    sums = next(node for node in model.graph if node.op_type == "MatMulInteger")
    model.graph.outputs.append(sums.outputs[0])
    assert not computes_integers(model)


def test_models_may_not_use_our_domain() -> None:
    model = claim_dynamic_products(quantized(product_net((3, 21), 5)))
    with pytest.raises(UnsupportedModel, match="edgepress"):
        lower(model, target_of("neon"))


def test_islands_are_all_that_is_not_a_product() -> None:
    model = quantized(
        net("(float[3,21] x) => (float[3,5] y)", "p = MatMul(x, w) y = Sigmoid(p)",
            {"w": random(21, 5)})
    )  # fmt: skip
    assert Reference(model).islands == ["Sigmoid_1"]
    assert not Reference(model).exact
    alone = quantized(net("(float[3,21] x) => (float[3,5] y)", "y = MatMul(x, w)",
                          {"w": random(21, 5)}))  # fmt: skip
    assert Reference(alone).exact


def test_nudged_islands_move_little() -> None:
    model = quantized(
        net("(float[3,21] x) => (float[3,5] y)", "m = Mul(x, f) s = Sigmoid(m) y = MatMul(s, w)",
            {"w": random(21, 5), "f": np.where(np.arange(21) < 2, LARGEST, 1).astype(np.float32)})
    )  # fmt: skip
    feed = {"x": np.clip(random(3, 21), -1, 1)}
    feed["x"][:, :2] = 1  # the largest number, as in masks: moved, it must not become infinite
    (still,) = Reference(model).run(feed).values()
    (moved,) = Reference(model).run(feed, nudged=True).values()
    assert 0 < np.abs(still - moved).max() < 1e-2 * np.abs(still).max()


def test_an_encoder_block_with_its_islands() -> None:
    weights: dict[str, Array] = {n: random(32, 32, seed=i) / 6 for i, n in enumerate("qkvo")}
    weights |= {"up": random(32, 64) / 6, "down": random(64, 32) / 8}
    weights |= {name: random(32, seed=i) for i, name in enumerate(("g", "b", "qb", "ob"))}
    body = """n = LayerNormalization<axis=-1>(x, g, b)
              q0 = MatMul(n, q) q1 = Add(q0, qb) k0 = MatMul(n, k) v0 = MatMul(n, v)
              kt = Transpose<perm=[0, 2, 1]>(k0) scores = MatMul(q1, kt)
              shares = Softmax<axis=-1>(scores) mixed = MatMul(shares, v0)
              o0 = MatMul(mixed, o) o1 = Add(o0, ob) sum = Add(x, o1)
              m = LayerNormalization<axis=-1>(sum, g, b)
              h = MatMul(m, up) s = Sigmoid(h) gate = Mul(h, s) d = MatMul(gate, down)
              y = Add(sum, d)"""
    model = quantized(net("(float[1,12,32] x) => (float[1,12,32] y)", body, weights))
    feed = {"x": random(1, 12, 32)}
    (wanted,) = reference(model, feed).values()
    np.testing.assert_array_equal(answers(model, feed)[0], wanted)
    isa = native_isas()[-1]
    program, joined = merged_graphs([model], target_of(isa), [feed])
    (got,) = run_program(program, target_of(isa), joined).values()
    assert np.abs(got - wanted).max() < 1e-2 * np.ptp(wanted)
    assert sum("dynamic_gemm" in call.kernel for call in program.calls) == 6
    # the normalisations quantize their rows themselves
    assert sum("layer_norm" in call.kernel for call in program.calls) == 2
    assert sum("quantise_rows" in call.kernel for call in program.calls) == 2


def test_a_model_without_shapes_holds_no_products() -> None:
    model = quantized(product_net((3, 21), 5))
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    for value in model.graph.inputs:
        value.shape = None
    assert not computes_integers(model)
