from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.passes.base import Context
from edgepress.passes.fix_shapes import FixShapes
from edgepress.passes.fold_constants import FoldConstants
from edgepress.passes.lift_constants import LiftConstants
from tests.graphs import Array, apply, net, nodes, random, weight


def fixed(model: ir.Model) -> ir.Model:
    """What comes before this pass."""
    model = FixShapes().call(model, Context()).model
    return LiftConstants().call(model, Context()).model


def test_a_target_shape_that_is_computed() -> None:
    body = """
    s = Shape(x) i = Constant <value_int=0> () b = Gather(s, i)
    z = Constant <value_ints=[0]> () u = Unsqueeze(b, z)
    m = Constant <value_ints=[-1]> () c = Concat <axis=0> (u, m) y = Reshape(x, c)
    """
    outcome = apply(FoldConstants(), fixed(net("(float[N,3,4] x) => (float[A,B] y)", body)))
    assert nodes(outcome.model) == "y = Reshape(x, c)"
    assert list(outcome.model.graph.initializers) == ["c"]
    assert weight(outcome.model, "c").tolist() == [1, -1]
    assert outcome.stats == {"folded": 4}


def test_paddings_that_are_computed() -> None:
    """As torch exports `F.pad` by an amount that depends on the image size."""
    body = """
    s = Shape(x) h = Gather(s, two) a = Add(h, one) b = Div(a, two) p = Sub(b, two)
    f = Cast <to=7> (p) u = Unsqueeze(f, zero) l = Concat <axis=0> (zero, u, zero, u)
    n = ConstantOfShape <value = int64[1] {0}> (four) c = Concat <axis=0> (l, n)
    m = Reshape(c, matrix) r = Slice(m, back, end, zero, back) t = Transpose <perm=[1,0]> (r)
    v = Reshape(t, flat) y = Pad(x, v)
    """
    weights = {
        "zero": np.array([0]),
        "one": np.array(1),
        "two": np.array(2),
        "four": np.array([4]),
        "matrix": np.array([-1, 2]),
        "back": np.array([-1]),
        "end": np.array([-(2**62)]),
        "flat": np.array([-1]),
    }
    signature = "(float[N,2,7,7] x) => (float[N,2,H,W] y)"
    outcome = apply(FoldConstants(), fixed(net(signature, body, weights)))
    assert nodes(outcome.model) == "y = Pad(x, v)"
    assert weight(outcome.model, "v").tolist() == [0, 0, 0, 0, 0, 0, 2, 2]


def test_masks_that_are_expanded() -> None:
    """As torch exports the attention mask of BERT."""
    body = """
    s = Shape(m) b = Gather(s, i0) q = Gather(s, i1) c = Concat <axis=0> (b, i1, q, q)
    k = Shape(c) ones = ConstantOfShape <value = int64[1] {1}> (k) neg = Mul(ones, minus)
    e = Equal(c, neg) w = Where(e, ones, c) u = Unsqueeze(m, i12) x = Expand(u, w)
    f = Cast <to=1> (x) g = Sub(one, f) d = Cast <to=9> (g) y = Where(d, low, g)
    """
    weights = {
        "i0": np.array([0]),
        "i1": np.array([1]),
        "i12": np.array([1, 2]),
        "minus": np.array(-1),
        "one": np.array(1, np.float32),
        "low": np.array(np.finfo(np.float32).min),
    }
    outcome = apply(
        FoldConstants(), fixed(net("(int64[N,5] m) => (float[N,A,B,C] y)", body, weights))
    )
    assert nodes(outcome.model).splitlines()[:2] == ["u = Unsqueeze(m, i12)", "x = Expand(u, w)"]
    assert weight(outcome.model, "w").tolist() == [1, 1, 5, 5]
    assert {v.shape.numpy() for v in outcome.model.graph.outputs if v.shape} == {(1, 1, 5, 5)}


def test_outputs_keep_their_names() -> None:
    body = "s = Shape(x) t = Shape(x) u = Add(t, k) y = Reshape(x, s)"
    signature = "(float[2,3] x) => (int64[2] s, int64[2] u, float[2,3] y)"
    outcome = apply(FoldConstants(), net(signature, body, {"k": np.array([1, 2])}))
    assert (
        nodes(outcome.model)
        == "s = Identity(s_value)\nu = Identity(u_value)\ny = Reshape(x, s_value)"
    )


