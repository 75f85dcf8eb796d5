from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.calibration.base import Samples
from edgepress.passes.base import Context, PassRefused, pass_class, pass_names
from edgepress.passes.calibrate import Calibrate
from edgepress.passes.encode_huffman import NO_WEIGHTS, ONLY_FLOATS, EncodeHuffman, is_coded
from edgepress.passes.quantize_int8 import QuantizeInt8
from edgepress.pipeline import snapshot
from edgepress.pipeline.driver import Driver, canonical_passes
from edgepress.pipeline.recipe import parse_recipe
from tests.graphs import Array, apply, conv_nets, net, nodes, random, weight

GOLDEN = """\
a = Conv(x, w, b)
f = Flatten(a)
y = MatMul(f, m)"""
SIGNATURE = "(float[1,3,4,4] x) => (float[1,5] y)"
BODY = "a = Conv(x, w, b) f = Flatten(a) y = MatMul(f, m)"


def small() -> ir.Model:
    weights = {"w": random(8, 3, 3, 3), "b": random(8), "m": random(32, 5)}
    return net(SIGNATURE, BODY, weights)


def test_it_marks_the_model_and_leaves_the_graph() -> None:
    model = small()
    before = {name: weight(model, name) for name in ("w", "b", "m")}
    outcome = apply(EncodeHuffman(), model)
    assert nodes(outcome.model) == GOLDEN
    assert outcome.model.metadata_props == {"edgepress.weights": "coded"}
    assert is_coded(outcome.model)
    assert not is_coded(small())
    assert outcome.modified
    assert outcome.skipped == []
    for name, array in before.items():
        np.testing.assert_array_equal(weight(outcome.model, name), array)


def shannon(symbols: list[bytes]) -> float:
    counts = Counter(symbols)
    n = len(symbols)
    return -sum(c * math.log2(c / n) for c in counts.values())


def bits_of(array: Array) -> float:
    """The least of raw, values and bytes, straight from the definitions."""
    size, data = array.dtype.itemsize, array.tobytes()
    raw = 8.0 * len(data)
    values = [data[i : i + size] for i in range(0, len(data), size)]
    whole = shannon(values) + 8 * size * len(set(values))
    apart = 0.0
    for place in range(size):
        each = [data[i : i + 1] for i in range(place, len(data), size)]
        apart += min(shannon(each) + 8 * len(set(each)), 8.0 * len(each))
    return min(raw, whole, apart)


@given(
    values=st.lists(
        st.sampled_from([0.0, -0.0, 1.0, -2.5, 0.1, 3e-7, 1e30]) | st.floats(-1, 1, width=32),
        min_size=1,
        max_size=60,
    ),
    dtype=st.sampled_from([np.float32, np.float64, np.float16, np.int8, np.int16, np.bool_]),
    repeats=st.sampled_from([1, 7, 40]),
)
@settings(deadline=None, max_examples=80)
def test_the_figures_are_the_definitions(values: list[float], dtype: type, repeats: int) -> None:
    with np.errstate(all="ignore"):
        array: Array = np.tile(np.array(values), repeats).astype(dtype)
    model = net("(float[1] x) => (float[1] y)", "y = Relu(x)", {"w": array})
    outcome = EncodeHuffman().call(model, Context())
    zeros = sum(array.tobytes()[i : i + array.itemsize] == bytes(array.itemsize)
                for i in range(0, array.nbytes, array.itemsize))  # fmt: skip
    assert outcome.stats == {
        "weights": array.size,
        "zeros": zeros,
        "bits_per_weight": pytest.approx(bits_of(array) / array.size, abs=0.006),
    }


@given(model=conv_nets())
@settings(deadline=None, max_examples=20)
def test_random_nets(model: ir.Model) -> None:
    for name in ("edgepress", "author"):
        model.metadata_props[name] = "kept"
    outcome = apply(EncodeHuffman(), model)
    assert outcome.model.metadata_props == {
        "edgepress": "kept",
        "author": "kept",
        "edgepress.weights": "coded",
    }
    assert outcome.stats["weights"] == sum(
        weight(outcome.model, name).size for name in outcome.model.graph.initializers
    )


