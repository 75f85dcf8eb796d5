from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tests.torch_needed as needed
from edgepress.calibration.base import Samples
from edgepress.passes._torch_graph import TorchGraph
from edgepress.passes._training import trainable
from edgepress.passes.base import Context, PassRefused
from edgepress.passes.prune_and_retrain import PruneAndRetrain, _Masks
from edgepress.passes.prune_weights import PruneWeights
from edgepress.pipeline.driver import Driver
from edgepress.pipeline.recipe import parse_recipe
from tests.graphs import Array, nodes, random, weight
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

torch = needed.torch

WEIGHTS = ("w1", "w2", "w3")
STILL = 1e-12  # a learning rate that changes no float32


def least(array: Array, amount: float) -> Array:
    """A mask of the smallest magnitudes."""
    count = math.floor(amount * array.size + 1e-9)
    mask = np.zeros(array.size, bool)
    mask[np.argsort(np.abs(array), axis=None, kind="stable")[:count]] = True
    return mask.reshape(array.shape)


@pytest.mark.parametrize("rounds", [1, 3, 10])
def test_the_smallest_weights_become_zero_and_the_graph_stays(rounds: int) -> None:
    model = convolutional()
    step = PruneAndRetrain(
        amount=0.7, ranking="local", rounds=rounds, epochs=2, batch_size=10, learning_rate=STILL
    )
    outcome = step.call(model.clone(), Context(training=images()))
    assert nodes(outcome.model) == nodes(model)
    assert outcome.modified
    assert outcome.skipped == []
    zeros = 0
    for name in WEIGHTS:
        array = weight(model, name)
        mask = least(array, 0.7)
        zeros += int(mask.sum())
        np.testing.assert_array_equal(weight(outcome.model, name), np.where(mask, 0, array))
    total = sum(weight(model, name).size for name in WEIGHTS)
    assert outcome.stats["weights"] == total
    assert outcome.stats["zeros"] == zeros
    assert outcome.stats["sparsity"] == pytest.approx(zeros / total, abs=1e-4)
    assert outcome.notes[0].startswith("Sparsest layers: ")


