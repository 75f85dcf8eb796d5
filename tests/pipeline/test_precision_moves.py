"""What each layer adds, in which order layers are raised, and what a raised model still rounds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.calibration.base import Array
from edgepress.passes.analysis import QuantizationSwitches, QuantizedLayer
from edgepress.pipeline.precision_moves import LayerError, Layers, Move, layer_errors
from edgepress.pipeline.progress import Progress
from edgepress.pipeline.recipe import FLOAT, INT16

BOTH = (INT16, FLOAT)


def layer(
    name: str, reads: str = "", writes: str = "", scales: str = "", *, weights: bool = True
) -> QuantizedLayer:
    return QuantizedLayer(
        name=name,
        op_type="Conv",
        nodes=() if name.startswith("input") else (name,),
        reads=tuple(reads.split()),
        writes=tuple(writes.split()),
        dtypes=("uint8",) * len(writes.split()),
        scales=tuple((scales or writes).split()),
        constants=("w",) if weights else (),
    )


CHAIN = [
    layer("input x", "", "x", weights=False),
    layer("A", "x", "a"),
    layer("B", "a", "b"),
    layer("C", "b", "c"),
]


def chain() -> Layers:
    return Layers(CHAIN, ["A", "B", "C"])


def errors(**given: tuple[float, float]) -> dict[str, LayerError]:
    """Errors by layer; `x` is the input's."""
    named = {"input x" if name == "x" else name: pair for name, pair in given.items()}
    return {name: LayerError(*pair) for name, pair in named.items()}


@dataclass
class Additive:
    """Layers whose errors simply add up: what `layer_errors` must find is known."""

    layers: list[QuantizedLayer] = field(default_factory=lambda: list(CHAIN))

    def run(
        self, feed: Mapping[str, Array], on: Collection[str], *, constants: Collection[str] = ()
    ) -> dict[str, Array]:
        y = 3.0 * feed["x"]
        for number, name in enumerate(("input x", "A", "B", "C"), 1):
            y = y + 0.01 * number * (name in on) + 0.1 * number * (name in constants)
        return {"y": y, "class": np.array([int(y.sum())])}


def test_errors_are_noise_over_signal_of_each_layer_alone() -> None:
    feeds = [{"x": np.full((1, 4), value)} for value in (1.0, 2.0)]
    switches = cast(QuantizationSwitches, Additive())
    found = layer_errors(switches, feeds, Progress(shown=False))
    power = (9 + 36) / 2  # per element
    assert list(found) == ["input x", "A", "B", "C"]
    assert found["input x"].activations == pytest.approx(0.01**2 / power, rel=1e-3)
    assert found["input x"].constants == 0
    assert found["B"].activations == pytest.approx(0.03**2 / power, rel=1e-3)
    assert found["B"].constants == pytest.approx(0.3**2 / power, rel=1e-3)


def test_the_move_that_takes_most_away_comes_first() -> None:
    found = errors(x=(1, 0), A=(5, 2), B=(8, 7), C=(0.5, 0.1))
    assert chain().order(found, BOTH) == [
        Move("B", INT16),  # spares what A and B write: 13
        Move("B", FLOAT),  # 7
        Move("A", FLOAT),  # 2
        Move("A", INT16),  # only what the input writes is left of it: 1
        Move("C", INT16),  # 0.5
        Move("C", FLOAT),  # 0.1
    ]


def test_what_gains_nothing_comes_last_in_graph_order() -> None:
    nothing = errors(x=(0, 0), A=(0, 0), B=(0, 0), C=(0, 3))
    order = chain().order(nothing, BOTH)
    assert order[0] == Move("C", FLOAT)
    assert [move.layer for move in order[1:]] == ["A", "B", "C", "A", "B"]


def test_one_precision_alone_may_be_allowed() -> None:
    found = errors(x=(4, 0), A=(6, 1), B=(2, 0), C=(0, 5))
    assert chain().order(found, (INT16,)) == [
        Move("A", INT16), Move("B", INT16), Move("C", INT16),
    ]  # fmt: skip
    # A: its weights, all that it reads, half of what it writes for B: 1 + 4 + 3
    assert chain().order(found, (FLOAT,)) == [
        Move("A", FLOAT), Move("C", FLOAT), Move("B", FLOAT),
    ]  # fmt: skip
    assert chain().order(found, ()) == []


@pytest.mark.parametrize(
    ("moves", "activations", "constants"),
    [
        ((), "input x,A,B,C", "input x,A,B,C"),
        ((Move("B", INT16),), "input x,C", "input x,A,B,C"),
        # what it reads and writes is still quantized for and by its neighbours
        ((Move("B", FLOAT),), "input x,A,B,C", "input x,A,C"),
        ((Move("A", FLOAT),), "A,B,C", "input x,B,C"),
        ((Move("A", FLOAT), Move("B", FLOAT)), "B,C", "input x,C"),
        ((Move("C", FLOAT),), "input x,A,B", "input x,A,B"),
        ((Move("A", INT16), Move("C", FLOAT)), "B", "input x,A,B"),
    ],
)
def test_what_is_still_quantized(moves: tuple[Move, ...], activations: str, constants: str) -> None:
    found = chain().quantized(moves)
    assert found == (set(activations.split(",")), set(constants.split(",")))


def test_values_of_one_scale_are_raised_together() -> None:
    layers = Layers(
        [layer("A", "x", "a", "c"), layer("B", "x", "b", "c"), layer("D", "a", "d")],
        ["A", "B", "D"],
    )
    assert layers.quantized([Move("D", INT16)])[0] == set()
    assert layers.quantized([Move("B", INT16)])[0] == {"D"}


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    count=st.integers(1, 6),
    kinds=st.sampled_from([(INT16,), (FLOAT,), BOTH]),
)
def test_every_move_comes_once_and_all_of_them_leave_nothing(
    data: st.DataObject, count: int, kinds: tuple[str, ...]
) -> None:
    values = ["x"]
    layers = [layer("input x", "", "x", weights=False)]
    found = {"input x": LayerError(1.0, 0.0)}
    for number in range(count):
        reads = data.draw(st.lists(st.sampled_from(values), min_size=1, unique=True))
        layers.append(layer(f"L{number}", " ".join(reads), f"v{number}"))
        values.append(f"v{number}")
        error = st.floats(0, 10)
        found[f"L{number}"] = LayerError(data.draw(error), data.draw(error))
    names = [each.name for each in layers[1:]]
    table = Layers(layers, names)
    order = table.order(found, kinds)
    assert order == table.order(found, kinds)
    assert len(order) == len(set(order)) == len(kinds) * count
    before = table.quantized(())
    for length in range(1, len(order) + 1):
        after = table.quantized(order[:length])
        assert after[0] <= before[0]
        assert after[1] <= before[1]
        before = after
    read = {name for each in layers for name in each.reads}
    unread = {"input x"} if "x" not in read else set()
    assert before[0] <= unread
    assert before[1] == ({"input x"} if FLOAT in kinds else {"input x", *names})
