"""What passes that train share: their options, and what they ask of the model and the samples.

torch is not needed to import this module; `_training_loop` trains.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Samples
from edgepress.passes._gradient_tape import is_float
from edgepress.passes._layer_tensors import LayerTensor, Read, layer_reads, replace, why_not
from edgepress.passes._shapes import shape_of, static_shape
from edgepress.passes.base import Context, Pass, PassRefused

_SOFTMAX = ("Softmax", "LogSoftmax")


@dataclass(frozen=True, kw_only=True)
class TrainingPass(Pass):
    """Trains a classifier on labelled samples. Options are shared by all passes that train.

    The loss is the cross-entropy with the labels, mixed with distillation from the model as it was
    before the recipe. Adam lowers it (Kingma and Ba, 2015), with a learning rate that falls along
    half a cosine to 0 (Loshchilov and Hutter, 2017, without restarts). It is relative to the size
    of each tensor (as in Adafactor; Shazeer and Stern, 2018, section 8): where a BatchNorm is
    folded, or inputs are large, the weights of one layer are a hundred times those of another.

    Attributes:
        epochs: how often every training sample is seen.
        batch_size: samples per step.
        learning_rate: at the start, relative to the root mean square of each tensor: 0.01 moves a
            weight by about 1 % of that in a step.
        distillation: share of the loss that is distillation (Hinton et al., 2015), the rest being
            cross-entropy: 0 for labels alone, 1 for the original model's answers alone.
        temperature: what logits are divided by in distillation.
        rotation_degrees: images are turned by a random angle up to this, either way.
        scaling: images are enlarged or shrunk by a random share up to this.
        shear: images are sheared sideways by up to this share of their height.
        shift_pixels: images are moved by random distances up to this, along both axes.
        averaging: decay of the moving average of the weights that is kept in the end; 0 keeps the
            last weights.
        seed: of the order of samples and of all random changes to them.
    """

    lossless: ClassVar[bool] = False

    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 0.01
    distillation: float = 0.5
    temperature: float = 2.0
    rotation_degrees: float = 0.0
    scaling: float = 0.0
    shear: float = 0.0
    shift_pixels: float = 0.0
    averaging: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse options out of bounds."""
        for option in ("epochs", "batch_size"):
            self._demand(option, getattr(self, option) >= 1, "at least 1")
        self._demand("learning_rate", 0 < self.learning_rate <= 1, "above 0, to 1")
        self._demand("temperature", 0 < self.temperature < math.inf, "above 0")
        self._demand("distillation", 0 <= self.distillation <= 1, "from 0 to 1")
        for option in ("rotation_degrees", "scaling", "shear", "shift_pixels"):
            self._demand(option, 0 <= getattr(self, option) < math.inf, "at least 0")
        self._demand("scaling", self.scaling < 1, "below 1")
        self._demand("averaging", 0 <= self.averaging < 1, "from 0 to below 1")

    def _demand(self, option: str, fits: bool, bounds: str) -> None:
        if not fits:
            why = f"it is {getattr(self, option)}; give a number {bounds}."
            raise PassRefused(self.name, option, why)

    @property
    def needs_training(self) -> bool:
        """Labelled samples must be there."""
        return True

    @property
    def augments(self) -> bool:
        """Whether images are changed at random."""
        return any((self.rotation_degrees, self.scaling, self.shear, self.shift_pixels))

    def requires(self, model: ir.Model, context: Context) -> None:
        """Refuse a model without logits, missing labels, and an environment without torch."""
        logits = logits_of(self.name, model)
        labelled_samples(self.name, model, context, classes(logits))
        if self.augments:
            self._demand_images(model)
        try:
            importlib.import_module("torch")
        except ImportError as error:
            why = (
                "it is not installed, and this pass trains with it; pip install 'edgepress[train]'."
            )
            raise PassRefused(self.name, "torch", why) from error

    def _demand_images(self, model: ir.Model) -> None:
        for value in model.graph.inputs:
            if len(shape_of(value)) != 4 or shape_of(value)[0] != 1 or not is_float(value):
                why = (
                    "rotation_degrees, scaling, shear and shift_pixels change images of shape "
                    f"[1, channels, height, width], and this input is {value.dtype} of shape "
                    f"{list(shape_of(value))}; set them to 0."
                )
                raise PassRefused(self.name, f"input {value.name!r}", why)