@pytest.mark.parametrize(
    "options",
    [{"distillation": 0.0}, {"distillation": 0.4, "averaging": 0.8, "seed": 2}],
    ids=str,
)
def test_what_is_left_is_trained_as_numpy_does(options: dict[str, Any]) -> None:
    """Gradients of pruned weights are zero, also in the moments of Adam."""
    step = PruneAndRetrain(
        amount=0.5,
        rounds=1,
        epochs=4,
        batch_size=25,
        learning_rate=0.05,
        **options,
    )
    w, b = random(6, CLASSES), random(CLASSES, seed=1)
    b[1] = 0  # biases are not masked
    kept = ~least(w, 0.5)
    teacher = random(6, CLASSES, seed=8), random(CLASSES, seed=9)
    want, biases = train_linear(
        step, blobs(), [w, b], lambda v: (v[0] * kept, v[1]), lambda dw, db: [dw * kept, db],
        teacher if step.distillation else None,
    )  # fmt: skip
    got = trained(step, linear(w, b), blobs(), original=linear(*teacher))
    np.testing.assert_allclose(weight(got, "w"), want * kept, rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(weight(got, "b"), biases, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize(("pruning", "last"), [(1.0, 30), (0.5, 15), (0.0, 0)])
def test_sparsity_rises_with_the_cube_of_zhu_and_gupta(pruning: float, last: int) -> None:
    amount, rounds, steps, size = 0.9, 4, 40, 600
    model = linear(random(size // CLASSES, CLASSES))
    step = PruneAndRetrain(amount=amount, rounds=rounds, pruning=pruning, ranking="local")
    tensors, _ = trainable(model)
    masks = _Masks(step, model, TorchGraph("test", model, ["w", "b"]), tensors)
    sparsity, before = [], np.zeros((size // CLASSES, CLASSES), bool)
    for index in range(steps):
        masks.start_step(index, steps)
        zeros = (masks.weights(masks.variables)["w"] == 0).numpy()
        assert zeros[before].all(), "a pruned weight came back"
        sparsity.append(np.count_nonzero(zeros) / size)
        before = zeros
        with torch.no_grad():  # weights move, pruned ones as well
            masks.variables[0] += torch.randn(masks.variables[0].shape) * 0.1
    curve = [amount * (1 - (1 - k / rounds) ** 3) for k in range(1, rounds + 1)]
    section = pruning * steps / rounds
    due = [
        min(int(index / section), rounds - 1) if section else rounds - 1 for index in range(steps)
    ]
    np.testing.assert_allclose(sparsity, [curve[k] for k in due], atol=1 / size)
    assert next(i for i, share in enumerate(sparsity) if share > amount - 1 / size) == last
    assert masks.outcome is not None
    assert masks.outcome.stats["zeros"] == size * amount


@given(
    seed=st.integers(0, 99),
    amount=st.sampled_from([0.0, 0.3, 0.8, 0.97]),
    before=st.sampled_from([0.0, 0.5, 0.9]),
    ranking=st.sampled_from(["global", "lamp", "local"]),
    averaging=st.sampled_from([0.0, 0.9]),
)
@settings(deadline=None, max_examples=12)
def test_zeros_never_come_back(
    seed: int, amount: float, before: float, ranking: Any, averaging: float
) -> None:
    model = PruneWeights(amount=before).call(convolutional(seed), Context()).model
    step = PruneAndRetrain(
        amount=amount, ranking=ranking, rounds=3, epochs=2, batch_size=20, learning_rate=0.1,
        averaging=averaging,
    )  # fmt: skip
    outcome = step.call(model.clone(), Context(training=images(40)))
    zeros = total = 0
    for name in WEIGHTS:
        old, new = weight(model, name), weight(outcome.model, name)
        assert not new[old == 0].any()
        assert not np.signbit(new[new == 0]).any()
        zeros, total = zeros + int((new == 0).sum()), total + new.size
    assert zeros / total >= math.floor(amount * total) / total - len(WEIGHTS) / total
    assert outcome.stats["zeros"] == zeros
    assert weight(outcome.model, "b2").all()  # biases are not pruned


def test_a_single_step_prunes_all() -> None:
    step = PruneAndRetrain(amount=0.5, rounds=50, epochs=1, batch_size=100)
    got = trained(step, linear(), blobs(20))
    assert np.count_nonzero(weight(got, "w")) == 9


def test_retraining_brings_accuracy_back() -> None:
    samples = images(150)
    step = PruneAndRetrain(
        amount=0.0, epochs=12, batch_size=25, learning_rate=0.05, distillation=0.0
    )
    dense = trained(step, convolutional(), samples)
    pruned = PruneWeights(amount=0.9, ranking="lamp").call(dense.clone(), Context()).model
    retrained = trained(
        PruneAndRetrain(amount=0.9, epochs=12, batch_size=25, learning_rate=0.05, rounds=10),
        dense, samples, original=dense,
    )  # fmt: skip
    assert accuracy(dense, samples) > 0.95
    assert accuracy(pruned, samples) < 0.8
    assert accuracy(retrained, samples) > 0.9


def test_a_table_names_the_layers_and_the_others_are_trained() -> None:
    model = convolutional()
    array = weight(model, "w2").copy()
    array[3] = 0
    model.graph.initializers["w2"].const_value = ir.tensor(array, name="w2")
    step = PruneAndRetrain(amount={"Conv_0": 0.5, "MatMul.*": 0.8}, rounds=2, epochs=2)
    outcome = step.call(model.clone(), Context(training=images()))
    found = {name: weight(outcome.model, name) for name in WEIGHTS}
    shares = {name: np.mean(array == 0) for name, array in found.items()}
    assert shares == pytest.approx({"w1": 0.5, "w2": 0.1, "w3": 0.8}, abs=0.02)
    assert not found["w2"][3].any()
    assert (found["w2"] != array).any()
    assert outcome.skipped == [("Gemm_4", "no pattern of `amount` matches it")]
    assert outcome.stats["weights"] == found["w1"].size + found["w3"].size


def test_weights_that_something_else_reads_too_get_a_copy() -> None:
    w = random(6, CLASSES)
    model = made(
        "(float[1,6] x) => (float[1,3] y)",
        "h = MatMul(x, w) m = ReduceMean <keepdims=0> (w) y = Mul(h, m)",
        {"w": w},
    )
    outcome = PruneAndRetrain(amount=0.6, rounds=2).call(model, Context(training=blobs()))
    assert nodes(outcome.model).startswith("h = MatMul(x, w_trained)\nm = ReduceMean(w)")
    assert np.count_nonzero(weight(outcome.model, "w_trained") == 0) == 10
    np.testing.assert_array_equal(weight(outcome.model, "w"), w)


def test_a_constant_that_is_a_weight_and_a_bias_becomes_two() -> None:
    w = random(1, CLASSES)
    model = made("(float[1,1] x) => (float[1,3] y)", "y = Gemm(x, w, w)", {"w": w})
    outcome = PruneAndRetrain(amount=0.7, rounds=2).call(model, Context(training=blobs(20, 1)))
    assert nodes(outcome.model) == "y = Gemm(x, w_trained, w)"
    assert np.count_nonzero(weight(outcome.model, "w_trained")) == 1
    assert weight(outcome.model, "w").all()


def test_a_recipe_sets_its_options_and_the_pipeline_runs_it() -> None:
    text = (
        'schema = 1\n[[pass]]\nname = "prune-and-retrain"\nepochs = 2\nrounds = 3\n'
        'amount = {"Gemm.*" = 0.75}\n'
    )
    (step,) = parse_recipe(text).passes
    assert step == PruneAndRetrain(epochs=2, rounds=3, amount={"Gemm.*": 0.75})
    driver = Driver(linear(random(8, CLASSES)))
    driver.run([step], Context(training=blobs(30, 8)))
    assert driver.records[0].stats["sparsity"] == 0.75
    assert np.count_nonzero(weight(driver.model, "w")) == 6


def test_labels_are_demanded() -> None:
    with pytest.raises(PassRefused, match="prune-and-retrain: training samples: needs labelled"):
        PruneAndRetrain().requires(linear(), Context(training=Samples(blobs().inputs)))


def test_a_pattern_that_matches_no_layer_is_refused() -> None:
    step = PruneAndRetrain(amount={"Conv.*": 0.5})
    with pytest.raises(PassRefused, match=r"prune-and-retrain: amount of 'Conv\.\*': it match"):
        step.requires(linear(), Context(training=blobs()))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"amount": 1.0}, "amount: it is 1.0; give a share of at least 0 and below 1"),
        ({"amount": {"(": 0.5}}, "not a regular expression"),
        ({"amount": {}}, "amount: the table is empty"),
        ({"ranking": "random"}, "ranking: it is 'random'; choose 'global', 'lamp' or 'local'"),
        ({"rounds": 0}, "rounds: it is 0; give a number of at least 1"),
        ({"pruning": 1.5}, "pruning: it is 1.5; give a number from 0 to 1"),
        ({"epochs": 0}, "epochs: it is 0"),
    ],
)
def test_options_out_of_bounds_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(PassRefused) as refused:
        PruneAndRetrain(**options)
    assert why in str(refused.value)
    assert str(refused.value).startswith("prune-and-retrain: ")
