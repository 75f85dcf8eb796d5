from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.calibration.base import Samples
from edgepress.passes._shapes import refresh_shapes
from edgepress.passes.base import Context, PassRefused, pass_class
from edgepress.passes.prune_weights import PruneWeights
from edgepress.passes.share_weights import CLUSTERS, ShareWeights
from edgepress.pipeline.driver import Driver
from edgepress.pipeline.recipe import RecipeError, parse_recipe
from tests.graphs import Array, answers, apply, conv_nets, feeds, net, nodes, random, weight
from tests.passes.int8_nets import quantized

GOLDEN = """\
a = Conv(x, w, b) {strides=[2,2]}
c = ConvTranspose(a, v) {group=2}
f = Flatten(c)
g = Gemm(f, d, e) {transB=1}
y = MatMul(g, m)"""
SHAPES = {"w": (8, 3, 3, 3), "v": (8, 3, 1, 1), "d": (12, 24), "m": (12, 6)}
LAYERS = {"w": "Conv_0", "v": "ConvTranspose_1", "d": "Gemm_3", "m": "MatMul_4"}
INITS = ("k-means++", "linear", "density", "forgy")


def small(**changed: Array) -> ir.Model:
    weights: dict[str, Array] = {name: random(*shape) for name, shape in SHAPES.items()}
    model = net(
        "(float[1,3,4,4] x) => (float[1,6] y)",
        "a = Conv<strides=[2,2]>(x, w, b) c = ConvTranspose<group=2>(a, v) f = Flatten(c) "
        "g = Gemm<transB=1>(f, d, e) y = MatMul(g, m)",
        weights | {"b": random(8), "e": random(12), "d": random(12, 6)} | changed,
    )
    refresh_shapes(model)
    return model


def values(model: ir.Model, name: str) -> int:
    """How many values a tensor has besides zero."""
    array = weight(model, name)
    return len(np.unique(array[array != 0]))


def samples(model: ir.Model, count: int = 4) -> Context:
    arrays = [feeds(model, seed) for seed in range(count)]
    inputs = {name: np.concatenate([feed[name] for feed in arrays]) for name in arrays[0]}
    return Context(samples=Samples(inputs=inputs))


def lost(model: ir.Model, before: ir.Model, names: list[str]) -> float:
    """The mean over tensors of the relative squared error, in float64."""
    errors = []
    for name in names:
        old, new = (weight(m, name).astype(np.float64) for m in (before, model))
        errors.append(np.square(new - old).sum() / np.square(old).sum())
    return float(np.mean(errors))


def bits(array: Array) -> float:
    """What a tensor takes: the indices, the values and where the zeros are."""
    counts = np.unique(array[array != 0], return_counts=True)[1]
    used = counts.sum()
    total = sum(c * math.log2(used / c) for c in counts.tolist()) + 36 * len(counts)
    for part in (used, array.size - used):
        total += part * math.log2(array.size / part) if part else 0
    return min(float(total), 32.0 * array.size)


def test_the_graph_stays_as_it_is_and_weights_take_few_values() -> None:
    model = small()
    before = model.clone()
    outcome = apply(ShareWeights(clusters=5), model)
    assert nodes(outcome.model) == GOLDEN
    assert {name: values(outcome.model, name) for name in SHAPES} == dict.fromkeys(SHAPES, 5)
    sizes = sum(weight(before, name).size for name in SHAPES)
    total = sum(bits(weight(outcome.model, name)) for name in SHAPES)
    assert outcome.stats == {
        "weights": sizes,
        "codebooks": 4,
        "clusters": 20,
        "bits_per_weight": pytest.approx(total / sizes, abs=1e-4),
        "size_bytes": math.ceil(total / 8),
        "relative_error": pytest.approx(lost(outcome.model, before, list(SHAPES)), rel=1e-3),
    }
    for name in ("b", "e"):
        np.testing.assert_array_equal(weight(outcome.model, name), weight(before, name))