def logits_of(pass_name: str, model: ir.Model) -> ir.Value:
    """Return the value that holds a score per class, before a Softmax at the end.

    Raises:
        PassRefused: there are several outputs, or the output is no such value of floats.
    """
    if len(model.graph.outputs) != 1:
        names = ", ".join(value.name or "" for value in model.graph.outputs)
        why = (
            f"training needs one output, the logits, and the model has {names}; "
            "leave the others out when exporting it."
        )
        raise PassRefused(pass_name, "outputs", why)
    (output,) = model.graph.outputs
    shape, node = static_shape(output), output.producer()
    fits = shape is not None and shape[:1] == (1,) and math.prod(shape) == max(shape) > 1
    if not fits or not is_float(output) or node is None:
        known = "no fixed shape" if shape is None else f"shape {list(shape)}"
        why = (
            "training needs the logits of a classifier, floats of shape [1, classes], and this "
            f"output is {output.dtype} of {known}."
        )
        raise PassRefused(pass_name, f"output {output.name!r}", why)
    if node.domain or node.op_type not in _SOFTMAX:
        return output
    (logits,) = node.inputs
    assert shape is not None
    assert logits is not None
    axis = node.attributes.get_int("axis", -1)
    if shape[axis] != math.prod(shape):
        why = f"this {node.op_type} is over axis {axis}, which does not hold the classes."
        raise PassRefused(pass_name, f"node {node.name!r}", why)
    return logits


def classes(logits: ir.Value) -> int:
    """Return how many classes there are."""
    return math.prod(shape_of(logits))


def labelled_samples(
    pass_name: str, model: ir.Model, context: Context, class_count: int
) -> Samples:
    """Return the training samples, which have labels that the model knows.

    Raises:
        PassRefused: there are none, or a label is no class of the model.
        CalibrationError: they do not fit the model's inputs.
    """
    samples = context.training
    if samples is None or samples.labels is None:
        source = f" ({samples.source} holds no array `labels`)" if samples is not None else ""
        why = f"needs labelled training samples{source}; give some with --train DATA.npz."
        raise PassRefused(pass_name, "training samples", why)
    inputs = {value.name or "": value for value in model.graph.inputs}
    shapes = {name: shape_of(value) for name, value in inputs.items()}
    dtypes = {name: value.dtype.numpy() for name, value in inputs.items() if value.dtype}
    samples.demand(shapes, {name: np.dtype(dtype) for name, dtype in dtypes.items()})
    low, high = int(samples.labels.min()), int(samples.labels.max())
    if low < 0 or high >= class_count:
        why = (
            f"labels go from {low} to {high}, and the model tells {class_count} classes apart, "
            f"0 to {class_count - 1}; mend the labels."
        )
        raise PassRefused(pass_name, samples.source, why)
    return samples


def trainable(model: ir.Model) -> tuple[list[LayerTensor], list[tuple[str, str]]]:
    """Return the weights and biases of layers that training may change, and what it may not.

    Where something else reads one of them, too, the layers get a copy of their own.

    Returns:
        The tensors in order of execution, and layers that are left alone with the reason.
    """
    for tensor in _layer_tensors(model)[0]:
        replace(model.graph, tensor.value, tensor.readers, tensor.array, "trained")
    return _layer_tensors(model)


def _layer_tensors(model: ir.Model) -> tuple[list[LayerTensor], list[tuple[str, str]]]:
    # the same constant as a weight here and a bias there is two tensors
    found: dict[tuple[ir.Value, bool], list[Read]] = {}
    skipped = []
    for read in layer_reads(model.graph, biases=True):
        why = why_not(read.value, "train")
        if why or read.value is None:
            skipped.append((read.name, why))
        else:
            found.setdefault((read.value, read.bias), []).append(read)
    return [LayerTensor(value, reads) for (value, _), reads in found.items()], skipped
