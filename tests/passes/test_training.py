from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import tests.torch_needed as needed
from edgepress.calibration.base import CalibrationError, Samples
from edgepress.passes._torch_graph import TorchGraph
from edgepress.passes._training import TrainingPass, logits_of, trainable
from edgepress.passes._training_loop import Trained, Trainer
from edgepress.passes.base import Context, Outcome, PassRefused
from tests.graphs import Array, net, nodes, random, weight
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


@dataclass(frozen=True, kw_only=True)
class FineTune(TrainingPass):
    """The simplest method: train all weights and biases as they are."""

    def call(self, model: ir.Model, context: Context) -> Outcome:
        return Outcome(model=model, modified=True, stats=tune(self, model, context).stats())


def tune(step: TrainingPass, model: ir.Model, context: Context) -> Trained:
    trainer = Trainer(step, model, context, trainable(model)[0])
    return trainer.train(AsTheyAre(trainer.graph))


@dataclass
class AsTheyAre:
    graph: TorchGraph

    @property
    def variables(self) -> Sequence[Any]:
        return list(self.graph.parameters.values())

    def weights(self, variables: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(self.graph.parameters, variables, strict=True))

    def start_step(self, step: int, steps: int) -> None:
        assert 0 <= step < steps


def refusal(step: TrainingPass, model: ir.Model, samples: Samples | None = None) -> str:
    samples = blobs() if samples is None else samples
    with pytest.raises(PassRefused) as refused:
        step.requires(model, Context(training=samples))
    return str(refused.value)


@pytest.mark.parametrize(
    "options",
    [
        {"distillation": 0.0},
        {"distillation": 0.0, "averaging": 0.9, "learning_rate": 0.3},
        {"distillation": 0.3, "temperature": 3.0},
        {"distillation": 1.0, "averaging": 0.5, "seed": 7},
    ],
    ids=str,
)
def test_training_is_what_numpy_computes(options: dict[str, Any]) -> None:
    """60 samples in batches of 25, so that the last one is smaller."""
    step = FineTune(**{"epochs": 4, "batch_size": 25, "learning_rate": 0.05} | options)
    model, samples = linear(), blobs()
    teacher = random(6, CLASSES, seed=8), random(CLASSES, seed=9)
    want = train_linear(
        step, samples, [weight(model, "w"), weight(model, "b")],
        lambda variables: (variables[0], variables[1]), lambda dw, db: [dw, db],
        teacher if step.distillation else None,
    )  # fmt: skip
    got = trained(step, model, samples, original=linear(*teacher))
    for name, array in zip(("w", "b"), want, strict=True):
        assert np.abs(array - weight(model, name)).max() > 0.1
        np.testing.assert_allclose(weight(got, name), array, rtol=2e-4, atol=1e-5)


def test_it_learns_and_says_how_well() -> None:
    model, samples = convolutional(), images(120)
    assert accuracy(model, samples) < 0.6
    context = Context(training=samples)
    outcome = FineTune(epochs=12, batch_size=20, learning_rate=0.05, distillation=0).call(
        model, context
    )
    assert accuracy(model, samples) > 0.95
    assert outcome.stats["training_accuracy"] == pytest.approx(accuracy(model, samples), abs=1e-5)
    assert 0 < outcome.stats["training_loss"] < 0.5


def test_the_loss_is_the_mean_of_the_last_epoch() -> None:
    """At a rate that changes nothing, that of the untrained model."""
    model, samples = linear(), blobs()
    step = FineTune(epochs=2, batch_size=7, learning_rate=1e-12, distillation=0)
    loss = tune(step, model, Context(training=samples)).loss
    assert samples.labels is not None
    z = samples.inputs["x"] @ weight(model, "w") + weight(model, "b")
    logs = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    assert loss == pytest.approx(-logs[np.arange(60), samples.labels].mean(), rel=1e-5)


def test_the_same_seed_gives_the_same_bytes() -> None:
    model, samples = convolutional(), images()

    def content(seed: int) -> bytes:
        step = FineTune(
            epochs=2, batch_size=16, seed=seed, rotation_degrees=10, shift_pixels=1, averaging=0.9
        )
        got = ir.to_proto(trained(step, model, samples)).SerializeToString(deterministic=True)
        return bytes(got)

    assert content(3) == content(3)
    assert content(3) != content(4)


def test_the_graph_and_all_other_constants_stay() -> None:
    model = made(
        "(float[1,4] x) => (float[1,3] y)",
        "s = Mul(x, scale) m = MatMul(s, w) y = Add(m, b)",
        {"scale": random(4), "w": random(4, 3), "b": random(3)},
    )
    got = trained(FineTune(), model, blobs(20, 4))
    assert nodes(got) == nodes(model)
    changed = [n for n in ("scale", "w", "b") if (weight(got, n) != weight(model, n)).any()]
    assert changed == ["w", "b"]


