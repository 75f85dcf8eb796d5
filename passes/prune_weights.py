"""prune-weights: set the weights of least magnitude to zero.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015, section 3,
without the training that follows there. Shapes stay as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from edgepress.passes._constants import Array, constant
from edgepress.passes._layer_tensors import LAYERS, replace, why_not
from edgepress.passes._patterns import demand_match, demand_regular_expressions
from edgepress.passes.base import Context, Outcome, Pass, PassRefused

_HINT = f"`edgepress inspect` lists the names; layers are {', '.join(LAYERS)}."
_RANKINGS = ("global", "lamp", "local")
_ALL = ".*"  # the pattern that a single amount stands for
NO_SPEED = "Zeros make the coded weights smaller; the kernels compute with them all the same."


@dataclass(frozen=True, eq=False)
class _Weight:
    """One weight and the layers that read it; the first of them says how it is laid out.

    Attributes:
        value: the initializer.
        layers: in order of execution.
        pool: `(amount, pattern)`; weights of one pool may be ranked together.
    """

    value: ir.Value
    layers: list[ir.Node]
    pool: tuple[float, str]

    @property
    def name(self) -> str:
        return self.layers[0].name or self.value.name or ""


@dataclass(frozen=True, kw_only=True)
class PruneWeights(Pass):
    """Set the weights of least magnitude to zero, one by one or in blocks.

    The zeros make the coded weights smaller; they make no kernel faster. It prunes the constant
    float weights of Conv, ConvTranspose, Gemm and MatMul (its second input), no biases. A weight
    that several layers share is pruned once, where all of them may be. Zeros that were there count.

    Stats: `weights` in the layers that were pruned; `zeros` among them; `sparsity`, their share.

    Attributes:
        amount: the share of weights that become zero, from 0 to below 1, rounded down to whole
            blocks; or a table from regular expressions over whole node names to shares: other
            layers stay as they are, and where several match, the least share counts.
        block: weights that are zeroed together: as many consecutive output channels of one group
            at the same input and tap; the last block of a row may be shorter. "simd" takes as many
            float32 as a vector of the target holds.
        ranking: "global" ranks all layers of one share together, by magnitude relative to the root
            mean square of the layer's weights; "lamp" does so by the square of each magnitude over
            the sum of the squares that are not below it in its layer (Lee et al., "Layer-adaptive
            sparsity for the magnitude-based pruning", 2021), which leaves small layers more;
            "local" takes the share out of every layer.
    """

    lossless: ClassVar[bool] = False

    amount: float | dict[str, float] = 0.5
    block: int | Literal["simd"] = 1
    ranking: Literal["global", "lamp", "local"] = "global"

    def __post_init__(self) -> None:
        """Refuse options out of bounds."""
        table = self.amount if isinstance(self.amount, dict) else {_ALL: self.amount}
        for pattern, amount in table.items():
            if not 0 <= amount < 1:
                where = f"amount of {pattern!r}" if table is self.amount else "amount"
                why = f"it is {amount}; give a share of at least 0 and below 1."
                raise PassRefused(self.name, where, why)
        demand_regular_expressions(self.name, "amount of", table)
        if not table:
            why = 'the table is empty; write a share, or a table such as {"conv.*" = 0.5}.'
            raise PassRefused(self.name, "amount", why)
        if self.block != "simd" and not (isinstance(self.block, int) and self.block >= 1):
            why = f"it is {self.block!r}; give a whole number of at least 1, or 'simd'."
            raise PassRefused(self.name, "block", why)
        if self.ranking not in _RANKINGS:
            why = f"it is {self.ranking!r}; choose 'global', 'lamp' or 'local'."
            raise PassRefused(self.name, "ranking", why)

    def requires(self, model: ir.Model, context: Context) -> None:  # noqa: ARG002
        """Refuse a pattern that matches no layer."""
        if not isinstance(self.amount, dict):
            return
        names = [node.name or "" for node in model.graph if node.op_type in LAYERS]
        for pattern in self.amount:
            demand_match(self.name, "amount of", pattern, names, hint=_HINT)

    def call(self, model: ir.Model, context: Context) -> Outcome:
        """Rank the blocks of every pool, then write the weights that change."""
        weights, skipped = self._weights(model)
        block = max(1, context.simd_bytes // 4) if self.block == "simd" else self.block
        pools: dict[object, dict[_Weight, Array]] = {}
        for index, weight in enumerate(weights):
            context.progress("rank weights", index, len(weights))
            scores = _scores(weight, block, self.ranking)
            pool = index if self.ranking == "local" else weight.pool
            pools.setdefault(pool, {})[weight] = scores
        shares: list[tuple[str, float]] = []
        total = zeros = 0
        modified = False
        for ranked in pools.values():
            for weight, mask in _least(ranked, block):
                array = _array(weight)
                pruned = np.where(mask, array.dtype.type(0), array)
                if np.any(pruned != array):
                    readers = {(node, 1) for node in weight.layers}
                    replace(model.graph, weight.value, readers, pruned, "pruned")
                    modified = True
                count = array.size - int(np.count_nonzero(pruned))
                shares.append((weight.name, count / array.size))
                total, zeros = total + array.size, zeros + count
        sparsity = round(zeros / total, 4) if total else 0.0
        return Outcome(
            model=model,
            modified=modified,
            stats={"weights": total, "zeros": zeros, "sparsity": sparsity},
            skipped=skipped,
            notes=[_sparsest(shares), NO_SPEED] if modified else [],
        )

    def _weights(self, model: ir.Model) -> tuple[list[_Weight], list[tuple[str, str]]]:
        """Return the weights to prune, in order of execution, and the layers left alone."""
        found: dict[ir.Value, list[ir.Node]] = {}
        skipped: list[tuple[str, str]] = []
        for node in model.graph:
            if node.op_type not in LAYERS:
                continue
            value = node.inputs[1]
            why = why_not(value, "prune")
            if value is None or why:
                skipped.append((node.name or node.op_type, why))
            else:
                found.setdefault(value, []).append(node)
        weights: list[_Weight] = []
        for value, layers in found.items():
            pools = [self._pool(node) for node in layers]
            known = [pool for pool in pools if pool is not None]
            if len(known) == len(layers):
                weights.append(_Weight(value, layers, min(known)))
                continue
            for node, pool in zip(layers, pools, strict=True):
                why = "its weights are shared with a layer that no pattern of `amount` matches"
                if pool is None:
                    why = "no pattern of `amount` matches it"
                skipped.append((node.name or node.op_type, why))
        return weights, skipped

    def _pool(self, node: ir.Node) -> tuple[float, str] | None:
        """Return the least amount that is asked of a layer with its pattern, or None."""
        if not isinstance(self.amount, dict):
            return self.amount, _ALL
        matching = (
            (amount, pattern)
            for pattern, amount in self.amount.items()
            if re.fullmatch(pattern, node.name or "")
        )
        return min(matching, default=None)


def _array(weight: _Weight) -> Array:
    array = constant(weight.value)
    assert array is not None
    return array


def _layout(node: ir.Node, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return a weight's shape as [rows, output channels, inputs and taps]; no block spans two rows.

    A row is a group of a Conv, or one input. The channels of a depthwise convolution lie in the
    same vectors, so they form one row.
    """
    groups = node.attributes.get_int("group", 1)
    if node.op_type == "Conv":
        rows = groups if shape[1] > 1 else 1
        return rows, shape[0] // rows, math.prod(shape[1:])
    if node.op_type == "ConvTranspose":
        depthwise = shape[0] == groups and shape[1] == 1
        return (1 if depthwise else shape[0]), shape[int(not depthwise)], math.prod(shape[2:])
    if node.op_type == "Gemm" and node.attributes.get_int("transB", 0) != 0:
        return 1, shape[0], shape[1]
    if len(shape) < 2:
        return math.prod(shape), 1, 1
    return math.prod(shape[:-1]), shape[-1], 1


def _sizes(weight: _Weight, block: int) -> Array:
    """Return how many weights each block of a row holds."""
    channels = _layout(weight.layers[0], _array(weight).shape)[1]
    return np.diff(np.arange(0, channels, block), append=channels)


def _scores(weight: _Weight, block: int, ranking: str) -> Array:
    """Return what blocks are ranked by: [rows, blocks, inputs and taps] float64, from 0 on.

    This is the mean magnitude of a block, made comparable between layers as `ranking` says.
    """
    array = _array(weight).astype(np.float64)
    rows, channels, rest = _layout(weight.layers[0], array.shape)
    scores: Array = np.abs(array).reshape(rows, channels, rest)
    if block > 1:
        sums = np.add.reduceat(scores, np.arange(0, channels, block), axis=1)
        scores = sums / _sizes(weight, block)[:, None]
    if ranking == "global":
        scores /= math.sqrt(np.mean(np.square(array))) or 1.0
    if ranking == "lamp":
        squares = np.square(scores).reshape(-1)
        order = np.argsort(squares, kind="stable")
        not_below = np.cumsum(squares[order][::-1])[::-1]
        squares[order] /= np.where(not_below > 0, not_below, 1.0)
        scores = squares.reshape(scores.shape)
    return scores


def _least(ranked: dict[_Weight, Array], block: int) -> Iterator[tuple[_Weight, Array]]:
    """Yield a mask for every weight of a pool, in its shape: the blocks of least score.

    Blocks are taken in ascending order of score, of equal scores the first, as long as they hold
    at most the pool's amount of all its weights.
    """
    amount = next(iter(ranked)).pool[0]
    # decimal, as 0.29 of 100 weights is 28.999… in binary
    target = int(Decimal(str(amount)) * sum(_array(weight).size for weight in ranked))
    sizes = {weight: _sizes(weight, block) for weight in ranked}
    scores = np.concatenate([score.reshape(-1) for score in ranked.values()])
    largest = max(int(size.max()) for size in sizes.values())
    if all(size.min() == largest for size in sizes.values()):
        chosen = _lowest(scores, target // largest)
    else:
        held = [np.broadcast_to(sizes[w][:, None], s.shape).reshape(-1) for w, s in ranked.items()]
        order = np.argsort(scores, kind="stable")
        sums = np.cumsum(np.concatenate(held)[order])
        chosen = np.zeros(scores.shape, bool)
        chosen[order[: np.searchsorted(sums, target, "right")]] = True
    start = 0
    for weight, score in ranked.items():
        mask = chosen[start : start + score.size].reshape(score.shape)
        yield weight, np.repeat(mask, sizes[weight], axis=1).reshape(_array(weight).shape)
        start += score.size


def _lowest(scores: Array, count: int) -> Array:
    """Return a mask of the `count` lowest scores, of equal ones the first, without a full sort."""
    if not count:
        return np.zeros(scores.shape, bool)
    # zeros apart, as np.partition takes long over many equal numbers
    rest = count - 1 - np.count_nonzero(scores == 0)
    limit = 0.0 if rest < 0 else np.partition(scores[scores > 0], rest)[rest]
    chosen: Array = scores < limit
    equal = np.flatnonzero(scores == limit)
    chosen[equal[: count - int(np.count_nonzero(chosen))]] = True
    return chosen


def _sparsest(shares: list[tuple[str, float]]) -> str:
    """Name the three layers with the largest shares of zeros."""
    top = sorted(shares, key=lambda item: -item[1])[:3]
    return f"Sparsest layers: {', '.join(f'{name} {share:.1%}' for name, share in top)}."
