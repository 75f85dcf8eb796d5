from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings

from edgepress.passes._shapes import refresh_shapes
from edgepress.passes.base import Context, PassRefused, pass_class
from edgepress.passes.equalize_layers import EqualizeLayers
from tests.graphs import answers, apply, conv_nets, feeds, nodes, random, weight
from tests.passes.int8_nets import made, quantized, sqnr_db


def uneven(*shape: int, axis: int = 0) -> np.ndarray:
    """Weights whose channels differ in size by up to a hundred times."""
    sizes = np.logspace(-1, 1, shape[axis], dtype=np.float32)
    return random(*shape) * sizes.reshape([-1 if i == axis else 1 for i in range(len(shape))])


def pair() -> ir.Model:
    return made(
        "(float[1,3,8,8] x) => (float[1,4] y)",
        "c = Conv(x, w, b) r = Relu(c) m = MaxPool <kernel_shape=[2,2]> (r) "
        "d = Conv <group=6> (m, v) p = GlobalAveragePool(d) f = Flatten(p) y = Gemm(f, u, a)",
        w=uneven(6, 3, 3, 3),
        b=random(6),
        v=random(6, 1, 3, 3),
        u=random(6, 4),
        a=random(4),
    )


def test_it_is_found_by_name() -> None:
    assert pass_class("equalize-layers") is EqualizeLayers


def test_channels_fill_as_much_of_either_side() -> None:
    model = pair()
    before = nodes(model)
    outcome = apply(EqualizeLayers(tolerance=0.001), model)
    assert nodes(model) == before
    assert outcome.stats == {"equalized_channels": 12, "layers": 3}
    written = np.abs(weight(model, "w")).max(axis=(1, 2, 3))
    read = np.abs(weight(model, "v")).max(axis=(1, 2, 3))
    np.testing.assert_allclose(written, read, rtol=0.01)


def test_the_factors_are_those_of_the_paper() -> None:
    """A channel of range r1 is divided by s = sqrt(r1·r2) / r2."""
    model = made(
        "(float[1,4,3,3] x) => (float[1,2,3,3] y)",
        "c = Conv(x, w) r = Relu(c) y = Conv(r, v)",
        w=uneven(5, 4, 1, 1),
        v=uneven(2, 5, 1, 1, axis=1)[:, ::-1].copy(),
    )
    r1 = np.abs(weight(model, "w")).max(axis=(1, 2, 3))
    r2 = np.abs(weight(model, "v")).max(axis=(0, 2, 3))
    old = weight(model, "w").copy()
    apply(EqualizeLayers(tolerance=1e-6), model)
    factors = np.sqrt(r1 * r2) / r2
    np.testing.assert_allclose(weight(model, "w"), old / factors.reshape(-1, 1, 1, 1), rtol=1e-4)


def test_additions_and_concatenations_share_their_factors() -> None:
    model = made(
        "(float[1,4,6,6] x) => (float[1,3,6,6] y)",
        "a = Conv(x, w) b = Conv(a, v) s = Add(a, b) k = Concat <axis=1> (s, a) r = Relu(k) "
        "y = Conv(r, u)",
        w=uneven(4, 4, 1, 1),
        v=random(4, 4, 1, 1),
        u=random(3, 8, 1, 1),
    )
    assert apply(EqualizeLayers(), model).stats["equalized_channels"] == 4


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("c = Conv(x, w) r = Clip(c, low, high) y = Conv(r, v)", "Clip_1 is no function"),
        ("c = Conv(x, w) r = Sigmoid(c) y = Conv(r, v)", "Sigmoid_1 is no function"),
        ("c = Conv(x, w) d = Conv(c, w) y = Conv(d, v)", "shares w with another node"),
        ("c = Conv(x, w) y = Relu(c)", "y is an output of the model"),
        ("c = Conv(x, w) y = Add(c, x)", "x is an input of the model"),
    ],
)
def test_what_must_keep_its_scale_says_why(body: str, why: str) -> None:
    model = made(
        "(float[1,4,6,6] x) => (float[1,4,6,6] y)",
        body,
        w=uneven(4, 4, 1, 1),
        v=random(4, 4, 1, 1),
        low=np.array(0, np.float32),
        high=np.array(6, np.float32),
    )
    outcome = apply(EqualizeLayers(), model)
    assert not outcome.modified
    assert any(why in reason for _, reason in outcome.skipped)


def test_a_rectifier_written_as_a_clip_lets_factors_through() -> None:
    model = made(
        "(float[1,4,6,6] x) => (float[1,4,6,6] y)",
        "c = Conv(x, w) r = Clip(c, low) y = Conv(r, v)",
        w=uneven(4, 4, 1, 1),
        v=random(4, 4, 1, 1),
        low=np.array(0, np.float32),
    )
    assert apply(EqualizeLayers(), model).modified


def test_dead_channels_stay() -> None:
    model = pair()
    values = weight(model, "w").copy()
    values[2] = 0
    model.graph.initializers["w"].const_value = ir.tensor(values, name="w")
    assert apply(EqualizeLayers(), model).stats["equalized_channels"] == 11
    assert not weight(model, "w")[2].any()


def test_one_scale_per_weight_becomes_bearable() -> None:
    def net() -> ir.Model:
        return made(
            "(float[1,4,8,8] x) => (float[1,6] y)",
            "c = Conv(x, w) r = Relu(c) d = Conv(r, v) p = GlobalAveragePool(d) y = Flatten(p)",
            w=uneven(8, 4, 3, 3),
            v=uneven(6, 8, 3, 3, axis=1)[:, ::-1].copy(),
        )

    plain, equalized, before = net(), net(), net()
    apply(EqualizeLayers(), equalized)
    quantized(plain, per_channel=False)
    quantized(equalized, per_channel=False)
    assert sqnr_db(before, equalized) > sqnr_db(before, plain) + 3


def test_a_tolerance_that_is_never_met_is_refused() -> None:
    with pytest.raises(PassRefused, match="choose a number above 0"):
        EqualizeLayers(tolerance=0).requires(pair(), Context())


@given(model=conv_nets())
@settings(deadline=None, max_examples=30)
def test_random_nets_answer_as_before(model: ir.Model) -> None:
    refresh_shapes(model)
    before = model.clone()
    inputs = feeds(model)
    apply(EqualizeLayers(), model)
    for want, got in zip(answers(before, inputs), answers(model, inputs), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())