def test_what_something_else_reads_too_gets_a_copy() -> None:
    model = made(
        "(float[1,3] x) => (float[1,3] y)",
        "h = Gemm(x, w, b) g = Gemm(h, w) y = Mul(g, b)",
        {"w": random(3, 3), "b": random(3)},
    )
    tensors, skipped = trainable(model)
    assert skipped == []
    assert [(t.value.name, t.is_bias) for t in tensors] == [("w", False), ("b_trained", True)]
    assert nodes(model) == "h = Gemm(x, w, b_trained)\ng = Gemm(h, w)\ny = Mul(g, b)"
    assert [t.value.name for t in trainable(model)[0]] == ["w", "b_trained"]


@pytest.mark.parametrize("operator", ["Softmax", "LogSoftmax <axis=1>"])
def test_a_softmax_at_the_end_is_left_out(operator: str) -> None:
    weights = {"w": random(6, 3), "b": random(3)}
    model = made(
        "(float[1,6] x) => (float[1,3] p)", f"y = Gemm(x, w, b) p = {operator} (y)", weights
    )
    got = trained(FineTune(), model, blobs())
    assert nodes(got) == nodes(model)
    plain = trained(FineTune(), linear(weights["w"], weights["b"]), blobs())
    np.testing.assert_array_equal(weight(got, "w"), weight(plain, "w"))


def test_logits_may_have_more_axes_than_two() -> None:
    model = made(
        "(float[1,2,5,5] x) => (float[1,3,1,1] y)",
        "c = Conv(x, w) y = GlobalAveragePool(c)",
        {"w": random(3, 2, 3, 3)},
    )
    assert logits_of("test", model).name == "y"
    samples = blobs(40, 2, 5, 5)
    got = trained(FineTune(epochs=20, learning_rate=0.05, distillation=0), model, samples)
    assert accuracy(got, samples) > accuracy(model, samples)


def test_with_distillation_alone_labels_do_not_matter() -> None:
    samples = blobs()
    assert samples.labels is not None
    other = Samples(samples.inputs, (samples.labels + 1) % CLASSES)
    teacher, step = linear(random(6, CLASSES, seed=5)), FineTune(distillation=1.0)
    one, two = (trained(step, linear(), s, original=teacher) for s in (samples, other))
    np.testing.assert_array_equal(weight(one, "w"), weight(two, "w"))


def test_without_an_original_the_model_itself_is_the_teacher() -> None:
    model, step = linear(), FineTune(distillation=1.0, epochs=2)
    one, two = trained(step, model, blobs()), trained(step, model, blobs(), original=model)
    np.testing.assert_array_equal(weight(one, "w"), weight(two, "w"))


def test_progress_tells_the_loss_and_ctrl_c_comes_through() -> None:
    told: list[tuple[str, int, int]] = []

    def progress(what: str, done: int, total: int) -> None:
        told.append((what, done, total))
        if len(told) == 5:
            raise KeyboardInterrupt

    model = linear()
    context = Context(training=blobs(), progress=progress)
    with pytest.raises(KeyboardInterrupt):
        FineTune(epochs=3, batch_size=20).call(model, context)
    assert [done for _, done, _ in told] == [1, 2, 3, 4, 5]
    assert {total for *_, total in told} == {9}
    assert told[3][0].startswith("epoch 2 of 3, loss ")


def test_samples_may_be_read_only_and_have_a_batch_axis() -> None:
    samples, model = images(), convolutional()
    step = FineTune(epochs=1, shift_pixels=1.0)
    want = trained(step, model, samples)
    assert samples.labels is not None
    other = Samples({"x": samples.inputs["x"][:, None]}, samples.labels.astype(np.int32))
    other.inputs["x"].flags.writeable = False
    np.testing.assert_array_equal(weight(trained(step, model, other), "w2"), weight(want, "w2"))


def test_a_half_precision_model_keeps_its_dtype() -> None:
    model = net(
        "(float16[1,6] x) => (float16[1,3] y)",
        "y = Gemm(x, w, b)",
        {"w": random(6, 3).astype(np.float16), "b": random(3).astype(np.float16)},
    )
    samples = blobs()
    half = Samples({"x": samples.inputs["x"].astype(np.float16)}, samples.labels)
    got = trained(FineTune(), model, half)
    assert weight(got, "w").dtype == np.float16
    assert (weight(got, "w") != weight(model, "w")).any()


