from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.passes._constants import set_input
from edgepress.passes._replay import Replay, held_bytes
from edgepress.passes.base import PassRefused
from tests.graphs import Array, answers, net, random
from tests.passes import channel_nets
from tests.passes.channel_nets import BLOCKS, Block, cnn


def everything(model: ir.Model, feed: dict[str, Array]) -> dict[str, Array]:
    """Every value of a model for one sample."""
    copy = model.clone()
    values = [value for node in copy.graph for value in node.outputs]
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(values)
    names = [value.name or "" for value in values]
    return dict(zip(names, answers(copy, feed), strict=True)) | feed


# onnxruntime's BatchNormalization in training mode updates its statistics from run to run
STATELESS = [block for block in BLOCKS if block is not channel_nets.trained_norm]


@settings(deadline=None, max_examples=15)
@given(
    blocks=st.lists(st.sampled_from(STATELESS), min_size=1, max_size=3),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_values_at_the_stops_are_those_of_the_whole_model(
    blocks: list[Block], seed: int, data: st.DataObject
) -> None:
    model = cnn(blocks, seed)
    names = [value.name or "" for node in model.graph for value in node.outputs]
    stops = data.draw(
        st.lists(st.lists(st.sampled_from(["x", *names]), min_size=1, max_size=3), max_size=4)
    )
    feeds = [{"x": random(1, 3, 6, 6, seed=n)} for n in range(2)]
    want = [everything(model, feed) for feed in feeds]
    replay = Replay("test", model, feeds, stops)
    most = 0
    for stop in stops:
        replay.advance()
        for expected, found in zip(want, replay.values, strict=True):
            for name in stop:
                np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5)
        most = max(most, sum(array.nbytes for array in replay.values[0].values()))
    assert most <= held_bytes(model.graph, stops)


CHAIN = "a = Conv(x, w) b = Relu(a) c = Conv(b, v) d = Relu(c) y = Conv(d, u)"


def chain() -> ir.Model:
    weights = {name: random(4, 4, 1, 1, seed=ord(name)) for name in "wvu"}
    model = net("(float[1,4,3,3] x) => (float[1,4,3,3] y)", CHAIN, weights)
    from edgepress.passes.base import refresh_shapes

    refresh_shapes(model, "test")
    return model


def test_a_change_on_the_way_reaches_what_comes_after() -> None:
    model, feed = chain(), {"x": random(1, 4, 3, 3)}
    replay = Replay("test", model, [feed], [["a"], ["y"]])
    replay.advance()
    nodes = list(model.graph)
    set_input(nodes[2], 1, 3 * random(4, 4, 1, 1), "v")
    replay.advance()
    np.testing.assert_allclose(replay.values[0]["y"], answers(model, feed)[0], rtol=1e-5)


def test_only_what_is_still_read_is_held() -> None:
    replay = Replay("test", chain(), [{"x": random(1, 4, 3, 3)}], [["a"], ["c", "b"], ["y"]])
    held = []
    for _ in range(3):
        replay.advance()
        held.append(sorted(replay.values[0]))
    assert held == [["a"], ["b", "c"], ["y"]]


def test_a_part_is_run_again() -> None:
    model, feed = chain(), {"x": random(1, 4, 3, 3)}
    replay = Replay("test", model, [feed], [["x", "a"]])
    replay.advance()
    set_input(next(iter(model.graph)), 1, np.zeros((4, 4, 1, 1), np.float32), "w")
    replay.run(["x"], ["a"])
    assert (replay.values[0]["a"] == 0).all()


def test_nan_is_refused() -> None:
    feed = {"x": np.full((1, 4, 3, 3), np.nan, np.float32)}
    replay = Replay("test", chain(), [feed], [["a"], ["y"]])
    with pytest.raises(PassRefused, match="NaN for sample 0"):
        replay.advance()
