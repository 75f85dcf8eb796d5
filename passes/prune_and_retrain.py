"""prune-and-retrain: set the weights of least magnitude to zero in rounds, and train the others.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015, section 3;
the sparsity rises as in Zhu and Gupta, "To prune, or not to prune", 2017, equation 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import onnx_ir as ir

from edgepress.passes._layer_tensors import LayerTensor
from edgepress.passes._training import TrainingPass, trainable
from edgepress.passes.base import Context, Outcome, PassRefused
from edgepress.passes.prune_weights import PruneWeights

if TYPE_CHECKING:
    from torch import Tensor

    from edgepress.passes._torch_graph import TorchGraph


@dataclass(frozen=True, kw_only=True)
class PruneAndRetrain(TrainingPass):
    """Prune weights in rounds, as prune-weights does, and train those that are left in between.

    Zeros that were there count and stay. Biases are trained and not pruned, and so are layers that
    no pattern matches. In round k of n, the sparsity is `amount · (1 - (1 - k/n)³)`.

    Stats: `weights` in the layers that were pruned; `zeros` among them; `sparsity`, their share;
    `training_loss` in the last epoch; `training_accuracy` afterwards.

    Attributes:
        amount: the share of weights that are zero in the end, from 0 to below 1; or a table from
            regular expressions over whole node names to shares, as for prune-weights.
        ranking: "global", "lamp" or "local", as for prune-weights.
        rounds: how often is pruned: 1 prunes all before the first epoch; a few with many epochs
            are the iterative pruning of Han et al.; many rise as smoothly as in Zhu and Gupta.
        pruning: share of the epochs over which the rounds are spread, from the first on; the rest
            trains at the final sparsity.
    """

    learning_rate: float = 0.03
    amount: float | dict[str, float] = 0.9
    ranking: Literal["global", "lamp", "local"] = "lamp"
    rounds: int = 50
    pruning: float = 0.5

    def __post_init__(self) -> None:
        """Refuse options out of bounds."""
        super().__post_init__()
        self._demand("rounds", self.rounds >= 1, "of at least 1")
        self._demand("pruning", 0 <= self.pruning <= 1, "from 0 to 1")
        self._last()

    def requires(self, model: ir.Model, context: Context) -> None:
        """Refuse what no pass can train, and a pattern that matches no layer."""
        super().requires(model, context)
        try:
            self._last().requires(model, context)
        except PassRefused as reason:
            raise PassRefused(self.name, reason.where, reason.why) from reason

    def call(self, model: ir.Model, context: Context) -> Outcome:
        """Train, pruning in rounds; the weights are written back into the model."""
        from edgepress.passes._training_loop import Trainer

        tensors, _ = trainable(model)  # pruning says why layers are left alone
        trainer = Trainer(self, model, context, tensors)
        method = _Masks(self, model, trainer.graph, tensors)
        trained = trainer.train(method)
        assert method.outcome is not None
        return Outcome(
            model=model,
            modified=True,
            stats=method.outcome.stats | trained.stats(),
            skipped=method.outcome.skipped,
            notes=method.outcome.notes,
        )

    def pruner(self, round_number: int) -> PruneWeights:
        """Return what prunes in this round, the first being 1."""
        rise = 1 - (1 - round_number / self.rounds) ** 3
        amount = self.amount
        scaled = (
            {pattern: share * rise for pattern, share in amount.items()}
            if isinstance(amount, dict)
            else amount * rise
        )
        return PruneWeights(amount=scaled, ranking=self.ranking)

    def _last(self) -> PruneWeights:
        """Return what prunes in the last round, with refusals in this pass's name."""
        try:
            return self.pruner(self.rounds)
        except PassRefused as reason:
            raise PassRefused(self.name, reason.where, reason.why) from reason


class _Masks:
    """Weights that are zero stay zero, and more join them in rounds.

    Attributes:
        variables: all that is trained; those of pruned weights no longer count.
        outcome: what the last round of pruning said.
    """

    def __init__(
        self,
        step: PruneAndRetrain,
        model: ir.Model,
        graph: TorchGraph,
        tensors: Sequence[LayerTensor],
    ) -> None:
        self._step, self._model, self._graph = step, model, graph
        self._weights = [tensor for tensor in tensors if not tensor.is_bias]
        self.variables = list(graph.parameters.values())
        self._rounds = 0
        self.outcome: Outcome | None = None
        self._masks: dict[str, Tensor] = {}  # the first round, before the first step, makes them

    def weights(self, variables: Sequence[Tensor]) -> dict[str, Tensor]:
        """Put zeros where weights are pruned."""
        import torch

        found = dict(zip(self._graph.parameters, variables, strict=True))
        # a product with the mask would leave zeros of either sign
        return found | {
            name: torch.where(mask, found[name], 0.0) for name, mask in self._masks.items()
        }

    def start_step(self, step: int, steps: int) -> None:
        """Prune where a round is due."""
        options = self._step
        spread = max(options.pruning * steps, 1)
        due = min(math.ceil(options.rounds * (step + 1) / spread), options.rounds)
        if due <= self._rounds:
            return
        self._rounds = due
        self._graph.write_back(self.weights(self.variables))
        self.outcome = options.pruner(due).call(self._model, Context())
        self._masks = self._nonzero()

    def _nonzero(self) -> dict[str, Tensor]:
        import torch

        return {t.value.name or "": torch.from_numpy(t.array != 0) for t in self._weights}
