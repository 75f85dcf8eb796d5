"""Activation functions in registers: their values, the groups of operators that become them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.targets.isa.base import load_isa
from edgepress.targets.lowering.activations import fuse_activations
from edgepress.targets.lowering.build import lower
from edgepress.targets.lowering.floats import claim_float_operators
from edgepress.targets.program import Array
from edgepress.targets.reference import Reference
from edgepress.targets.schedules.activations import FUNCTIONS, Activation
from edgepress.targets.schedules.epilogue import Clip
from edgepress.targets.schedules.float_elementwise import activate
from tests.graphs import answers, feeds, net, nodes, random
from tests.targets.dynamic import quantized
from tests.targets.interpret import run_program
from tests.targets.kernels import (
    Case,
    Window,
    compare,
    conv_case,
    depthwise_case,
    native_isas,
    program_of,
    target_of,
)
from tests.targets.qdq import merged_graphs, shaped
from tests.targets.test_bit_equality import EMULATED, emulate, need_board

Function = Callable[..., float]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def _gelu_tanh(x: float) -> float:
    return x * _sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)) if x > -20 else 0.0


ORACLES: dict[str, Function] = {
    "gelu": lambda x: x * math.erfc(-x / math.sqrt(2)) / 2,
    "gelu_tanh": _gelu_tanh,
    "hard_sigmoid": lambda x, a, b: min(max(a * x + b, 0), 1),
    "hard_swish": lambda x: x * min(max(x / 6 + 0.5, 0), 1),
    "leaky_relu": lambda x, slope: x if x > 0 else slope * x,
    "sigmoid": _sigmoid,
    "silu": lambda x, slope: x * _sigmoid(slope * x),
    "tanh": math.tanh,
}
PARAMETERS: dict[str, list[tuple[float, ...]]] = {
    "hard_sigmoid": [(0.2, 0.5), (1 / 6, 0.5)],
    "leaky_relu": [(0.01,), (1.5,), (-0.3,)],
    "silu": [(1.0,), (1.702,)],
}
ACTIVATIONS = [Activation(name, p) for name in FUNCTIONS for p in PARAMETERS.get(name, [()])]
LIMIT = 2.0**-22  # of the larger of 1 and the argument


def inputs() -> Array:
    values = np.random.default_rng(0)
    grid = np.linspace(-12, 12, 4801)
    small = np.exp(values.uniform(-60, 0, 500)) * values.choice([-1, 1], 500)
    return np.concatenate([grid, small, values.uniform(-90, 90, 500), [1e30, -1e30, -0.0]]).astype(
        np.float32
    )


def exact(activation: Activation, x: Array) -> Array:
    function = ORACLES[activation.name]
    return np.array([function(float(v), *activation.parameters) for v in x.ravel()]).reshape(
        x.shape
    )


def case(activation: Activation, isa: str, x: Array) -> Case:
    def generate(name: str) -> Any:
        return activate(name, x.size, load_isa(isa), activation)

    return Case(generate, (x,), exact(activation, x).astype(np.float32), str(activation))


def test_every_function_has_an_oracle() -> None:
    assert ORACLES.keys() == FUNCTIONS.keys()


@pytest.mark.parametrize("isa", native_isas())
def test_functions_are_as_exact_as_float32_lets_them(isa: str) -> None:
    x = inputs()
    program, fed = program_of([case(activation, isa, x) for activation in ACTIVATIONS])
    results = run_program(program, target_of(isa), fed)
    for index, activation in enumerate(ACTIVATIONS):
        error = np.abs(results[f"k{index}_out"] - exact(activation, x))
        assert (error / np.maximum(np.abs(x), 1)).max() < LIMIT, activation


def test_gelu_keeps_digits_where_it_is_small() -> None:
    x = np.concatenate([np.linspace(-3, 0, 2001), -np.logspace(-30, -3, 500)]).astype(np.float32)
    isa = native_isas()[-1]
    for name in ("gelu", "gelu_tanh"):
        program, fed = program_of([case(Activation(name), isa, x)])
        got = run_program(program, target_of(isa), fed)["k0_out"]
        np.testing.assert_allclose(got, exact(Activation(name), x), rtol=4e-6, err_msg=name)


@pytest.mark.parametrize("isa", native_isas())
def test_infinities_and_nan(isa: str) -> None:
    x = np.array([np.inf, np.nan, 1, np.nan], np.float32)
    chosen = [a for a in ACTIVATIONS if a.parameters != (-0.3,)]
    wanted = {"hard_sigmoid": 1, "sigmoid": 1, "tanh": 1}
    program, fed = program_of([case(activation, isa, x[:1]) for activation in chosen])
    fed = dict.fromkeys(fed, x[:1])
    for index, (name, result) in enumerate(run_program(program, target_of(isa), fed).items()):
        assert result == wanted.get(chosen[index].name, np.inf), name
    zeros = np.zeros(4, np.float32)
    program, fed = program_of([case(activation, isa, zeros) for activation in chosen])
    for name, result in run_program(program, target_of(isa), dict.fromkeys(fed, x)).items():
        np.testing.assert_array_equal(np.isnan(result), np.isnan(x), name)


def epilogue_cases(isa_name: str, activations: list[Activation]) -> list[Case]:
    """Products of odd sizes with each function behind them."""
    isa, cases = load_isa(isa_name), []
    for seed, activation in enumerate(activations):
        with_it, window = Clip(activation=activation), Window(out=(1, 7), out_channels=21)
        makers: list[tuple[Callable[..., Case], Window]] = [(conv_case, window)]
        if activation.name in ("gelu", "sigmoid"):
            window = Window(out=(2, 3), channels=21, kernel=(3, 2), groups=21)
            makers.append((depthwise_case, window))
        for make, window in makers:
            sums, fused = (make(window, isa, e, seed=seed) for e in (Clip(), with_it))
            wanted = exact(activation, sums.wanted).astype(np.float32)
            cases.append(Case(fused.kernel, sums.arguments, wanted, f"{window} {activation}"))
    return cases


@pytest.mark.parametrize("isa", native_isas())
def test_products_compute_them(isa: str) -> None:
    cases = epilogue_cases(isa, ACTIVATIONS)
    program, fed = program_of(cases)
    compare(cases, run_program(program, target_of(isa), fed))


@pytest.mark.parametrize("isa", EMULATED)
def test_boards_compute_them(isa: str, tmp_path: Path) -> None:
    need_board(isa)
    cases = epilogue_cases(isa, [Activation("gelu"), Activation("sigmoid")])
    cases += [case(activation, isa, inputs()[::11]) for activation in ACTIVATIONS]
    program, fed = program_of(cases)
    compare(cases, emulate(program, isa, tmp_path, fed))


# Patterns -------------------------------------------------------------------------------------

CONSTANTS: dict[str, Any] = {
    "root": np.float32(math.sqrt(2)),
    "root_half": np.float32(math.sqrt(0.5)),
    "one": np.float32(1),
    "half": np.array([0.5], np.float32),
    "cubic": np.float32(0.044715),
    "steep": np.float32(math.sqrt(2 / math.pi)),
    "steep_cubic": np.float32(0.044715 * math.sqrt(2 / math.pi)),
    "three": np.float32(3),
    "two": np.float32(2),
    "six": np.float32(6),
    "zero": np.float32(0),
    "quick": np.float32(1.702),
}
FORMS = {
    "y = Gelu(p)": "gelu",
    'y = Gelu <approximate="tanh"> (p)': "gelu_tanh",
    "a = Div(p, root) e = Erf(a) o = Add(e, one) m = Mul(p, o) y = Mul(m, half)": "gelu",
    "h = Mul(half, p) a = Mul(root_half, p) e = Erf(a) o = Add(one, e) y = Mul(h, o)": "gelu",
    "a = Div(p, root) e = Erf(a) o = Add(e, one) m = Mul(o, half) y = Mul(m, p)": "gelu",
    "a = Div(p, root) e = Erf(a) o = Add(e, one) m = Mul(o, p) y = Div(m, two)": "gelu",
    """c = Pow(p, three) s = Mul(c, cubic) i = Add(p, s) a = Mul(i, steep) t = Tanh(a)
       o = Add(t, one) h = Mul(p, half) y = Mul(h, o)""": "gelu_tanh",
    """q = Mul(p, p) s = Mul(q, steep_cubic) i = Add(s, steep) a = Mul(p, i) t = Tanh(a)
       o = Add(one, t) m = Mul(p, o) y = Mul(half, m)""": "gelu_tanh",
    "s = Sigmoid(p) y = Mul(p, s)": "silu",
    "a = Mul(p, quick) s = Sigmoid(a) y = Mul(s, p)": "silu",
    "y = HardSwish(p)": "hard_swish",
    "s = HardSigmoid <alpha=0.16666667> (p) y = Mul(p, s)": "hard_swish",
    "a = Add(p, three) c = Clip(a, zero, six) m = Mul(p, c) y = Div(m, six)": "hard_swish",
    "a = Add(three, p) c = Clip(a, zero, six) q = Div(c, six) y = Mul(q, p)": "hard_swish",
    "y = HardSigmoid(p)": "hard_sigmoid",
    "y = LeakyRelu <alpha=0.2> (p)": "leaky_relu",
    "y = Sigmoid(p)": "sigmoid",
    "y = Tanh(p)": "tanh",
}
PRODUCTS = {
    "Gemm": ("float[9,17] x", "d = MatMul(x, w) p = Add(d, b)", {"w": (17, 21), "b": (21,)}),
    "Conv": ("float[1,3,6,7] x", "p = Conv(x, w, b)", {"w": (5, 3, 3, 2), "b": (5,)}),
}
GELU = next(body for body in FORMS if "Erf" in body)


def product_net(kind: str, body: str, more: str = "") -> ir.Model:
    """A product p, then operators that make y of it."""
    x, product, shapes = PRODUCTS[kind]
    weights = {name: random(*shape) for name, shape in shapes.items()}
    model = net(
        f"({x}) => (float y{more})", f"{product} {body}", {**weights, **CONSTANTS}, opset=20
    )
    return shaped(model)


def fused(model: ir.Model) -> list[str]:
    return nodes(fuse_activations(claim_float_operators(model))).splitlines()


@pytest.mark.parametrize(("body", "name"), FORMS.items())
def test_products_take_what_exporters_write(body: str, name: str) -> None:
    for kind in PRODUCTS:
        (line,) = fused(product_net(kind, body))
        assert line.startswith(f"y = {kind}(x")
        assert f"activation={name}," in line


def test_gelu_elsewhere_is_a_node_of_its_own() -> None:
    lines = fused(product_net("Gemm", GELU.replace("p", "x")))
    assert lines == ["y = Activation(x) {activation=gelu, parameters=[]}"]
    lines = fused(product_net("Gemm", "r = Relu(p) " + GELU.replace("p", "r")))
    assert [line.split("(")[0] for line in lines] == ["r = Gemm", "y = Activation"]
    assert len(fused(product_net("Gemm", "y = Tanh(x)"))) == 1
    assert "Activation" not in fused(product_net("Gemm", "y = Tanh(x)"))[0]


NEAR_MISSES = [
    GELU.replace("root", "two"),
    GELU.replace("one", "half"),
    GELU.replace("half", "two"),
    GELU.replace("Erf", "Sin"),
    "a = Div(p, root) e = Tanh(a) o = Add(e, one) m = Mul(p, o) y = Mul(m, half)",
    "n = Neg(p) a = Div(p, root) e = Erf(a) o = Add(e, one) m = Mul(n, o) y = Mul(m, half)",
    "a = Div(root, p) e = Erf(a) o = Add(e, one) m = Mul(p, o) y = Mul(m, half)",
    "a = Div(p, root) e = Erf(a) o = Sub(e, one) m = Mul(p, o) y = Mul(m, half)",
    """c = Pow(p, two) s = Mul(c, cubic) i = Add(p, s) a = Mul(i, steep) t = Tanh(a)
       o = Add(t, one) h = Mul(p, half) y = Mul(h, o)""",
    "s = Sigmoid(p) n = Neg(p) y = Mul(n, s)",
    "a = Add(p, three) c = Clip(a, zero, three) m = Mul(p, c) y = Div(m, six)",
    "a = Add(p, three) c = Clip(a, zero, six) m = Mul(p, c) y = Div(six, m)",
    "s = HardSigmoid(p) y = Mul(p, s)",
    "m = Mul(p, p) y = Mul(m, m)",
]


@pytest.mark.parametrize("body", NEAR_MISSES)
def test_what_is_nearly_one_is_left_alone(body: str) -> None:
    model = product_net("Gemm", body)
    assert fused(model) == nodes(claim_float_operators(model)).splitlines()


@pytest.mark.parametrize("inner", ["p", "a", "e", "o", "m"])
def test_values_that_are_read_elsewhere_stay(inner: str) -> None:
    model = product_net("Gemm", GELU, f", float {inner}")
    lines = fused(model)
    if inner == "p":
        assert [line.split("(")[0] for line in lines] == ["p = Gemm", "y = Activation"]
    else:
        assert lines == nodes(claim_float_operators(model)).splitlines()


def test_a_product_that_another_node_reads_keeps_its_output() -> None:
    lines = fused(product_net("Gemm", "y = Tanh(p) n = Neg(p)", ", float n"))
    assert [line.split("(")[0] for line in lines] == ["p = Gemm", "y = Tanh", "n = Neg"]


def test_a_clamp_keeps_the_function_out() -> None:
    lines = fused(product_net("Gemm", "r = Relu(p) y = Tanh(r)"))
    assert [line.split("(")[0] for line in lines] == ["r = Gemm", "y = Tanh"]


@pytest.mark.parametrize("isa", native_isas()[-1:])
def test_whole_graphs_answer_as_onnxruntime(isa: str) -> None:
    models = [product_net(kind, body) for body in FORMS for kind in PRODUCTS]
    models += [product_net("Gemm", GELU, ", float p"), product_net("Conv", f"{GELU} z = Add(y, y)")]
    fed = [feeds(model) for model in models]
    program, joined = merged_graphs(models, target_of(isa), fed)
    results = run_program(program, target_of(isa), joined)
    for index, (model, feed) in enumerate(zip(models, fed, strict=True)):
        names = [value.name for value in model.graph.outputs]
        for name, wanted in zip(names, answers(model, feed), strict=True):
            got = results[f"g{index}_{name}"]
            np.testing.assert_allclose(got, wanted, atol=3e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("isa", native_isas()[-1:])
def test_products_of_quantized_rows_take_them(isa: str) -> None:
    model = quantized(product_net("Gemm", GELU))
    program = lower(model, target_of(isa))
    assert [call.kernel.rstrip("_0123456789") for call in program.calls] == [
        "quantise_rows",
        "dynamic_gemm",
    ]
    fed = feeds(model)
    got, wanted = run_program(program, target_of(isa), fed)["y"], Reference(model).run(fed)["y"]
    np.testing.assert_allclose(got, wanted, atol=1e-6 * np.abs(wanted).max())
