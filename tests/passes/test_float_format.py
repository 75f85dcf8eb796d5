from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.passes.base import Context
from edgepress.passes.float_format import KEY, FloatFormat
from edgepress.pipeline import snapshot
from edgepress.pipeline.driver import Driver, canonical_passes
from edgepress.pipeline.golden import FLOAT_LIMITS, LOOSEST_LIMIT, make_golden
from edgepress.pipeline.oracle import Oracle
from edgepress.pipeline.recipe import RecipeError, parse_recipe
from edgepress.targets import float_format
from edgepress.targets.base import UnsupportedModel
from edgepress.targets.load import load_target
from edgepress.targets.lowering.build import lower
from tests.graphs import apply, conv_nets, net, nodes, random, weight

GOLDEN = """\
a = Conv(x, w, b)
f = Flatten(a)
y = MatMul(f, m)"""


def small() -> ir.Model:
    weights = {"w": random(8, 3, 3, 3), "b": random(8), "m": random(32, 5)}
    return net(
        "(float[1,3,4,4] x) => (float[1,5] y)",
        "a = Conv(x, w, b) f = Flatten(a) y = MatMul(f, m)",
        weights,
    )


def test_it_marks_the_model_and_leaves_the_graph() -> None:
    model = small()
    before = weight(model, "w")
    outcome = apply(FloatFormat(), model)
    assert nodes(outcome.model) == GOLDEN
    assert outcome.model.metadata_props == {"edgepress.float_format": "float16"}
    assert outcome.modified
    np.testing.assert_array_equal(weight(outcome.model, "w"), before)


def test_the_mark_is_the_one_that_targets_read() -> None:
    assert KEY == float_format.KEY
    marked = apply(FloatFormat(format="tf32"), small()).model
    assert float_format.float_format(marked) == "tf32"
    assert float_format.float_format(small()) == "float32"
    marked.metadata_props[KEY] = "bfloat16"
    with pytest.raises(ValueError, match="bfloat16"):
        float_format.float_format(marked)


def test_float32_and_a_second_run_change_nothing() -> None:
    assert not apply(FloatFormat(format="float32"), small()).modified
    once = apply(FloatFormat(), small()).model
    assert not apply(FloatFormat(), once).modified


@given(model=conv_nets(), kind=st.sampled_from(["tf32", "float16"]))
@settings(deadline=None, max_examples=10)
def test_any_graph_answers_as_before(model: ir.Model, kind: str) -> None:
    shape = [int(dim) for dim in model.graph.inputs[0].shape]  # type: ignore[union-attr, arg-type]
    feed = {model.graph.inputs[0].name or "": random(*shape)}
    before = Oracle(model).run(feed)
    after = Oracle(apply(FloatFormat(format=kind), model).model).run(feed)  # type: ignore[arg-type]
    for want, have in zip(before.values(), after.values(), strict=True):
        np.testing.assert_array_equal(want, have)


def test_the_mark_survives_the_passes_behind_it() -> None:
    recipe = parse_recipe('schema = 1\n[[pass]]\nname = "float-format"\n', "r.toml")
    driver = Driver(small())
    driver.run([*recipe.passes, *canonical_passes()], Context())
    assert float_format.float_format(driver.model) == "float16"


@pytest.mark.parametrize("kind", ["float16", "tf32"])
def test_a_target_without_a_gpu_refuses_it(kind: str) -> None:
    model = apply(FloatFormat(format=kind), small()).model  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModel, match=r"float-format out for x86-64-v3"):
        lower(model, load_target("x86-64-v3"))


def test_another_format_is_refused() -> None:
    text = 'schema = 1\n[[pass]]\nname = "float-format"\nformat = "bfloat16"\n'
    with pytest.raises(RecipeError, match="bfloat16"):
        parse_recipe(text, "r.toml")


def test_answers_may_move_as_far_as_narrow_weights_move_them() -> None:
    model = apply(FloatFormat(), small()).model
    feed = {"x": random(1, 3, 4, 4)}
    golden = make_golden(snapshot.take(model), None, [feed])
    assert FLOAT_LIMITS["float16"] <= golden.limit <= LOOSEST_LIMIT
    # what halving the precision of every number does is allowed, and ten times that is not
    want = next(iter(golden.answers[0].values()))
    spread = float(want.max() - min(want.min(), 0))
    assert golden.tolerances[0] < 0.02 * spread
