"""Which operators become one layer normalisation, and that it answers what they did."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.targets.lowering.build import lower, lowered_graph
from edgepress.targets.lowering.floats import claim_float_operators
from edgepress.targets.lowering.normalization import fuse_normalizations
from edgepress.targets.program import Program
from edgepress.targets.reference import Reference
from tests.graphs import answers, feeds, net, nodes, random
from tests.targets.dynamic import quantized
from tests.targets.interpret import run_program
from tests.targets.kernels import native_isas, target_of
from tests.targets.qdq import merged_graphs, shaped

ISA = native_isas()[-1]
WEIGHTS = {
    "g": random(12),
    "b": random(1, 12),
    "gg": random(5, 12),
    "many": random(4, 12),
    "single": np.array([1.5], np.float32),
    "epsilon": np.array(1e-3, np.float32),
    "two": np.array(2, np.float32),
    "half": np.array(0.5, np.float32),
    "minus_half": np.array(-0.5, np.float32),
    "one": np.array(1, np.float32),
    "w": random(12, 7),
    "v": random(12, 12),
}
CENTRED = "m = ReduceMean <axes=[-1]> (x) d = Sub(x, m) "
ROOT = "v0 = ReduceMean <axes=[2]> (s) e = Add(v0, epsilon) r = Sqrt(e) "
WRITTEN = f"{CENTRED} s = Pow(d, two) {ROOT} n = Div(d, r) k = Mul(n, g) y = Add(k, b)"
FORMS = [
    "y = LayerNormalization(x, g)",
    "y = LayerNormalization <axis=-1, epsilon=0.01> (x, g, b0)",
    "y = LayerNormalization <axis=1> (x, gg)",
    WRITTEN,
    f"{CENTRED} s = Mul(d, d) {ROOT} i = Reciprocal(r) n = Mul(i, d) k = Mul(g, n) y = Add(b, k)",
    f"{CENTRED} s = Pow(d, two) {ROOT} i = Div(one, r) n = Mul(d, i) y = Mul(n, single)",
    f"{CENTRED} s = Pow(d, two) {ROOT} n = Div(d, r) y = Add(n, b)",
    f"""{CENTRED} m2 = ReduceMean <axes=[2]> (x) d2 = Sub(x, m2) s = Pow(d2, two) {ROOT}
        n = Div(d, r) y = Add(n, single)""",
    f"s = Mul(x, x) {ROOT} i = Reciprocal(r) n = Mul(x, i) y = Mul(n, g)",
    """s = Pow(x, two) v0 = ReduceMean <axes=[-1]> (s) e = Add(epsilon, v0) r = Pow(e, half)
        y = Div(x, r)""",
    """s = Pow(x, two) v0 = ReduceMean <axes=[-1]> (s) e = Add(v0, epsilon)
       i = Pow(e, minus_half) n = Mul(x, i) y = Mul(g, n)""",
]


def norm_net(body: str, more: str = "", opset: int = 17) -> ir.Model:
    weights = {**WEIGHTS, "b0": WEIGHTS["b"][0]}
    signature = f"(float[4,5,12] x, float[4,5,12] z) => (float y{more})"
    return shaped(net(signature, body, weights, opset=opset))


def fused(model: ir.Model) -> list[str]:
    return nodes(fuse_normalizations(claim_float_operators(model))).splitlines()


def graph_of(model: ir.Model) -> list[ir.Node]:
    return list(lowered_graph(model, target_of(ISA)).graph)


@pytest.mark.parametrize("body", FORMS)
def test_every_form_becomes_one_node(body: str) -> None:
    (line,) = fused(norm_net(body))
    assert line.startswith("y = LayerNorm(x, ")
    centred = "ReduceMean <axes=[-1]> (x)" in body or "LayerNormalization" in body
    assert f"centred={int(centred)}," in line


def test_root_mean_square_of_onnx() -> None:
    model = norm_net("y = RMSNormalization <epsilon=0.5> (x, g)", opset=23)
    (line,) = fused(model)
    assert "axis=2, centred=0, epsilon=0.5" in line
    assert "LayerNorm" in [node.op_type for node in graph_of(model)]


def test_all_forms_answer_as_onnxruntime() -> None:
    models = [norm_net(body) for body in (*FORMS, *NOT_CENTRED)]
    models += [
        norm_net("t = Add(x, z) y = LayerNormalization(t, g)"),
        norm_net("t = Add(x, z) y = LayerNormalization(t, g, b0)", ", float t"),
        norm_net("t = Add(x, z) l = LayerNormalization(t, g) q = Sigmoid(t) y = Add(l, q)"),
        norm_net(f"t = Add(x, z) {WRITTEN.replace('(x', '(t')} u = Add(t, y)", ", float u"),
        norm_net("p = MatMul(x, v) t = Add(p, z) y = LayerNormalization(t, g)", ", float t"),
    ]
    fed = [feeds(model) for model in models]
    program, joined = merged_graphs(models, target_of(ISA), fed)
    results = run_program(program, target_of(ISA), joined)
    for index, (model, feed) in enumerate(zip(models, fed, strict=True)):
        names = [value.name for value in model.graph.outputs]
        for name, wanted in zip(names, answers(model, feed), strict=True):
            got = results[f"g{index}_{name}"]
            np.testing.assert_allclose(got, wanted, atol=1e-5, err_msg=f"{index} {name}")


NOT_CENTRED = [
    WRITTEN.replace("axes=[-1]", "axes=[1]"),
    WRITTEN.replace("Sub(x, m)", "Sub(m, x)"),
    WRITTEN.replace("Sub(x, m)", "Sub(z, m)"),
]
NEAR_MISSES = [
    WRITTEN.replace("axes=[2]", "axes=[1]"),
    WRITTEN.replace("Pow(d, two)", "Pow(d, half)"),
    WRITTEN.replace("Pow(d, two)", "Pow(x, two)"),
    WRITTEN.replace("Pow(d, two)", "Mul(d, x)"),
    WRITTEN.replace("Sqrt", "Exp"),
    WRITTEN.replace("Div(d, r)", "Div(r, d)"),
    WRITTEN.replace("Div(d, r)", "Div(z, r)"),
    WRITTEN.replace("epsilon", "g"),
    "w0 = ReduceMax <axes=[0, 1], keepdims=0> (z) y = LayerNormalization(x, w0)",
    f"s = Mul(x, x) {ROOT} i = Div(two, r) y = Mul(x, i)",
]


@pytest.mark.parametrize("body", NEAR_MISSES)
def test_what_is_nearly_one_is_left_alone(body: str) -> None:
    model = norm_net(body)
    assert fused(model) == nodes(claim_float_operators(model)).splitlines()
    program = lower(model, target_of(ISA))
    assert not any("layer_norm" in call.kernel for call in program.calls)


@pytest.mark.parametrize("body", NOT_CENTRED)
def test_another_difference_is_normalised_without_its_mean(body: str) -> None:
    lines = fused(norm_net(body))
    assert [line.split("(")[0] for line in lines] == ["m = ReduceMean", "d = Sub", "y = LayerNorm"]
    assert "centred=0" in lines[-1]


@pytest.mark.parametrize("inner", ["m", "d", "s", "v0", "e", "r", "n", "k"])
def test_values_that_are_read_elsewhere_stay(inner: str) -> None:
    found = "".join(fused(norm_net(WRITTEN, f", float {inner}")))
    if inner in ("n", "k"):  # a shorter form ends there
        assert f"{inner} = LayerNorm(" in found
    else:
        assert "LayerNorm" not in found


def test_a_scale_per_row_stays_behind() -> None:
    lines = fused(norm_net(WRITTEN.replace("Mul(n, g)", "Mul(n, gg)")))
    assert [line.split("(")[0] for line in lines] == ["n = LayerNorm", "k = Mul", "y = Add"]


# Around it ------------------------------------------------------------------------------------


def test_the_addition_before_is_part_of_it() -> None:
    (norm,) = graph_of(norm_net("t = Add(x, z) y = LayerNormalization(t, g)"))
    assert [value and value.name for value in norm.inputs][::3] == ["x", "z"]
    assert len(norm.outputs) == 1
    both = graph_of(norm_net("t = Add(x, z) y = LayerNormalization(t, g) u = Neg(t)", ", float u"))
    assert [node.op_type for node in both] == ["LayerNorm", "Neg"]
    assert len(both[0].outputs) == 2


def test_additions_of_other_shapes_stay() -> None:
    for addend in ("g", "single", "z0"):
        head = "z0 = ReduceMax <axes=[1]> (z) " if addend == "z0" else ""
        body = f"{head}t = Add(x, {addend}) y = LayerNormalization(t, g)"
        kinds = [node.op_type for node in graph_of(norm_net(body))]
        assert kinds[-2:] == ["Add", "LayerNorm"]


def kernels(program: Program) -> list[str]:
    return [call.kernel.rstrip("_0123456789") for call in program.calls]


def test_it_quantizes_rows_for_the_products_behind_it() -> None:
    body = "n = LayerNormalization(x, g, b0) p = MatMul(n, w) q = MatMul(n, v) y = Add(n, q)"
    model = quantized(norm_net(body, ", float p"))
    fed = feeds(model)
    program = lower(model, target_of(ISA))
    assert kernels(program)[:3] == ["layer_norm", "dynamic_gemm", "dynamic_gemm"]
    assert "quantise_rows" not in kernels(program)
    got, wanted = run_program(program, target_of(ISA), fed), Reference(model).run(fed)
    for name in wanted:  # a last bit of the normalisation may flip a step
        np.testing.assert_allclose(got[name], wanted[name], atol=0.02 * np.abs(wanted[name]).max())


def test_rows_with_other_factors_are_quantized_once_more() -> None:
    body = """n = LayerNormalization(x, g, b0) s = Mul(n, f) p = MatMul(s, w) t = Mul(n, h)
              q = MatMul(t, v) r = MatMul(s, v) y = Sum(q, r)"""
    signature = "(float[4,5,12] x) => (float y, float p)"
    weights = {**WEIGHTS, "b0": random(12), "f": np.abs(random(12)) + 1, "h": random(12, seed=1)}
    model = quantized(net(signature, body, weights))
    fed = feeds(model)
    program = lower(model, target_of(ISA))
    assert kernels(program).count("quantise_rows") == 1
    got, wanted = run_program(program, target_of(ISA), fed), Reference(model).run(fed)
    for name in wanted:
        np.testing.assert_allclose(got[name], wanted[name], atol=0.03 * np.abs(wanted[name]).max())