def test_size_and_a_part_of_a_shape() -> None:
    body = "n = Size(x) p = Shape <start=1, end=-1> (x) y = Mul(n, p)"
    outcome = apply(FoldConstants(), net("(float[2,3,4] x) => (int64[1] y)", body))
    assert nodes(outcome.model) == "y = Identity(y_value)"
    assert weight(outcome.model, "y_value").tolist() == [72]


def test_quantizers_and_chance_stay() -> None:
    body = """
    w = DequantizeLinear(q, s) m = MatMul(x, w) r = RandomNormal <shape=[2,2]> ()
    z = Mul(r, zero) a = Add(m, z) y = QuantizeLinear(a, s)
    """
    weights: dict[str, Array] = {
        "q": np.ones((3, 2), np.int8),
        "s": np.array(0.5, np.float32),
        "zero": np.array(0, np.float32),
    }
    outcome = apply(FoldConstants(), net("(float[2,3] x) => (uint8[2,2] y)", body, weights))
    assert outcome.stats == {"folded": 0}


def test_what_would_grow_too_much_stays_and_says_so() -> None:
    body = "b = Expand(k, s) y = Add(x, b)"
    weights = {"k": random(1, 1), "s": np.array([40, 40])}
    model = net("(float[40,40] x) => (float[40,40] y)", body, weights)
    outcome = apply(FoldConstants(limit_bytes=1000), model.clone())
    assert outcome.skipped == [("Expand_0", "its result would take 0 MiB of weights")]
    assert outcome.stats == {"folded": 0}
    assert apply(FoldConstants(), model).stats == {"folded": 1}


def test_what_onnxruntime_lacks_goes_to_the_reference() -> None:
    # onnxruntime has no kernel for Tan of doubles
    body = "h = Cast <to=11> (k) t = Tan(h) c = Cast <to=1> (t) y = Add(x, c)"
    model = net("(float[2] x) => (float[2] y)", body, {"k": random(2)})
    step = FoldConstants()
    outcome = step.call(model, Context())
    assert nodes(outcome.model) == "y = Add(x, c)"
    np.testing.assert_allclose(weight(outcome.model, "c"), np.tan(random(2)), rtol=1e-6)
    assert not step.call(outcome.model, Context()).modified


def test_what_nobody_can_evaluate_stays_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr("onnxruntime.InferenceSession", fail)
    monkeypatch.setattr("onnx.reference.ReferenceEvaluator", fail)
    model = net("(float[2] x) => (float[2] y)", "s = Shape(x) c = Cast <to=1> (s) y = Add(x, c)")
    outcome = FoldConstants().call(model, Context())
    assert outcome.skipped == [("Cast_1", "it cannot be evaluated: no kernel")]
    assert nodes(outcome.model) == "c = Cast(s) {to=1}\ny = Add(x, c)"


OPS = ("Neg({0})", "Add({0}, {1})", "Mul({0}, {1})", "Concat <axis=0> ({0}, {1})", "Relu({0})")


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_random_constant_arithmetic(data: st.DataObject) -> None:
    values, lines = ["k", "x"], []
    length = {"k": 2, "x": 2}
    for index in range(data.draw(st.integers(1, 8))):
        op = data.draw(st.sampled_from(OPS))
        a = data.draw(st.sampled_from(values))
        same = [value for value in values if length[value] == length[a]]
        b = data.draw(st.sampled_from(same))
        lines.append(f"v{index} = {op.format(a, b)}")
        values.append(f"v{index}")
        length[f"v{index}"] = length[a] * (2 if "Concat" in op else 1)
    chosen = dict.fromkeys([values[-1], data.draw(st.sampled_from(values[2:]))])
    outputs = ", ".join(f"float[{length[value]}] {value}" for value in chosen)
    model = net(f"(float[2] x) => ({outputs})", " ".join(lines), {"k": random(2)})
    outcome = apply(FoldConstants(), model)
    needed = [value.producer() for value in outcome.model.graph.outputs]
    for node in needed:
        if node is not None and node.op_type != "Identity":
            assert not all(value is not None and value.is_initializer() for value in node.inputs)
            needed += [value.producer() for value in node.inputs if value is not None]