@given(
    clusters=st.integers(1, 9),
    init=st.sampled_from(INITS),
    weighting=st.sampled_from(["none", "curvature"]),
    channels=st.sampled_from([0, 4, 5]),
    pruned=st.sampled_from([0.0, 0.6]),
    seed=st.integers(0, 9),
)
@settings(deadline=None, max_examples=20)
def test_every_weight_takes_the_nearest_value_and_zeros_stay(
    clusters: int, init: Any, weighting: Any, channels: int, pruned: float, seed: int
) -> None:
    model = small()
    PruneWeights(amount=pruned).call(model, Context())
    before, context = model.clone(), samples(model)
    step = ShareWeights(
        clusters=clusters, init=init, weighting=weighting, codebook_channels=channels, seed=seed
    )
    outcome = apply(step, model, context)
    books = clusters_found = 0
    for name in SHAPES:
        old, new = outputs_first(before, name), outputs_first(outcome.model, name)
        np.testing.assert_array_equal(old == 0, new == 0)
        size = channels or len(old)
        for start in range(0, len(old), size):
            part, shared = old[start : start + size], new[start : start + size]
            codebook = np.unique(shared[shared != 0])
            books, clusters_found = books + 1, clusters_found + len(codebook)
            assert len(codebook) <= clusters
            if not len(codebook):
                continue
            distances = np.abs(part[..., None].astype(np.float64) - codebook)
            nearest = np.where(part != 0, distances.min(axis=-1), 0)
            np.testing.assert_allclose(np.abs(shared.astype(np.float64) - part), nearest, rtol=1e-6)
            if weighting == "none":
                for value in codebook:
                    mean = part[shared == value].astype(np.float64).mean()
                    np.testing.assert_allclose(value, mean, rtol=1e-5, atol=1e-7)
    assert (outcome.stats["codebooks"], outcome.stats["clusters"]) == (books, clusters_found)


def outputs_first(model: ir.Model, name: str) -> Array:
    """A tensor of `small` as `[out, …]`."""
    array = weight(model, name)
    if name == "v":  # two groups of [in/2, out/2]
        return np.concatenate([array[:4].swapaxes(0, 1), array[4:].swapaxes(0, 1)])
    return array.T if name == "m" else array


@pytest.mark.parametrize("weighting", ["none", "curvature"])
def test_the_model_answers_as_if_shared_by_hand(weighting: Any) -> None:
    model = small()
    by_hand = small()
    outcome = apply(ShareWeights(clusters=4, weighting=weighting), model, samples(model))
    for name in SHAPES:
        codebook = np.unique(weight(outcome.model, name))
        old = weight(by_hand, name)
        nearest = np.abs(old[..., None].astype(np.float64) - codebook).argmin(axis=-1)
        by_hand.graph.initializers[name].const_value = ir.tensor(codebook[nearest], name=name)
    inputs = feeds(model)
    np.testing.assert_array_equal(answers(outcome.model, inputs), answers(by_hand, inputs))


@given(
    model=conv_nets(),
    options=st.sampled_from(
        [{"clusters": 3}, {"clusters": 40, "codebook_channels": 1}, {"clusters": 1}, {}]
    ),
    biases=st.integers(0, 2),
)
@settings(deadline=None, max_examples=25)
def test_random_nets(model: ir.Model, options: dict[str, Any], biases: int) -> None:
    refresh_shapes(model)
    before = model.clone()
    outcome = apply(ShareWeights(**options, bias_clusters=biases), model)
    used: dict[str, int] = {}
    for node in before.graph:
        if node.op_type == "Conv":
            used[node.inputs[1].name or ""] = options.get("clusters", CLUSTERS)  # type: ignore[union-attr]
            if biases and len(node.inputs) > 2:
                used[node.inputs[2].name or ""] = biases  # type: ignore[union-attr]
    for name, most in used.items():
        old, new = weight(before, name), weight(outcome.model, name)
        books = 1 if "codebook_channels" not in options else len(old)
        assert len(np.unique(new)) <= most * books
        assert (new.dtype, new.shape) == (old.dtype, old.shape)
        assert np.square(new - old).sum() <= np.square(old).sum() * (1 + 1e-5)
    for name in set(before.graph.initializers) - set(used):
        np.testing.assert_array_equal(weight(outcome.model, name), weight(before, name))
    assert outcome.modified == any(
        (weight(before, name) != weight(outcome.model, name)).any() for name in used
    )


