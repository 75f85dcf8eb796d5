from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import pytest

from edgepress.calibration.base import Samples
from edgepress.passes._shapes import refresh_shapes
from edgepress.passes.base import Context, PassRefused
from edgepress.passes.low_rank import LowRank
from edgepress.pipeline.recipe import RecipeError, parse_recipe
from tests.graphs import apply, nodes, random
from tests.passes.low_rank_nets import by_name, made


def test_layers_that_cannot_be_decomposed_are_named() -> None:
    model = made(
        "(float[1,4,6,6] x) => (float[1,4,6,6] y)",
        "a = Conv(x, w) b = Conv(a, w) c = Conv <group=2> (b, half) d = Relu(k)"
        "e = Conv(c, d) y = Conv(e, one)",
        {
            "w": random(4, 4, 1, 1),
            "half": random(4, 2, 1, 1),
            "k": random(4, 4, 1, 1),
            "one": random(4, 4, 1, 1),
        },
    )
    outcome = apply(LowRank(rank=1, align=1, method="spatial", keep="always"), model)
    assert not outcome.modified
    assert outcome.skipped == [
        ("Conv_0", "its weight 'w' is read by others too"),
        ("Conv_1", "its weight 'w' is read by others too"),
        ("Conv_2", "it has 2 groups; only convolutions of one group are decomposed"),
        ("Conv_4", "its weight is not constant"),
        ("Conv_5", "a kernel of 1×1 has no spatial decomposition of its own"),
    ]


def test_a_rank_that_some_layers_cannot_have_leaves_them() -> None:
    outcome = apply(LowRank(rank=20, keep="always"), made())
    assert set(by_name(outcome)) == {"Conv_0"}
    assert dict(outcome.skipped)["Gemm_6"] == "rank 20 is more than its largest, 16 by channel"
    # of three methods, tucker has no rank above 8
    assert outcome.stats["candidates"] == 2


def test_a_second_run_leaves_factors_alone() -> None:
    model = made()
    LowRank(rank=4, keep="always").call(model, Context())
    text = nodes(model)
    reread = ir.from_proto(ir.to_proto(model))
    refresh_shapes(reread)
    for step in (LowRank(rank=2, keep="always"), LowRank(layers=("Gemm_6",), keep="always")):
        step.requires(reread, Context())
        outcome = step.call(reread, Context())
        assert not outcome.modified
        why = "it is a factor of a layer that was decomposed already"
        assert dict(outcome.skipped)["Gemm_6"] == why
    assert nodes(reread) == text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, ("rank", "it is 0", "at least 1")),
        ({"align": 0}, ("align", "it is 0", "at least 1")),
        ({"energy": 0.0}, ("energy", "above 0 and up to 1")),
        ({"energy": 1.5}, ("energy", "it is 1.5")),
        ({"energy": math.nan}, ("energy", "it is nan")),
        ({"error": -0.1}, ("error", "it is -0.1", "from 0 to below 1")),
        ({"error": 1.0}, ("error", "it is 1.0")),
        ({"error": math.nan}, ("error", "it is nan")),
        ({"rank": 4, "error": 0.1}, ("rank and error", "give only one")),
        ({"energy": 0.9, "error": 0.1}, ("energy and error", "give only one")),
        ({"method": "cp"}, ("method", "it is 'cp'", "'tucker'")),
        ({"keep": "bigger"}, ("keep", "it is 'bigger'", "'smaller'")),
        ({"layers": ()}, ("layers", "no pattern", "'.*' matches all")),
        ({"layers": ("a", "(")}, ("layers '('", "not a regular expression")),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(PassRefused) as caught:
        LowRank(**options)
    for word in ("low-rank: ", *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": ("conv_0",)}, "'conv_0'.*no layer's whole name. Near it: Conv_0.*inspect"),
        (
            {"layers": ("Relu_1",)},
            "layers 'Relu_1'.*matches no layer's whole name",
        ),
        ({"layers": ("Conv",)}, "layers 'Conv'"),
        ({"layers": ("Conv_2",)}, "layer 'Conv_2': it has 24 groups.*leave the layer out"),
        ({"layers": ("Gemm_6",), "rank": 17}, "layer 'Gemm_6': rank 17 .* 16 by channel; give a"),
        ({"layers": (".*", "Gemm_6"), "rank": 17}, "layer 'Gemm_6': rank 17"),
        ({"layers": ("Conv.*",), "rank": 17}, "layer 'Conv_3': rank 17 is more than its largest"),
        ({"rank": 99}, "layer 'Conv_0': rank 99 .* 24 by channel and 24 by spatial and 8 by tuck"),
    ],
)
def test_what_a_model_does_not_have_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(PassRefused, match=words):
        LowRank(keep="always", **options).requires(made(), Context())


def test_all_layers_may_have_none_to_decompose() -> None:
    model = made("(float[1,4] x) => (float[1,4] y)", "y = Relu(x)", {})
    outcome = apply(LowRank(keep="smaller"), model)
    assert not outcome.modified
    assert outcome.notes == []


class Timer:
    """Measures nothing."""

    unit, key = "ms", "none"

    def __call__(self, layers: Sequence[ir.Model]) -> list[float]:
        return [1.0 for _ in layers]


def test_faster_needs_a_target() -> None:
    assert LowRank().needs_timer
    assert not LowRank(keep="smaller").needs_timer
    assert not LowRank().needs_samples
    with pytest.raises(PassRefused, match=r"low-rank: keep: .*measurement on the target.*-t"):
        LowRank().requires(made(), Context())
    LowRank().requires(made(), Context(timer=Timer()))


def test_samples_that_do_not_fit_are_refused() -> None:
    context = Context(samples=Samples({"x": random(3, 8, 8, 7)}, source="cats.npz"))
    with pytest.raises(
        PassRefused, match=r"low-rank: input 'x': a sample in cats.npz is \[8, 8, 7"
    ):
        LowRank(keep="always", rank=4).call(made(), context)


def test_a_recipe_says_where_it_is_wrong() -> None:
    text = 'schema = 1\n[[pass]]\nname = "low-rank"\n'
    (step,) = parse_recipe(text + 'layers = ["fc.*"]\nenergy = 0.9\nkeep = "smaller"\n').passes
    assert step == LowRank(layers=("fc.*",), energy=0.9, keep="smaller")
    with pytest.raises(RecipeError, match=r"recipe.toml:2: .*error: it is 2.0"):
        parse_recipe(text + "error = 2\n")
    with pytest.raises(RecipeError, match=r"recipe.toml:4: method is 'cp', it must be 'best' or"):
        parse_recipe(text + 'method = "cp"\n')
