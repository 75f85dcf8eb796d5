"""The loop that passes which train share: batches, loss, optimizer and schedule.

This module imports torch: import it inside functions only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from edgepress.passes._augmentation import distorted
from edgepress.passes._constants import Array
from edgepress.passes._layer_tensors import LayerTensor
from edgepress.passes._torch_graph import TorchGraph, sample_shape
from edgepress.passes._training import TrainingPass, classes, labelled_samples, logits_of
from edgepress.passes.base import Context, PassRefused

_EVALUATION_BATCH = 500
_LEAST_SIZE = 1e-3  # of biases that are all zero, as in Adafactor


class Method(Protocol):
    """How the weights of the graph follow from what the optimizer changes."""

    @property
    def variables(self) -> Sequence[Tensor]:
        """What the optimizer changes: leaves that require a gradient."""
        ...

    def weights(self, variables: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return weights of the graph by initializer name; the others stay as they are.

        Gradients flow through this into the variables. They may be `variables` or their average.
        """
        ...

    def start_step(self, step: int, steps: int) -> None:
        """Do what is due before step `step` of `steps`, the first being 0."""
        ...


@dataclass(frozen=True)
class Trained:
    """What training came to.

    Attributes:
        weights: of the graph by initializer name, which the model has by now.
        loss: mean over the samples of the last epoch.
        accuracy: share of the training samples that the trained model answers right.
    """

    weights: dict[str, Tensor]
    loss: float
    accuracy: float

    def stats(self) -> dict[str, float]:
        """Return the figures for the report."""
        return {
            "training_loss": round(self.loss, 5),
            "training_accuracy": round(self.accuracy, 5),
        }


class Trainer:
    """A model, the samples it is trained on, and the original as teacher.

    Attributes:
        graph: the model in torch; its parameters are the initializers that are trained.
    """

    def __init__(
        self, step: TrainingPass, model: ir.Model, context: Context, tensors: Iterable[LayerTensor]
    ) -> None:
        """Read the model and the samples.

        Args:
            step: its options.
            model: changes when training ends.
            context: has the samples, and the original.
            tensors: what is trained.

        Raises:
            PassRefused: a node cannot be trained through.
            CalibrationError: samples do not fit the model's inputs.
        """
        self._pass, self._progress = step, context.progress
        logits = logits_of(step.name, model)
        names = [tensor.value.name or "" for tensor in tensors]
        self.graph = TorchGraph(step.name, model, names, outputs=[logits])
        self._teacher: TorchGraph | None = None
        if step.distillation:
            original = (context.original or model).clone()
            wanted = logits_of(step.name, original)
            self._teacher = TorchGraph(step.name, original, [], outputs=[wanted])
        samples = labelled_samples(step.name, model, context, classes(logits))
        self._inputs = {
            value.name or "": _tensor(samples.inputs[value.name or ""]).reshape(
                -1, *sample_shape(value)
            )
            for value in model.graph.inputs
        }
        assert samples.labels is not None
        self._labels = _tensor(samples.labels).long()
        self._random = torch.Generator().manual_seed(step.seed)

    def train(self, method: Method) -> Trained:
        """Train, write the weights into the model, and measure.

        Raises:
            PassRefused: the loss is no longer a finite number.
        """
        step = self._pass
        variables = list(method.variables)
        groups = [{"params": [v], "size": _size(v)} for v in variables]
        optimizer = torch.optim.Adam(groups)
        count, batch_size = len(self._labels), min(step.batch_size, len(self._labels))
        steps = step.epochs * math.ceil(count / batch_size)
        average = _Average(step.averaging, variables)
        done, loss_sum = 0, 0.0
        for epoch in range(step.epochs):
            loss_sum, seen = 0.0, 0
            order = torch.randperm(count, generator=self._random)
            for chosen in order.split(batch_size):
                method.start_step(done, steps)
                rate = step.learning_rate * (1 + math.cos(math.pi * done / steps)) / 2
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["size"]
                loss = self._loss(method.weights(variables), chosen)
                number = float(loss.detach())
                if not math.isfinite(number):
                    why = (
                        f"the loss became {number} in epoch {epoch + 1}; lower it (it is "
                        f"{step.learning_rate:g}), or scale the samples as the model expects them."
                    )
                    raise PassRefused(step.name, "learning_rate", why)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                average.update(variables)
                loss_sum, seen, done = loss_sum + number * len(chosen), seen + len(chosen), done + 1
                what = f"epoch {epoch + 1} of {step.epochs}, loss {loss_sum / seen:.4f}"
                self._progress(what, done, steps)
        with torch.no_grad():
            weights = method.weights(average.variables(variables))
        self.graph.write_back(weights)
        return Trained(weights, loss_sum / count, self._accuracy(weights))

    def _loss(self, weights: Mapping[str, Tensor], chosen: Tensor) -> Tensor:
        """Return the mean loss of these samples."""
        batch = {name: array[chosen] for name, array in self._inputs.items()}
        if self._pass.augments:
            batch = {name: distorted(x, self._pass, self._random) for name, x in batch.items()}
        logits, labels = self._logits(self.graph, batch, weights), self._labels[chosen]
        loss = functional.cross_entropy(logits, labels)
        if self._teacher is None:
            return loss
        with torch.no_grad():
            wanted = self._logits(self._teacher, batch)
        share, temperature = self._pass.distillation, self._pass.temperature
        # the factor keeps gradients as large as those of the labels: Hinton et al., section 2
        soft = temperature**2 * functional.kl_div(
            functional.log_softmax(logits / temperature, 1),
            functional.log_softmax(wanted / temperature, 1),
            reduction="batchmean",
            log_target=True,
        )
        return (1 - share) * loss + share * soft

    def _accuracy(self, weights: Mapping[str, Tensor]) -> float:
        """Return the share of training samples that are answered right, without distortion."""
        right, count = 0, len(self._labels)
        with torch.no_grad():
            for chosen in torch.arange(count).split(_EVALUATION_BATCH):
                self._progress("training accuracy", int(chosen[0]), count)
                batch = {name: array[chosen] for name, array in self._inputs.items()}
                answers = self._logits(self.graph, batch, weights).argmax(1)
                right += int((answers == self._labels[chosen]).sum())
        return right / count

    @staticmethod
    def _logits(
        graph: TorchGraph, batch: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        (logits,) = graph.forward(batch, weights).values()
        return logits.flatten(1)


def _tensor(array: Array) -> Tensor:
    """Share the memory of an array, or copy one that is read-only, which torch warns of."""
    return torch.from_numpy(np.require(array, requirements="W"))


def _size(tensor: Tensor) -> float:
    """Return the root mean square of what is not zero, or the least that is taken for one."""
    found = tensor.detach()[tensor != 0]
    return max(math.sqrt(float(found.square().mean())) if len(found) else 0.0, _LEAST_SIZE)


class _Average:
    """An exponential moving average of the variables (Polyak and Juditsky, 1992).

    The decay rises from 0 as updates come in, so that the start is soon forgotten.
    """

    def __init__(self, decay: float, variables: Sequence[Tensor]) -> None:
        self._decay, self._updates = decay, 0
        self._means = [v.detach().clone() for v in variables] if decay else []

    def update(self, variables: Sequence[Tensor]) -> None:
        """Take in the variables after a step."""
        self._updates += 1
        decay = min(self._decay, self._updates / (self._updates + 10))
        for mean, variable in zip(self._means, variables, strict=False):
            mean.lerp_(variable.detach(), 1 - decay)

    def variables(self, last: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the averages, or the last variables where none are kept."""
        return self._means or [variable.detach() for variable in last]