def test_without_a_number_there_are_255_clusters() -> None:
    outcome = apply(ShareWeights(), small(d=random(60, 6), e=random(60), m=random(60, 6)))
    assert values(outcome.model, "d") == 255
    assert (
        outcome.notes[0] == "Every codebook has up to 255 values; `clusters` sets another number."
    )
    # the rest has no more values than that
    assert outcome.stats["relative_error"] < 1e-3
    assert not ShareWeights(clusters=400).call(outcome.model, Context()).modified


def test_a_table_gives_every_layer_its_clusters() -> None:
    table = {"Conv.*": 3, "ConvTranspose_.*": 6, "MatMul_4": 2}
    outcome = apply(ShareWeights(clusters=table), small())
    assert {name: values(outcome.model, name) for name in SHAPES} == {
        "w": 3, "v": 6, "d": 72, "m": 2
    }  # fmt: skip
    assert outcome.skipped == [("Gemm_3", "no pattern of `clusters` matches it")]
    again = apply(ShareWeights(clusters=dict(reversed(table.items()))), small())
    for name in SHAPES:
        np.testing.assert_array_equal(weight(again.model, name), weight(outcome.model, name))


SHARED = "a = Conv(x, w) b = Relu(a) y = Conv(b, w)"


def shared() -> ir.Model:
    model = net("(float[1,4,3,3] x) => (float[1,4,3,3] y)", SHARED, {"w": random(4, 4, 1, 1)})
    refresh_shapes(model)
    return model


def test_weights_that_two_layers_read_are_shared_once() -> None:
    outcome = apply(ShareWeights(clusters={"Conv_0": 3, "Conv_2": 5}), shared())
    assert nodes(outcome.model) == "a = Conv(x, w)\nb = Relu(a)\ny = Conv(b, w)"
    assert (values(outcome.model, "w"), outcome.stats["weights"]) == (5, 16)
    outcome = apply(ShareWeights(clusters={"Conv_0": 3}), shared())
    assert not outcome.modified
    assert outcome.skipped == [
        ("Conv_0", "its weights are shared with a layer that no pattern of `clusters` matches"),
        ("Conv_2", "no pattern of `clusters` matches it"),
    ]


def test_biases_have_codebooks_of_their_own() -> None:
    outcome = apply(ShareWeights(clusters=7, bias_clusters=3), small())
    assert {name: values(outcome.model, name) for name in ("w", "b", "e")} == {
        "w": 7, "b": 3, "e": 3
    }  # fmt: skip
    assert outcome.stats["codebooks"] == 6