def test_a_loss_that_is_no_number_is_refused() -> None:
    samples = blobs()
    samples.inputs["x"][7] = 3e38
    with pytest.raises(PassRefused) as refused:
        FineTune(learning_rate=0.5).call(linear(), Context(training=samples))
    assert "learning_rate: the loss became " in str(refused.value)
    assert "in epoch 1; lower it (it is 0.5), or scale the samples as the model " in str(
        refused.value
    )


def test_labelled_samples_are_demanded() -> None:
    model = linear()
    with pytest.raises(PassRefused, match="needs labelled training samples; give some with --tr"):
        FineTune().requires(model, Context())
    bare = Samples(blobs().inputs, None, "d.npz")
    assert "training samples (d.npz holds no array `labels`)" in refusal(FineTune(), model, bare)
    assert FineTune().needs_training


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_a_label_that_is_no_class_is_refused(label: int) -> None:
    samples = blobs()
    assert samples.labels is not None
    samples.labels[7] = label
    text = refusal(FineTune(), linear(), samples)
    assert "the model tells 3 classes apart, 0 to 2; mend the labels" in text


def test_samples_have_to_fit_the_model() -> None:
    with pytest.raises(CalibrationError, match=r"has shape \[60, 5\], expected \[n, 6\]"):
        FineTune().requires(linear(), Context(training=blobs(60, 5)))


def test_without_torch_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert refusal(FineTune(), linear()).endswith("pip install 'edgepress[train]'.")


@pytest.mark.parametrize(
    ("signature", "body", "why"),
    [
        ("(float[1,6] x) => (float[1,3] y, float[1,3] h)", "h = MatMul(x, w) y = Relu(h)",
         "outputs: training needs one output, the logits, and the model has y, h;"),
        ("(float[1,6] x) => (float[3] y)", "h = MatMul(x, w) y = Reshape(h, three)",
         "output 'y': training needs the logits of a classifier, floats of shape [1, classes], and "
         "this output is FLOAT of shape [3]"),
        ("(float[1,6] x) => (float[1,2,9] y)", "h = Concat <axis=1> (x, x, x) "
         "y = Reshape(h, pairs)", "this output is FLOAT of shape [1, 2, 9]"),
        ("(float[1,6] x) => (int64[1,1] y)", "h = MatMul(x, w) y = ArgMax <axis=1> (h)",
         "this output is INT64 of shape [1, 1]"),
        ("(float[1,6] x) => (float[1,3,1,1] y)", "h = MatMul(x, w) u = Reshape(h, four) "
         "y = Softmax(u)", "node 'Softmax_2': this Softmax is over axis -1, which does not hold"),
    ],
)  # fmt: skip
def test_what_has_no_logits_is_refused(signature: str, body: str, why: str) -> None:
    constants: dict[str, Array] = {
        "w": random(6, 3),
        "three": np.array([3]),
        "pairs": np.array([1, 2, 9]),
        "four": np.array([1, 3, 1, 1]),
    }
    assert why in refusal(FineTune(), made(signature, body, constants))


def test_an_operator_that_is_not_known_is_refused() -> None:
    model = made(
        "(float[1,6] x) => (float[1,3] y)", "h = Exp(x) y = MatMul(h, w)", {"w": random(6, 3)}
    )
    with pytest.raises(PassRefused, match="node 'Exp_0': Exp cannot be trained through"):
        FineTune().call(model, Context(training=blobs()))


def test_only_images_are_distorted() -> None:
    text = refusal(FineTune(shear=0.1), linear())
    assert "input 'x': rotation_degrees, scaling, shear and shift_pixels change images" in text
    FineTune(shear=0.1).requires(convolutional(), Context(training=images()))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"epochs": 0}, "epochs: it is 0; give a number at least 1"),
        ({"batch_size": 0}, "batch_size: it is 0"),
        ({"learning_rate": 0.0}, "learning_rate: it is 0.0; give a number above 0, to 1"),
        ({"learning_rate": 1.5}, "learning_rate: it is 1.5"),
        ({"temperature": -1.0}, "temperature: it is -1.0"),
        ({"distillation": 1.1}, "distillation: it is 1.1; give a number from 0 to 1"),
        ({"distillation": float("nan")}, "distillation: it is nan"),
        ({"averaging": 1.0}, "averaging: it is 1.0; give a number from 0 to below 1"),
        ({"rotation_degrees": -1.0}, "rotation_degrees: it is -1.0; give a number at least 0"),
        ({"scaling": 1.0}, "scaling: it is 1.0; give a number below 1"),
        ({"shear": -0.1}, "shear: it is -0.1"),
        ({"shift_pixels": -0.1}, "shift_pixels: it is -0.1"),
    ],
)
def test_options_out_of_bounds_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(PassRefused) as refused:
        FineTune(**options)
    assert why in str(refused.value)
