"""Functions of one value are quantized as one."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.calibration.base import Array
from edgepress.passes import _int8_rules
from edgepress.passes._functions import Functions, find_functions
from edgepress.passes._int8_rules import FOLLOWERS
from tests.graphs import answers, nodes, random
from tests.passes.int8_nets import PAIR, consumers, made, maker, parameters, quantized, samples_of

NUMBERS = {
    "half": 0.5, "one": 1, "three": 3, "six": 6, "zero": 0, "root": 2**0.5, "slope": 0.1,
    "a": 0.044715, "b": (2 / np.pi) ** 0.5,
}  # fmt: skip
FUNCTIONS = {
    "gelu": "d = Div(c, root) e = Erf(d) f = Add(e, one) g = Mul(c, f) y = Mul(g, half)",
    "gelu, other orders": "d = Div(c, root) e = Erf(d) f = Add(one, e) g = Mul(f, half) "
    "y = Mul(g, c)",
    "gelu by tanh": "p = Pow(c, three) q = Mul(a, p) r = Add(q, c) s = Mul(r, b) t = Tanh(s) "
    "u = Add(one, t) v = Mul(c, half) y = Mul(v, u)",
    "silu": "s = Sigmoid(c) y = Mul(c, s)",
    "silu, other order": "s = Sigmoid(c) y = Mul(s, c)",
    "hard-swish": "s = HardSigmoid <alpha=0.16666667> (c) y = Mul(c, s)",
    "hard-swish by clip": "d = Add(c, three) e = Clip(d, zero, six) f = Div(e, six) y = Mul(f, c)",
    "mish": "s = Softplus(c) t = Tanh(s) y = Mul(c, t)",
    "softplus": "e = Exp(c) f = Add(e, one) y = Log(f)",
    "logistic": "n = Neg(c) e = Exp(n) f = Add(one, e) y = Div(one, f)",
    "leaky": "p = Greater(c, zero) m = Mul(c, slope) y = Where(p, c, m)",
    "normalisation": "d = Sub(c, half) y = Div(d, three)",
}
SINGLE = ["Erf", "Exp", "Gelu", "Mish", "Selu", "Softplus", "Neg", "Div(c, three)", "Pow(c, three)"]


def model_of(body: str, *, opset: int = 17, **weights: Array) -> ir.Model:
    """A convolution, and what follows it."""
    numbers = {name: np.array(value, np.float32) for name, value in NUMBERS.items()}
    used = {name: array for name, array in numbers.items() if re.search(rf"\b{name}\b", body)}
    text = f"c = Conv(x, w) {body}"
    weights = {"w": random(4, 4, 1, 1), **used, **weights}
    return made("(float[1,4,6,6] x) => (float[1,4,6,6] y)", text, opset=opset, **weights)


def steps_of_error(model: ir.Model, quantized_model: ir.Model) -> float:
    """Largest error of `y`, in its steps, against the float function of the quantized `c`."""
    scale = {v.name: v.const_value for v in quantized_model.graph.initializers.values()}["y_scale"]
    assert scale is not None
    middle = next(n for n in quantized_model.graph if n.name == "c_DequantizeLinear").outputs[0]
    tail = model.clone()
    (conv,) = (node for node in tail.graph if node.op_type == "Conv")
    source = ir.val("given", ir.DataType.FLOAT, middle.shape)
    conv.outputs[0].replace_all_uses_with(source)
    tail.graph.remove(conv, safe=True)
    tail.graph.inputs[:] = [source]
    tapped = quantized_model.clone()
    tapped.graph.outputs.append(
        next(v for n in tapped.graph for v in n.outputs if v.name == middle.name)
    )
    worst = 0.0
    for feed in samples_of(model).feeds({"x": (1, 4, 6, 6)}):
        result, given = answers(tapped, feed)
        (wanted,) = answers(tail, {"given": given})
        worst = max(worst, float(np.abs(result - wanted).max() / scale.numpy()))
    return worst


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_rounds_once(name: str) -> None:
    model = model_of(FUNCTIONS[name])
    before = model.clone()
    outcome = quantized(model)
    assert outcome.skipped == []
    assert outcome.stats["activations_quantized"] == 3
    assert [n.outputs[0].name for n in model.graph if n.op_type == PAIR[0]] == [
        "x_QuantizeLinear_Output", "c_QuantizeLinear_Output", "y_QuantizeLinear_Output",
    ]  # fmt: skip
    assert steps_of_error(before, model) <= 0.501
    for number in set(NUMBERS) & set(before.graph.initializers):
        assert number in model.graph.initializers


@pytest.mark.parametrize("name", ["gelu", "gelu by tanh", "silu", "hard-swish by clip"])
def test_operator_by_operator_is_worse(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_int8_rules, "find_functions", lambda *_: Functions({}, set()))
    for op_type in ("Div", "Erf", "Pow"):
        monkeypatch.setitem(_int8_rules.FOLLOWERS, op_type, lambda _: None)
    model = model_of(FUNCTIONS[name])
    before = model.clone()
    assert quantized(model).skipped == []
    assert steps_of_error(before, model) > 0.65


@pytest.mark.parametrize("text", SINGLE)
def test_single_operators(text: str) -> None:
    model = model_of(f"y = {text if '(' in text else f'{text}(c)'}", opset=20)
    before = model.clone()
    assert quantized(model).skipped == []
    assert steps_of_error(before, model) <= 0.501


def test_what_others_read_gets_a_scale_and_splits_a_function() -> None:
    model = made(
        "(float[1,4] x) => (float[1,4] y, float[1,4] z)",
        "c = Gemm(x, w) a = Abs(c) b = Exp(a) d = Neg(b) y = Tanh(d) z = Gemm(b, w)",
        w=random(4, 4),
    )
    assert quantized(model).skipped == []
    made_of = {node.outputs[0].name: node for node in model.graph}
    assert parameters(model, "b") == ("b_scale", "b_zero_point")
    assert maker(made_of["d"].inputs[0] or model.graph.inputs[0]) == PAIR[1]
    assert [maker(v) for n, v in consumers(model) if n.op_type in ("Exp", "Tanh")] == [
        "Abs", "Neg",
    ]  # fmt: skip


def test_a_function_may_have_two_results() -> None:
    model = made(
        "(float[1,4] x) => (float[1,4] y, float[1,4] z)",
        "c = Gemm(x, w) e = Exp(c) y = Neg(e) z = Tanh(e)",
        w=random(4, 4),
    )
    outcome = quantized(model)
    assert outcome.skipped == []
    assert outcome.stats["activations_quantized"] == 4


def found(body: str, **weights: Array) -> dict[str, str]:
    """Nodes that belong to functions, with their source."""
    model = made("(float[1,4] x) => (float[1,4] y)", body, opset=17, **weights)
    functions = find_functions(list(model.graph), FOLLOWERS)
    return {n.outputs[0].name or "": s.name or "" for n, s in functions.sources.items()}


def test_what_is_no_function() -> None:
    constants: dict[str, Array] = {
        "w": random(4, 4), "k": random(4), "wide": random(1, 1, 1, 1),
        "one": np.array(1, np.float32), "zero": np.array(0, np.float32),
    }  # fmt: skip

    def members(body: str) -> dict[str, str]:
        return found(body, **constants)

    assert members("s = Sigmoid(x) y = Mul(s, x)") == {"s": "x", "y": "x"}
    # two values
    assert members("h = Gemm(x, w) e = Exp(h) y = Mul(e, x)") == {"e": "h"}
    # a constant per channel, and one that makes the result larger
    assert members("m = Mul(x, k) y = Sigmoid(m)") == {}
    assert members("e = Exp(x) v = Add(e, wide) y = Mul(x, x)") == {"e": "x"}
    # a rectifier folds into the layer before it
    assert members("h = Gemm(x, w) r = Relu(h) y = Mul(r, one)") == {}
    assert members("h = Gemm(x, w) a = Add(h, x) r = Relu(a) y = Mul(r, one)") == {}
    assert members("h = Gemm(x, w) a = Add(h, one) r = Relu(a) y = Mul(r, one)") == {
        "a": "h", "r": "h", "y": "h",
    }  # fmt: skip
    # a condition that somebody else reads
    text = "e = Exp(x) p = Greater(e, one) h = Gemm(x, w) y = Where(p, h, e)"
    assert members(text) == {"e": "x"}
    # too steep
    for steep in ("Log(x)", "Sqrt(x)", "Reciprocal(x)", "Div(one, x)", "Pow(x, zero)"):
        assert members(f"y = {steep}") == {}
    assert members("y = Div(x, zero)") == {}
    assert members("y = Pow(one, x)") == {"y": "x"}


def test_a_skipped_node_is_in_no_function() -> None:
    model = model_of(FUNCTIONS["gelu"])
    outcome = quantized(model, skip=("Erf_2",))
    reasons = dict(outcome.skipped)
    assert reasons.pop("Erf_2") == "skipped by 'Erf_2'"
    assert reasons == {
        "Add_3": "its input 'e' is float",
        "Mul_4": "its input 'f' is float",
        "Mul_5": "its input 'g' is float",
    }


def test_a_function_of_a_float_stays_float() -> None:
    model = made(
        "(float[1,4] x) => (float[1,4] y)",
        "l = LayerNormalization(x, s) e = Erf(l) m = Mul(e, l) y = Gemm(m, w)",
        w=random(4, 4),
        s=random(4),
    )
    reasons = dict(quantized(model).skipped)
    assert reasons["Erf_1"] == reasons["Mul_2"].replace("'e'", "'l'") == "its input 'l' is float"


def test_a_constant_that_dwarfs_what_it_is_added_to_stays_float() -> None:
    mask = np.where(np.arange(4) < 2, 0, -10_000).astype(np.float32)
    for text in ("Add(c, mask)", "Add(mask, c)", "Sub(c, mask)"):
        model = made(
            "(float[1,4] x) => (float[1,4] y)",
            f"c = Gemm(x, w) m = {text} y = Softmax(m)", w=random(4, 4), mask=mask,
        )  # fmt: skip
        ((name, why), (_, follows)) = quantized(model).skipped
        assert name == f"{text[:3]}_1"
        assert why.startswith("its constant spans ")
        assert follows == "its input 'm' is float"


def test_softmax_follows_integers() -> None:
    model = made(
        "(float[1,4] x) => (float[1,4] y)", "c = Gemm(x, w) y = Softmax(c)", w=random(4, 4)
    )
    assert quantized(model).skipped == []
    assert maker(model.graph.outputs[0]) == PAIR[1]


def test_a_softmax_of_too_many_elements_stays_float() -> None:
    model = made("(float[1,131073] x) => (float[1,131073] y)", "y = Softmax(x)")
    ((_, why),) = quantized(model).skipped
    assert why == "a sum of 131073 exponentials may overflow"


UNARY = ["Abs", "Erf", "Neg", "Relu", "Sigmoid", "Softplus", "Tanh"]
BINARY = ["Add", "Max", "Min", "Sub"]


@st.composite
def expressions(draw: st.DrawFn) -> str:
    """A net of element-wise operators behind a convolution, none of which soon overflows."""
    values, lines = ["c"], []
    for index in range(draw(st.integers(1, 7))):
        name = f"v{index}"
        operand = st.sampled_from(values)
        if draw(st.booleans()):
            lines.append(f"{name} = {draw(st.sampled_from(UNARY))}({draw(operand)})")
        else:
            constant = draw(st.sampled_from(["half", "three"]))
            kind, other = draw(
                st.one_of(
                    st.tuples(st.sampled_from(BINARY), st.one_of(operand, st.just(constant))),
                    st.just(("Mul", constant)),
                )
            )
            lines.append(f"{name} = {kind}({draw(operand)}, {other})")
        values.append(name)
    return " ".join([*lines, f"y = Tanh({values[-1]})"])


@given(body=expressions())
@settings(deadline=None, max_examples=25)
def test_any_expression_becomes_integers(body: str) -> None:
    model = model_of(body)
    before = nodes(model)
    outcome = quantized(model)
    assert outcome.skipped == [], before
    inside = find_functions(list(model.graph), FOLLOWERS).inner
    for value in inside:
        assert not any(user.op_type == PAIR[0] for user in value.consumers())
