from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.passes.base import PassRefused
from edgepress.passes.lift_constants import LiftConstants
from tests.graphs import apply, net, nodes, weight


def test_every_kind_of_constant() -> None:
    body = """
    a = Constant <value = float[2] {1.0, 2.0}> () b = Constant <value_float = 3.0> ()
    c = Constant <value_ints = [2, 1]> () d = Constant <value_int = 1> ()
    e = Constant <value_floats = [0.5]> ()
    p = Add(x, a) q = Mul(p, b) r = Sub(q, e) s = Reshape(r, c) y = Gather(s, d)
    """
    outcome = apply(LiftConstants(), net("(float[2] x) => (float[1] y)", body))
    assert nodes(outcome.model) == (
        "p = Add(x, a)\nq = Mul(p, b)\nr = Sub(q, e)\ns = Reshape(r, c)\ny = Gather(s, d)"
    )
    assert outcome.stats == {"lifted": 5}
    assert weight(outcome.model, "c").tolist() == [2, 1]
    assert weight(outcome.model, "b").shape == ()


def test_an_output_keeps_its_name() -> None:
    model = net(
        "(float[2] x) => (float[2] k, float[2] y)",
        "k = Constant <value_floats=[1.0, 2.0]> () y = Add(x, k)",
    )
    outcome = apply(LiftConstants(), model)
    assert nodes(outcome.model) == "k = Identity(k_value)\ny = Add(x, k_value)"


def test_an_unreadable_constant_is_refused() -> None:
    model = net("(float[2] x) => (float[2] y)", "k = Constant <value_float=1.0> () y = Add(x, k)")
    model.graph[0].attributes.add(ir.AttrInt64("value_int", 1))
    with pytest.raises(PassRefused, match=r"Constant_0: .*cannot be read"):
        apply(LiftConstants(), model)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=6))
def test_any_number_of_constants(kinds: list[int]) -> None:
    lines, last = [], "x"
    for index, kind in enumerate(kinds):
        if kind == 0:
            lines.append(f"n{index} = Relu({last})")
        else:
            value = "value_float = 2.0" if kind == 1 else "value = float[1] {0.5}"
            lines.append(f"k{index} = Constant <{value}> () n{index} = Mul({last}, k{index})")
        last = f"n{index}"
    model = net(f"(float[3] x) => (float[3] {last})", " ".join(lines))
    outcome = apply(LiftConstants(), model)
    assert (
        outcome.stats["lifted"] == np.count_nonzero(kinds) == len(outcome.model.graph.initializers)
    )
    assert outcome.modified == bool(np.count_nonzero(kinds))
