"""Changes that are tried: what findings suggest, and recipes that can be read back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from edgepress.calibration.base import Samples
from edgepress.passes.analysis import QuantizedLayer
from edgepress.passes.base import Context, Pass
from edgepress.passes.calibrate import Calibrate
from edgepress.passes.quantize_int8 import QuantizeInt8
from edgepress.pipeline._explain_changes import (
    Candidate,
    Change,
    _best_of_groups,
    _Tried,
    candidates,
    recipe_lines,
)
from edgepress.pipeline._explain_measure import Errors
from edgepress.pipeline._explain_workbench import Workbench
from edgepress.pipeline.recipe import parse_recipe
from edgepress.pipeline.snapshot import Snapshot
from tests.graphs import random


def workbench(
    passes: Sequence[Pass], *, from_original: bool = True, bundle_db: float | None = 30.0
) -> Workbench:
    samples = Samples(inputs={"x": random(2, 4)})
    return Workbench(
        base=Snapshot(b""),
        passes=list(passes),
        from_original=from_original,
        before_quantization=None,
        calibration=samples,
        samples=samples,
        expected=[],
        bundle_db=bundle_db,
        context=Context(samples=samples),
    )


def errors(**alone_db: float) -> Errors:
    layers = [
        QuantizedLayer(
            name=name,
            op_type="Conv",
            nodes=(name, f"{name}_relu"),
            reads=(),
            writes=(),
            dtypes=(),
            scales=(),
            constants=(),
        )
        for name in alone_db
    ]
    return Errors(total_db=30.0, alone_db=alone_db, layers=layers, samples=2, with_constants=True)


def named(found: Sequence[Candidate], word: str) -> list[str]:
    return [one.name for one in found if word in one.name]


DEFAULT = (Calibrate(), QuantizeInt8())


def test_the_worst_layers_are_raised_the_worst_first() -> None:
    found = candidates(workbench(DEFAULT), [], errors(a=40, b=30, c=35, d=36, e=99))
    assert named(found, "in float") == ["b in float", "c in float", "d in float"]
    assert named(found, "int16") == [f"{name} in int16 activations" for name in "bcd"]
    first = next(one for one in found if one.name == "b in float")
    quantize = first.passes[-1]
    assert isinstance(quantize, QuantizeInt8)
    assert quantize.skip == ("b", "b_relu")
    assert first.group == "b"


def test_what_is_raised_already_is_not_raised_again() -> None:
    passes = (Calibrate(), QuantizeInt8(int16=("b",)))
    found = candidates(workbench(passes), [], errors(a=40, b=30))
    assert named(found, "b in") == ["b in float"]


def test_layers_of_little_error_stay() -> None:
    found = candidates(workbench(DEFAULT), [], errors(a=20, b=60))
    assert named(found, "b in") == []


def test_options_that_the_recipe_has_are_not_offered() -> None:
    plain = (Calibrate(), QuantizeInt8(per_channel=False, bias_correction=False))
    words = ["one weight scale per channel", "bias correction"]
    assert [named(candidates(workbench(plain), [], None), word) for word in words] == [
        [word] for word in words
    ]
    found = candidates(workbench(DEFAULT), [], None)
    assert [named(found, word) for word in words] == [[], []]
    assert "calibrate by min_max" not in named(found, "calibrate")


def test_without_the_original_weights_nothing_about_weights_is_offered() -> None:
    plain = (Calibrate(), QuantizeInt8(per_channel=False, bias_correction=False))
    found = candidates(workbench(plain, from_original=False), [], None)
    assert named(found, "weight") == []
    assert named(found, "bias") == []
    assert named(found, "equalize") == []
    assert named(found, "calibrate")


def test_a_float_bundle_is_quantized() -> None:
    (found,) = candidates(workbench((), bundle_db=None), [], None)
    assert [step.name for step in found.passes] == ["calibrate", "quantize-int8"]
    assert found.saves_time


def test_a_bundle_that_something_else_quantized_is_left_alone() -> None:
    work = workbench(())
    assert candidates(work, [], None) == []
    assert work.notes


@pytest.mark.parametrize(
    "passes",
    [
        DEFAULT,
        (Calibrate(method="percentile", percentile=99.9),),
        (QuantizeInt8(skip=(r"/head/\[1\]\.x", 'a"b'), per_channel=False),),
        (QuantizeInt8(skip=("it's", r"\d'")),),
    ],
)
def test_recipes_can_be_read_back(passes: Sequence[Pass]) -> None:
    read = parse_recipe("schema = 1\n" + recipe_lines(passes), "changed")
    assert read.passes == tuple(passes)


def test_defaults_are_not_written() -> None:
    assert recipe_lines([QuantizeInt8()]) == '[[pass]]\nname = "quantize-int8"'
    assert dataclasses.replace(QuantizeInt8(), skip=()) == QuantizeInt8()


def tried(name: str, gain_db: float, group: str, handicap_db: float = 0.0) -> _Tried:
    candidate = Candidate(
        name=name, why="", passes=(), changed=(), group=group, handicap_db=handicap_db
    )
    change = Change(
        name=name,
        why="",
        recipe="",
        sqnr_before_db=20.0,
        sqnr_after_db=20.0 + gain_db,
        sqnr_gain_db=gain_db,
    )
    return _Tried(candidate, Snapshot(b""), change)


def test_integers_are_preferred_to_floats_that_gain_little_more() -> None:
    close = [tried("a int16", 3.0, "a"), tried("a float", 3.9, "a", 1.0)]
    far = [tried("b int16", 3.0, "b"), tried("b float", 4.1, "b", 1.0)]
    useless = [tried("c", 0.05, "c"), tried("d", -1.0, "d")]
    best = [one.change.name for one in _best_of_groups([*close, *far, *useless])]
    assert best == ["b float", "a int16"]
