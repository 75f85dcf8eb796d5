from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tests.torch_needed  # noqa: F401 - skips without torch
from edgepress.calibration.base import Samples
from edgepress.passes.base import Context, PassRefused
from edgepress.passes.prune_and_retrain import PruneAndRetrain
from edgepress.passes.tune_codebooks import TuneCodebooks
from edgepress.pipeline.recipe import parse_recipe
from tests.graphs import Array, answers, nodes, random, weight
from tests.passes.training_nets import (
    CLASSES,
    accuracy,
    blobs,
    convolutional,
    images,
    linear,
    made,
    train_linear,
    trained,
)

WEIGHTS = ("w1", "w2", "w3")


def rounded(array: Array, values: int) -> Array:
    """The array with every element moved to the nearest of some of its own."""
    codebook = np.quantile(array, (np.arange(values) + 0.5) / values)
    nearest = np.abs(array[..., None] - codebook).argmin(axis=-1)
    return np.asarray(codebook[nearest], array.dtype)


def shared(model: ir.Model, values: int = 4, sparsity: float = 0.3) -> ir.Model:
    """Give every weight few values, some of them zero."""
    for name in WEIGHTS:
        array = weight(model, name)
        few = rounded(array, values)
        few[np.abs(array) <= np.quantile(np.abs(array), sparsity)] = 0
        model.graph.initializers[name].const_value = ir.tensor(few, name=name)
    return model


def count(array: Array) -> int:
    return len(np.unique(array))


