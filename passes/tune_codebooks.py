"""tune-codebooks: train the values that weights share, by their gradients summed per cluster.

Han, Mao and Dally, "Deep Compression", ICLR 2016, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgepress.passes._constants import Array
from edgepress.passes._layer_tensors import LayerTensor
from edgepress.passes._training import TrainingPass, trainable
from edgepress.passes.base import Context, Outcome, PassRefused

if TYPE_CHECKING:
    from torch import Tensor

_CODEBOOK = 256  # weights of up to as many values are taken for shared


@dataclass(frozen=True, kw_only=True)
class TuneCodebooks(TrainingPass):
    """Train shared weights: each value moves by the summed gradients of the weights that have it.

    It goes behind `share-weights`. The clusters are the distinct values of a weight tensor; a
    weight stays in its cluster, zeros stay zero, and no tensor gets more values than it had. So the
    coded size hardly changes. A tensor is taken for shared where it has at most 256 distinct
    values besides zero, or at most half as many as weights; others stay as they are. Biases are
    trained as well, shared ones as weights are.

    Stats: `tensors` whose weights are shared; `values`, the trained distinct values of all of them;
    `training_loss` in the last epoch; `training_accuracy` afterwards.
    """

    epochs: int = 5

    def call(self, model: ir.Model, context: Context) -> Outcome:
        """Find the clusters, train their values, and write them back."""
        from edgepress.passes._training_loop import Trainer

        tensors, skipped = trainable(model)
        shared, tuned = [], []
        for tensor in tensors:
            if tensor.is_bias:
                tuned.append(tensor)
            elif _is_shared(tensor.array):
                tuned.append(tensor)
                shared.append(tensor)
            else:
                why = "its weights are not shared; put share-weights before this pass"
                skipped.append((tensor.name, why))
        if not shared:
            why = (
                "no layer has weights that share few distinct values; "
                "put share-weights before this pass."
            )
            raise PassRefused(self.name, "weights", why)
        values = sum(_count(tensor.array) for tensor in shared)
        trainer = Trainer(self, model, context, tuned)
        trained = trainer.train(_Codebooks(tuned))
        stats = {"tensors": len(shared), "values": values}
        return Outcome(model=model, modified=True, stats=stats | trained.stats(), skipped=skipped)


def _count(array: Array) -> int:
    """Count the distinct values besides zero."""
    return len(np.unique(array[array != 0]))


def _is_shared(array: Array) -> bool:
    return 0 < _count(array) <= max(_CODEBOOK, int(np.count_nonzero(array)) // 2)


class _Codebooks:
    """The distinct values of tensors, and which of them each weight has.

    The values are float64, so that the sum of many gradients loses nothing.
    """

    def __init__(self, tensors: Sequence[LayerTensor]) -> None:
        import torch

        self._names = [tensor.value.name or "" for tensor in tensors]
        self.variables: list[Tensor] = []
        self._clusters: list[Tensor] = []
        self._zeros: list[Tensor] = []
        for tensor in tensors:
            values, clusters = np.unique(tensor.array.astype(np.float64), return_inverse=True)
            self.variables.append(torch.tensor(values, requires_grad=True))
            self._clusters.append(torch.tensor(clusters.reshape(tensor.array.shape)))
            self._zeros.append(torch.tensor(values == 0))

    def weights(self, variables: Sequence[Tensor]) -> dict[str, Tensor]:
        """Give every weight the value of its cluster."""
        import torch

        found = {}
        parts = zip(self._names, variables, self._clusters, self._zeros, strict=True)
        for name, values, clusters, zeros in parts:
            fixed = torch.where(zeros, 0.0, values)
            found[name] = (
                fixed.index_select(0, clusters.reshape(-1)).reshape(clusters.shape).float()
            )
        return found

    def start_step(self, step: int, steps: int) -> None:
        """Nothing is due."""