def test_floats_that_differ_are_pointed_out() -> None:
    assert apply(EncodeHuffman(), small()).notes == [ONLY_FLOATS]


@pytest.mark.parametrize("few", ["pruned", "shared", "integers"])
def test_weights_that_shrink_need_no_word(few: str) -> None:
    w = random(8, 3, 3, 3)
    weights: dict[str, Array] = {"b": random(8), "m": random(32, 5)}
    body = BODY
    if few == "pruned":
        weights["w"] = np.where(np.abs(w) < 1.5, np.float32(0), w)
    elif few == "shared":
        weights["w"] = np.array([-0.3, 0.01, 0.2, 0.7], np.float32)[
            np.random.default_rng(0).integers(0, 4, w.shape)
        ]
    else:
        weights |= {"q": np.round(20 * w).astype(np.int8), "s": np.array(0.05, np.float32)}
        body = "w = DequantizeLinear(q, s) " + BODY
    outcome = apply(EncodeHuffman(), net(SIGNATURE, body, weights))
    assert outcome.notes == []
    assert 0 < outcome.stats["bits_per_weight"] < 25


def test_a_model_without_weights() -> None:
    outcome = apply(EncodeHuffman(), net("(float[1] x) => (float[1] y)", "y = Relu(x)"))
    assert outcome.notes == [NO_WEIGHTS]
    assert outcome.stats == {"weights": 0, "zeros": 0, "bits_per_weight": 0.0}


def test_the_driver_sees_the_same_graph_and_keeps_ranges() -> None:
    model = small()
    driver = Driver(model)
    samples = Samples({"x": random(4, 3, 4, 4)})
    context = Context(samples=samples)
    driver.run([*canonical_passes(), Calibrate(), EncodeHuffman(), QuantizeInt8()], context)
    marked = driver.records[-2]
    assert marked.modified
    assert marked.equivalence is None
    assert is_coded(driver.snapshot.load())
    plain = Driver(small())
    plain.run([*canonical_passes(), Calibrate(), QuantizeInt8()], context)
    by_hand = plain.snapshot.load()
    by_hand.metadata_props["edgepress.weights"] = "coded"
    assert snapshot.take(by_hand).model == driver.snapshot.model


@pytest.mark.parametrize("name", sorted(set(pass_names()) - {"encode-huffman"}))
def test_every_pass_keeps_the_mark(name: str) -> None:
    step = pass_class(name)()
    if step.needs_training or step.needs_timer:
        pytest.skip("it takes long, or a device")
    driver = Driver(small())
    context = Context(samples=Samples({"x": random(4, 3, 4, 4)}))
    try:
        driver.run([*canonical_passes(), EncodeHuffman(), Calibrate(), step], context)
    except PassRefused as refused:
        pytest.skip(str(refused))
    assert is_coded(driver.snapshot.load())


@pytest.mark.parametrize("opset", [9, 13, 21])
def test_a_newer_opset_keeps_the_mark(opset: int) -> None:
    weights = {"w": random(8, 3, 3, 3), "b": random(8), "m": random(32, 5)}
    model = net(SIGNATURE, BODY, weights, opset=opset)
    driver = Driver(model)
    driver.run([EncodeHuffman(), *canonical_passes()], Context())
    assert is_coded(driver.snapshot.load())
    assert is_coded(driver.model.clone())


def test_a_recipe_and_a_file_hold_it(tmp_path: Path) -> None:
    (step,) = parse_recipe('schema = 1\n[[pass]]\nname = "encode-huffman"\n').passes
    assert step == EncodeHuffman()
    model = apply(EncodeHuffman(), small()).model
    ir.save(model, tmp_path / "m.onnx")
    assert is_coded(ir.load(tmp_path / "m.onnx"))
    assert not apply(EncodeHuffman(), small()).model.graph.metadata_props