@pytest.mark.parametrize("vector", [2, 3, 6])
@pytest.mark.parametrize("weighting", ["none", "curvature"])
def test_consecutive_outputs_share_a_word(vector: int, weighting: Any) -> None:
    model = small()
    before = model.clone()
    step = ShareWeights(clusters=4, vector=vector, weighting=weighting)
    outcome = apply(step, model, samples(model))
    for name in ("d", "m"):
        old, new = (outputs_first(m, name) for m in (before, outcome.model))
        words = new.reshape(len(new) // vector, vector, -1).swapaxes(1, 2).reshape(-1, vector)
        olds = old.reshape(len(new) // vector, vector, -1).swapaxes(1, 2).reshape(-1, vector)
        codebook = np.unique(words, axis=0)
        assert len(codebook) == 4
        if weighting == "none":
            distances = np.square(olds[:, None].astype(np.float64) - codebook).sum(axis=2)
            chosen = np.square(olds.astype(np.float64) - words).sum(axis=1)
            np.testing.assert_allclose(chosen, distances.min(axis=1), rtol=1e-5)
    assert outcome.skipped == [
        (LAYERS[name], "words of several outputs are for Gemm and MatMul with two axes")
        for name in ("w", "v")
    ]
    assert outcome.stats["codebooks"] == 2


def test_words_fit_where_outputs_and_zeros_allow_it() -> None:
    array = random(12, 6)
    array[4:8, 1] = 0
    outcome = apply(ShareWeights(clusters=3, vector=4), small(d=array))
    new = weight(outcome.model, "d")
    np.testing.assert_array_equal(new == 0, array == 0)
    assert ("MatMul_4", "its 6 outputs are no multiple of vector, 4") in outcome.skipped
    array[8, 0] = 0
    outcome = apply(ShareWeights(clusters=3, vector=4), small(d=array))
    (why,) = [why for name, why in outcome.skipped if name == "Gemm_3"]
    assert why == (
        "1 of its words are zero in places; let prune-weights zero whole words, with block = 4"
    )
    assert not outcome.modified


def test_curvature_keeps_what_the_outputs_need() -> None:
    def errors(weighting: Any) -> float:
        array = np.concatenate([random(6, 100), 5 * random(6, 100, seed=1)], axis=1)
        model = net("(float[1,200] x) => (float[1,6] y)", "y = Gemm<transB=1>(x, w)", {"w": array})
        refresh_shapes(model)
        # the large weights see next to nothing
        x = random(20, 200) * np.repeat(np.array([1, 0.01], np.float32), 100)
        step = ShareWeights(clusters=6, weighting=weighting)
        outcome = step.call(model.clone(), Context(samples=Samples(inputs={"x": x})))
        difference = x.astype(np.float64) @ (weight(outcome.model, "w") - array).T
        if weighting == "curvature":
            # what it predicts is what becomes of the outputs, but for errors that happen to agree
            relative = np.square(difference).sum() / np.square(x @ array.T).sum()
            assert outcome.stats["relative_error"] == pytest.approx(relative, rel=0.5)
        return float(np.square(difference).sum())

    assert errors("curvature") < 0.3 * errors("none")


@pytest.mark.parametrize("weighting", ["none", "curvature"])
@pytest.mark.parametrize("share", [0.08, 0.15])
def test_a_size_budget_is_kept(weighting: Any, share: float) -> None:
    model = small(w=random(80, 3, 3, 3), b=random(80), v=random(80, 3, 1, 1))
    before, context = model.clone(), samples(model)
    raw = 4 * sum(weight(model, name).size for name in SHAPES)
    budget = int(share * raw)
    step = ShareWeights(size_budget_bytes=budget, weighting=weighting)
    outcome = step.call(model, context)
    total = sum(bits(weight(outcome.model, name)) for name in SHAPES)
    assert 0.85 * budget <= math.ceil(total / 8) <= budget
    assert outcome.stats["size_bytes"] == math.ceil(total / 8)
    if weighting == "none":
        error = lost(outcome.model, before, list(SHAPES))
        assert outcome.stats["relative_error"] == pytest.approx(error, rel=1e-3)
        equal = min(
            plain.stats["relative_error"]
            for plain in (
                ShareWeights(clusters=k).call(before.clone(), context) for k in (2, 3, 5, 8)
            )
            if plain.stats["size_bytes"] <= budget
        )
        assert error < equal
    # within the same budget, what is shared already stays
    assert not step.call(outcome.model, context).modified


@pytest.mark.parametrize("weighting", ["none", "curvature"])
def test_an_error_budget_is_kept(weighting: Any) -> None:
    sizes = []
    for limit in (0.2, 0.02):
        model = small(w=random(80, 3, 3, 3), b=random(80), v=random(80, 3, 1, 1))
        step = ShareWeights(max_error=limit, weighting=weighting)
        outcome = step.call(model, samples(model))
        assert 0.7 * limit <= outcome.stats["relative_error"] <= limit
        assert any("clusters in" in note for note in outcome.notes)
        sizes.append(outcome.stats["size_bytes"])
    assert sizes[0] < sizes[1]


def test_zeros_are_outside_of_budgets_codebooks() -> None:
    model = small(w=random(80, 3, 3, 3), b=random(80), v=random(80, 3, 1, 1))
    PruneWeights(amount=0.7).call(model, Context())
    zeros = {name: weight(model, name) == 0 for name in SHAPES}
    outcome = ShareWeights(size_budget_bytes=900, bias_clusters=4).call(model, Context())
    for name, mask in zeros.items():
        np.testing.assert_array_equal(weight(outcome.model, name) == 0, mask)
    assert values(outcome.model, "b") <= 4
    assert outcome.stats["size_bytes"] <= 900


def test_what_a_budget_leaves_alone_is_named() -> None:
    model = small()
    outcome = ShareWeights(max_error=0.01, bias_clusters=255).call(model, Context())
    assert outcome.notes[-1] == "Left as they were: Conv_0 bias."
    np.testing.assert_array_equal(weight(outcome.model, "b"), random(8))
    assert outcome.stats["codebooks"] == 5


def test_a_budget_that_is_too_small_is_refused() -> None:
    with pytest.raises(PassRefused, match=r"size_budget_bytes: it is 17, and .* takes 18 already"):
        ShareWeights(size_budget_bytes=17).call(small(), Context())
    outcome = ShareWeights(size_budget_bytes=18).call(small(), Context())
    assert {name: values(outcome.model, name) for name in SHAPES} == dict.fromkeys(SHAPES, 1)


def test_a_layer_of_zeros_is_left_alone() -> None:
    zeros = np.zeros((12, 6), np.float32)
    for step in (
        ShareWeights(clusters=2),
        ShareWeights(max_error=0.1),
        ShareWeights(clusters=1, vector=2),
    ):
        outcome = step.call(small(d=zeros.copy()), Context())
        np.testing.assert_array_equal(weight(outcome.model, "d"), zeros)


def test_negative_zeros_stay() -> None:
    array = random(12, 6)
    array[0] = -0.0
    outcome = apply(ShareWeights(clusters=2), small(d=array))
    assert np.signbit(weight(outcome.model, "d")[0]).all()


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_weights_that_are_not_finite_stay(number: float) -> None:
    array = random(12, 6)
    array[3, 3] = number
    outcome = ShareWeights(clusters=2).call(small(d=array), Context())
    assert ("Gemm_3", "some of its weights are NaN or infinite") in outcome.skipped
    np.testing.assert_array_equal(weight(outcome.model, "d"), array)


def test_what_cannot_be_shared_says_why() -> None:
    model = net(
        "(float[2,3] x) => (float[2,4] y)",
        "w = DequantizeLinear(q, s) y = MatMul(x, w)",
        {"q": np.ones((3, 4), np.int8), "s": np.array(0.5, np.float32)},
    )
    outcome = ShareWeights().call(model, Context())
    assert outcome.skipped == [("MatMul_1", "quantized already; share before quantize-int8")]
    assert (outcome.modified, outcome.stats["bits_per_weight"]) == (False, 0)


@pytest.mark.parametrize("dtype", ["FLOAT16", "BFLOAT16", "DOUBLE"])
def test_every_float_keeps_its_dtype(dtype: str) -> None:
    kind = ir.DataType[dtype]
    model = net(
        f"({dtype.lower()}[2,3] x) => ({dtype.lower()}[2,8] y)", "y = MatMul(x, w)",
        {"w": random(3, 8)},
    )  # fmt: skip
    array = random(3, 8).astype(kind.numpy())
    model.graph.initializers["w"].const_value = ir.tensor(array, dtype=kind, name="w")
    refresh_shapes(model)
    for step in (ShareWeights(clusters=4), ShareWeights(clusters=4, vector=2)):
        outcome = step.call(model.clone(), Context())
        got = weight(outcome.model, "w")
        assert got.dtype == array.dtype
        assert outcome.stats["clusters"] == 4
        assert not step.call(outcome.model, Context()).modified


def test_seeds_draw_differently_and_the_same_again() -> None:
    def draw(seed: int, init: Any) -> Callable[[], Array]:
        step = ShareWeights(clusters=30, seed=seed, init=init)
        return lambda: weight(step.call(small(), Context()).model, "w")

    for init in ("k-means++", "forgy"):
        np.testing.assert_array_equal(draw(1, init)(), draw(1, init)())
        assert not np.array_equal(draw(1, init)(), draw(2, init)())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clusters": 0}, ("clusters: it is 0", "from 1 to 65536")),
        ({"clusters": {"a": 5, "b": 0}}, ("clusters of 'b': it is 0",)),
        ({"clusters": {"(": 5}}, ("clusters of '('", "not a regular expression")),
        ({"clusters": {}}, ("the table is empty", "conv.*")),
        ({"clusters": 4, "max_error": 0.1}, ("clusters and max_error", "give only one")),
        ({"size_budget_bytes": 0}, ("size_budget_bytes: it is 0; it must be at least 1",)),
        ({"max_error": 0.0}, ("max_error: it is 0.0; it must be above 0",)),
        ({"max_error": math.nan}, ("max_error: it is nan",)),
        ({"init": "random"}, ("init: it is 'random'", "'density'")),
        ({"init": "linear", "vector": 2}, ("it is 'linear' with vector = 2", "'forgy'.")),
        ({"weighting": "hessian"}, ("weighting: it is 'hessian'", "'curvature'")),
        ({"codebook_channels": -1}, ("codebook_channels: it is -1",)),
        ({"codebook_channels": 9, "vector": 2}, ("make it a multiple of vector, 2",)),
        ({"vector": 0}, ("vector: it is 0",)),
        ({"bias_clusters": -1}, ("bias_clusters: it is -1",)),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(PassRefused) as caught:
        ShareWeights(**options)
    for word in ("share-weights: ", *words):
        assert word in str(caught.value)


def test_curvature_without_samples_is_refused() -> None:
    step = ShareWeights(weighting="curvature")
    assert step.needs_samples
    assert not ShareWeights().needs_samples
    with pytest.raises(PassRefused, match=r"weighting: .*needs samples; give them with --calib"):
        step.requires(small(), Context())


def test_a_pattern_without_a_layer_is_refused_with_near_names() -> None:
    with pytest.raises(PassRefused, match=r"'conv_0'.*no layer's whole name\. Near it: Conv_0"):
        ShareWeights(clusters={"conv_0": 5}).requires(small(), Context())


def test_a_recipe_says_it() -> None:
    text = 'schema = 1\n[[pass]]\nname = "share-weights"\n'
    (step,) = parse_recipe(text + 'clusters = { "conv.*" = 32, fc = 8 }\nvector = 2\n').passes
    assert step == ShareWeights(clusters={"conv.*": 32, "fc": 8}, vector=2)
    (step,) = parse_recipe(text + 'max_error = 0.01\nweighting = "curvature"\n').passes
    assert step == ShareWeights(max_error=0.01, weighting="curvature")
    with pytest.raises(RecipeError, match=r"recipe.toml:2: .*clusters: it is 0"):
        parse_recipe(text + "clusters = 0\n")


def test_the_report_names_the_largest_errors_and_the_outcome_can_be_quantized() -> None:
    assert pass_class("share-weights") is ShareWeights
    driver = Driver(small())
    driver.run([ShareWeights(clusters={"Conv_0": 40, "MatMul_4": 2})], Context())
    (record,) = driver.records
    assert record.notes[0].startswith("Largest relative squared errors of weights: MatMul_4 ")
    assert record.equivalence is not None
    assert record.equivalence.metric == "sqnr_db"
    # per-channel scales take an integer per value, so there are no more of them than values
    model = apply(ShareWeights(clusters=5), small()).model
    integers = weight(quantized(model).model, "m_quantized")
    assert max(len(np.unique(column)) for column in integers.T) <= 5