@pytest.mark.parametrize(
    "options",
    [{"distillation": 0.0}, {"distillation": 0.4, "averaging": 0.8, "seed": 2}],
    ids=str,
)
def test_a_value_moves_by_the_summed_gradients_of_its_weights(options: dict[str, Any]) -> None:
    """NumPy trains the codebook: the gradient of a value is a sum over all that have it."""
    w = rounded(random(6, CLASSES), 5)
    w[[0, 3, 4], [1, 1, 0]] = 0
    b = np.array([0.5, -0.25, 0.5], np.float32)
    codebook, clusters = np.unique(w, return_inverse=True)
    clusters = clusters.reshape(w.shape)
    levels, places = np.unique(b, return_inverse=True)
    step = TuneCodebooks(**{"epochs": 4, "batch_size": 25, "learning_rate": 0.05} | options)

    def gradients(dw: Array, db: Array) -> list[Array]:
        sums = [dw[clusters == k].sum() * (codebook[k] != 0) for k in range(len(codebook))]
        return [np.array(sums), np.bincount(places, db)]

    teacher = random(6, CLASSES, seed=8), random(CLASSES, seed=9)
    values, biases = train_linear(
        step, blobs(), [codebook, levels], lambda v: (v[0][clusters], v[1][places]), gradients,
        teacher if step.distillation else None,
    )  # fmt: skip
    got = trained(step, linear(w, b), blobs(), original=linear(*teacher))
    assert np.abs(values - codebook).max() > 0.1
    np.testing.assert_allclose(weight(got, "w"), values[clusters], rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(weight(got, "b"), biases[places], rtol=2e-4, atol=1e-5)
    np.testing.assert_array_equal(weight(got, "w") == 0, w == 0)


def test_the_graph_stays_and_the_report_counts_values() -> None:
    model = shared(convolutional())
    before = nodes(model)
    counts = sum(count(weight(model, name)) - 1 for name in WEIGHTS)
    outcome = TuneCodebooks(epochs=1).call(model, Context(training=images()))
    assert nodes(outcome.model) == before
    assert outcome.modified
    assert outcome.skipped == []
    assert outcome.stats["tensors"] == 3
    assert outcome.stats["values"] == counts
    assert set(outcome.stats) == {"tensors", "values", "training_loss", "training_accuracy"}


@given(
    seed=st.integers(0, 99),
    values=st.integers(1, 20),
    sparsity=st.sampled_from([0.0, 0.5, 0.9]),
    averaging=st.sampled_from([0.0, 0.9]),
)
@settings(deadline=None, max_examples=12)
def test_no_tensor_gets_more_values_and_zeros_stay(
    seed: int, values: int, sparsity: float, averaging: float
) -> None:
    model = shared(convolutional(seed), values, sparsity)
    step = TuneCodebooks(epochs=1, batch_size=20, learning_rate=0.1, averaging=averaging)
    got = trained(step, model, images(40))
    for name in (*WEIGHTS, "b1", "b2"):
        old, new = weight(model, name), weight(got, name)
        assert new.dtype == old.dtype
        assert count(new) <= count(old)
        np.testing.assert_array_equal(new == 0, old == 0)
        assert not np.signbit(new[new == 0]).any()
        # weights of one cluster stay together
        pairs = np.unique(np.stack([old.ravel(), new.ravel()]), axis=1)
        assert pairs.shape[1] == count(old)


def test_tuning_brings_accuracy_back() -> None:
    samples = images(150)
    dense = trained(
        PruneAndRetrain(amount=0.0, epochs=12, batch_size=25, learning_rate=0.05),
        convolutional(), samples,
    )  # fmt: skip
    model = shared(dense.clone(), 3)
    step = TuneCodebooks(epochs=12, batch_size=25, learning_rate=0.03)
    outcome = step.call(model.clone(), Context(training=samples, original=dense))
    assert accuracy(outcome.model, samples) > accuracy(model, samples) + 0.1
    assert outcome.stats["training_accuracy"] == pytest.approx(
        accuracy(outcome.model, samples), abs=1e-5
    )


def test_vectors_that_rows_share_stay_shared() -> None:
    """Product quantization: the rows are made of a few vectors; no row becomes another."""
    vectors = random(4, 9)
    chosen = np.random.default_rng(0).integers(0, 4, (10, 4))
    w = vectors[chosen].reshape(10, 36)
    model = convolutional()
    model.graph.initializers["w2"].const_value = ir.tensor(w, name="w2")
    got = weight(trained(TuneCodebooks(learning_rate=0.05), model, images()), "w2")
    assert (got != w).any()
    parts = np.unique(got.reshape(40, 9), axis=0)
    assert len(parts) == 4


def test_a_layer_that_shares_nothing_is_left_alone() -> None:
    features = 300
    rare = random(features, CLASSES)
    model = made(
        f"(float[1,{features}] x) => (float[1,{CLASSES}] y)",
        "h = MatMul(x, rare) y = MatMul(h, few)",
        {"rare": rare, "few": rounded(random(CLASSES, CLASSES), 2)},
    )
    outcome = TuneCodebooks().call(model, Context(training=blobs(20, features)))
    why = "its weights are not shared; put share-weights before this pass"
    assert outcome.skipped == [("MatMul_0", why)]
    np.testing.assert_array_equal(weight(outcome.model, "rare"), rare)
    assert outcome.stats["tensors"] == 1


def test_many_values_are_shared_where_each_is_used_twice() -> None:
    """As those of product quantization are."""
    half = random(300, CLASSES)
    w = np.concatenate([half, half])
    got = trained(TuneCodebooks(epochs=1), linear(w), blobs(20, 600))
    assert count(w) > 256
    np.testing.assert_array_equal(weight(got, "w")[:300], weight(got, "w")[300:])
    assert (weight(got, "w") != w).any()


@pytest.mark.parametrize("kind", ["float16", "double"])
def test_other_floats_keep_their_dtype_and_values(kind: str) -> None:
    dtype = {"float16": np.float16, "double": np.float64}[kind]
    w = rounded(random(6, CLASSES), 4).astype(dtype)
    model = made(f"({kind}[1,6] x) => ({kind}[1,{CLASSES}] y)", "y = MatMul(x, w)", {"w": w})
    samples = blobs()
    x = Samples({"x": samples.inputs["x"].astype(dtype)}, samples.labels)
    got = weight(trained(TuneCodebooks(), model, x), "w")
    assert got.dtype == dtype
    assert count(got) == count(w)
    assert (got != w).any()


def test_weights_that_two_layers_share_are_one_codebook() -> None:
    w = rounded(random(6, 6), 4)
    model = made(
        "(float[1,6] x) => (float[1,6] y)",
        "h = MatMul(x, w) r = Relu(h) y = MatMul(r, w)",
        {"w": w},
    )
    outcome = TuneCodebooks().call(model, Context(training=blobs()))
    assert outcome.stats["tensors"] == 1
    assert count(weight(outcome.model, "w")) == count(w)
    assert np.isfinite(answers(outcome.model, {"x": random(1, 6)})[0]).all()


def test_a_model_that_shares_nothing_is_refused() -> None:
    features = 300
    with pytest.raises(PassRefused, match=r"weights: no layer has .* put share-weights before"):
        TuneCodebooks().call(
            linear(random(features, CLASSES)), Context(training=blobs(9, features))
        )


def test_labels_are_demanded() -> None:
    with pytest.raises(PassRefused, match="tune-codebooks: training samples: needs labelled"):
        TuneCodebooks().requires(linear(), Context(training=Samples(blobs().inputs)))


def test_a_recipe_sets_its_options() -> None:
    text = 'schema = 1\n[[pass]]\nname = "tune-codebooks"\nepochs = 3\nseed = 5\n'
    assert list(parse_recipe(text).passes) == [TuneCodebooks(epochs=3, seed=5)]
