"""share-weights: let the weights of a layer share a few values, or a few words of values.

Han, Mao and Dally, "Deep Compression", 2016, section 3, without the training of the shared values
that follows there. Shapes stay as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array
from edgepress.passes._codebook_budget import BudgetTooSmall, Item, fits_within
from edgepress.passes._codebooks import Block, coded_bits
from edgepress.passes._curvature import Curvature, output_curvature
from edgepress.passes._kmeans import VALUE_BITS, Fit, Line
from edgepress.passes._layer_tensors import LAYERS, LayerTensor, Read, layer_reads, replace, why_not
from edgepress.passes._patterns import demand_match, demand_regular_expressions
from edgepress.passes._word_kmeans import Words
from edgepress.passes.base import Context, Outcome, Pass, PassRefused

#: Where no option says how many; with zero, they make the 256 symbols that coded weights may have.
CLUSTERS = 255
_MOST_CLUSTERS = 2**16
_DRAWS = 3
_HINT = f"`edgepress inspect` lists the names; layers are {', '.join(LAYERS)}."
_INITS = ("k-means++", "linear", "density", "forgy")
_WORD_INITS = ("k-means++", "forgy")


@dataclass(frozen=True, kw_only=True)
class _Report:
    """What became of one tensor.

    Attributes:
        codebooks: how many it has; 0 where they make it no smaller.
        clusters: entries of them all.
        bits: the estimate of what it takes.
        lost: its share in the relative error of all.
        relative_error: the squared change of its weights, relative to their squares.
    """

    name: str
    weights: int
    codebooks: int
    clusters: int
    bits: float
    lost: float
    relative_error: float


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    """One tensor to share.

    Attributes:
        number: of the tensor among all.
        vector: outputs that share a codeword.
        channels: outputs that share a codebook, 0 for all.
        curvature: of all tensors, or None.
        tensors: how many there are.
    """

    tensor: LayerTensor
    number: int
    vector: int
    channels: int
    curvature: Curvature | None
    tensors: int

    @cached_property
    def rows(self) -> Array:
        """The weights as `[out, rest]`."""
        return self.tensor.rows()

    @property
    def energy(self) -> float:
        """The sum of squared weights."""
        return float(np.square(self.rows, dtype=np.float64).sum())

    @property
    def worth(self) -> float:
        """What one unit of weighted squared error adds to the relative error of all."""
        if self.curvature is not None:
            return 1 / (self.curvature.energy or 1.0)
        return 1 / ((self.energy or 1.0) * self.tensors)

    def diagonal(self) -> Array | None:
        """Return the curvature as `[out, rest]`, or None where it does not count."""
        if self.curvature is None:
            return None
        return self.tensor.rows_of(self.curvature.diagonals[self.tensor.value])

    def blocks(self) -> Iterator[Block]:
        """Yield the rows of every codebook."""
        diagonal = self.diagonal()
        step = self.channels or len(self.rows)
        for start in range(0, len(self.rows), step):
            part = slice(start, start + step)
            yield Block(self.rows[part], None if diagonal is None else diagonal[part], self.vector)

    def report(self, rows: Array) -> _Report:
        """Compare shared rows with what they were."""
        square = np.square(rows.astype(np.float64) - self.rows)
        diagonal = self.diagonal()
        weighted = float((square if diagonal is None else square * diagonal).sum())
        step = self.channels or len(rows)
        blocks = [rows[start : start + step] for start in range(0, len(rows), step)]
        coded = [coded_bits(block, self.vector) for block in blocks]
        bits, raw = sum(bits for bits, _ in coded), VALUE_BITS * rows.size
        smaller = bits < raw
        return _Report(
            name=self.tensor.name,
            weights=rows.size,
            codebooks=len(blocks) if smaller else 0,
            clusters=sum(clusters for _, clusters in coded) if smaller else 0,
            bits=bits if smaller else raw,
            lost=weighted * self.worth,
            relative_error=float(square.sum()) / (self.energy or 1.0),
        )


@dataclass(frozen=True, kw_only=True)
class ShareWeights(Pass):
    """Cluster the weights of every layer, and give each weight the value of its cluster.

    It shares the constant float weights of Conv, ConvTranspose, Gemm and MatMul (its second input).
    Coded weights then take an index each, and the few values; the graph stays as it is, and the
    kernels compute as before. Weights that are zero stay zero, which counts as no cluster. A tensor
    that several layers read is shared once, where all of them may be.

    With a budget in place of a number of clusters, all codebooks are chosen together: an error is
    allowed where it saves most bits. A weight then does not always take the nearest value, but may
    take one that many others have, whose code is shorter.

    Stats: `weights`; `codebooks`; `clusters`, entries of all codebooks; `bits_per_weight` and
    `size_bytes`, an estimate from zero-order entropies of what they take coded, codebooks and zeros
    included; `relative_error`.

    Attributes:
        clusters: how many values each codebook has; or a table from regular expressions over whole
            node names to such numbers: other layers stay as they are, and where several match, the
            largest number counts. Without this and a budget, 255: with zero, 256 symbols.
        size_budget_bytes: instead: the size that the estimate may not exceed.
        max_error: instead: the largest relative error. It is the mean over tensors of the squared
            change of the weights, relative to their squares; with curvature, the squared change of
            the outputs that the curvature predicts, relative to their squares.
        init: where clusters start: "k-means++", "forgy" (weights drawn at random), "density" (equal
            shares of the weights) or "linear" (equal steps from the least to the largest).
        weighting: "curvature" weighs a weight's error by how much it changes the outputs on the
            samples.
        codebook_channels: output channels that share a codebook; 0 gives each tensor one. Kernels
            read weights in blocks of output channels, so multiples of 32 cost nothing beyond the
            codebooks.
        vector: of Gemm and MatMul, so many consecutive outputs share one word of a codebook; other
            layers stay as they are where it is above 1.
        bias_clusters: share the biases as well, each with up to so many values of its own; 0 leaves
            them as they are.
        seed: of "k-means++", "forgy" and the curvature.
    """

    lossless: ClassVar[bool] = False

    clusters: int | dict[str, int] | None = None
    size_budget_bytes: int | None = None
    max_error: float | None = None
    init: Literal["k-means++", "linear", "density", "forgy"] = "k-means++"
    weighting: Literal["none", "curvature"] = "none"
    codebook_channels: int = 0
    vector: int = 1
    bias_clusters: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse options out of bounds, and several that exclude each other."""
        given = [o for o in ("clusters", "size_budget_bytes", "max_error") if self._given(o)]
        if len(given) > 1:
            why = "each of them says how many clusters there are; give only one."
            raise PassRefused(self.name, " and ".join(given), why)
        if isinstance(self.clusters, dict):
            demand_regular_expressions(self.name, "clusters of", self.clusters)
            if not self.clusters:
                why = 'the table is empty; write a number, or a table such as {"conv.*" = 32}.'
                raise PassRefused(self.name, "clusters", why)
            for pattern, clusters in self.clusters.items():
                self._demand(f"clusters of {pattern!r}", clusters, 1, _MOST_CLUSTERS)
        else:
            self._demand("clusters", self.clusters, 1, _MOST_CLUSTERS)
        self._demand("size_budget_bytes", self.size_budget_bytes, 1)
        self._demand("bias_clusters", self.bias_clusters, 0, _MOST_CLUSTERS)
        self._demand("codebook_channels", self.codebook_channels, 0)
        self._demand("vector", self.vector, 1)
        if self.max_error is not None and not 0 < self.max_error < math.inf:
            why = f"it is {self.max_error}; it must be above 0."
            raise PassRefused(self.name, "max_error", why)
        inits = _INITS if self.vector == 1 else _WORD_INITS
        for option, choices in (("init", inits), ("weighting", ("none", "curvature"))):
            if (value := getattr(self, option)) not in choices:
                where = f" with vector = {self.vector}" * (value in _INITS)
                why = f"it is {value!r}{where}; choose one of {', '.join(map(repr, choices))}."
                raise PassRefused(self.name, option, why)
        if self.codebook_channels % self.vector:
            why = f"it is {self.codebook_channels}; make it a multiple of vector, {self.vector}."
            raise PassRefused(self.name, "codebook_channels", why)

    @property
    def needs_samples(self) -> bool:
        """Whether curvature is measured."""
        return self.weighting == "curvature"

    def requires(self, model: ir.Model, context: Context) -> None:
        """Refuse missing samples, and a pattern that matches no layer."""
        if self.needs_samples and not context.samples:
            why = 'it is "curvature", which needs samples; give them with --calib.'
            raise PassRefused(self.name, "weighting", why)
        if isinstance(self.clusters, dict):
            names = [node.name or "" for node in model.graph if node.op_type in LAYERS]
            for pattern in self.clusters:
                demand_match(self.name, "clusters of", pattern, names, hint=_HINT)

    def call(self, model: ir.Model, context: Context) -> Outcome:
        """Cut tensors into blocks, fit codebooks, and write the weights that change."""
        tensors, skipped = self._tensors(model.graph)
        curvature = None
        if self.weighting == "curvature" and tensors:
            values = [tensor.value for tensor in tensors]
            curvature = output_curvature(self.name, model, values, context, self.seed)
        jobs = [
            _Job(
                tensor=tensor,
                number=number,
                vector=1 if tensor.is_bias else self.vector,
                channels=self.codebook_channels,
                curvature=curvature,
                tensors=len(tensors),
            )
            for number, tensor in enumerate(tensors)
        ]
        if self.size_budget_bytes is None and self.max_error is None:
            shared = self._by_number(jobs, context)
        else:
            shared = self._by_budget(jobs, context)
        reports, modified = [], False
        for job, rows in shared:
            reports.append(job.report(rows))
            if not np.array_equal(rows, job.rows):
                modified = True
                array, readers = job.tensor.from_rows(rows), job.tensor.readers
                replace(model.graph, job.tensor.value, readers, array, "shared")
        return Outcome(
            model=model,
            modified=modified,
            stats=_stats(reports),
            skipped=skipped,
            notes=self._notes(reports) if modified else [],
        )

    def _tensors(self, graph: ir.Graph) -> tuple[list[LayerTensor], list[tuple[str, str]]]:
        """Return what to share, in order of execution, and what is left alone."""
        found: dict[ir.Value, list[Read]] = {}
        skipped: list[tuple[str, str]] = []
        for read in layer_reads(graph, biases=self.bias_clusters > 0):
            if (why := self._why_not(read)) or read.value is None:
                skipped.append((read.name, why))
            else:
                found.setdefault(read.value, []).append(read)
        tensors: list[LayerTensor] = []
        for value, reads in found.items():
            known = [self._clusters(read.layer) is not None for read in reads]
            if all(known):
                tensors.append(LayerTensor(value, reads))
                continue
            for read, matched in zip(reads, known, strict=True):
                why = "its weights are shared with a layer that no pattern of `clusters` matches"
                if not matched:
                    why = "no pattern of `clusters` matches it"
                skipped.append((read.name, why))
        return tensors, skipped

    def _why_not(self, read: Read) -> str:
        """Say why these weights cannot be shared, or nothing."""
        if (why := why_not(read.value, "share")) or read.value is None:
            return why
        tensor = LayerTensor(read.value, [read])
        array = tensor.array
        if not np.isfinite(array).all():
            return "some of its weights are NaN or infinite"
        if self.vector == 1 or read.bias:
            return ""
        if read.layer.op_type not in ("Gemm", "MatMul") or array.ndim != 2:
            return "words of several outputs are for Gemm and MatMul with two axes"
        rows = tensor.rows()
        if len(rows) % self.vector:
            return f"its {len(rows)} outputs are no multiple of vector, {self.vector}"
        if mixed := Block(rows, None, self.vector).mixed:
            return (
                f"{mixed} of its words are zero in places; "
                f"let prune-weights zero whole words, with block = {self.vector}"
            )
        return ""

    def _clusters(self, node: ir.Node) -> int | None:
        """Return how many clusters a layer gets where no budget says it, None for no layer."""
        if not isinstance(self.clusters, dict):
            return self.clusters or CLUSTERS
        matching = (
            clusters
            for pattern, clusters in self.clusters.items()
            if re.fullmatch(pattern, node.name or "")
        )
        return max(matching, default=None)

    def _fit(
        self, job: _Job, block: int, points: Line | Words, clusters: int, draws: int = 1
    ) -> Fit:
        """Return a codebook, of several draws the best."""
        rng = np.random.default_rng([self.seed, job.number, block, clusters])
        match self.init:
            case "k-means++":
                starts = [points.plus_plus(clusters, rng) for _ in range(draws)]
            case "forgy":
                starts = [points.forgy(clusters, rng) for _ in range(draws)]
            case "linear":
                assert isinstance(points, Line)
                starts = [points.linear(clusters)]
            case "density":
                assert isinstance(points, Line)
                starts = [points.density(clusters)]
        return min(map(points.lloyd, starts), key=lambda fit: fit.error)

    def _by_number(self, jobs: Sequence[_Job], context: Context) -> Iterator[tuple[_Job, Array]]:
        """Yield the shared rows of every tensor, by its number of clusters."""
        for done, job in enumerate(jobs, 1):
            asked = max(self._clusters(read.layer) or 0 for read in job.tensor.reads)
            clusters = self.bias_clusters if job.tensor.is_bias else asked
            blocks = []
            for number, block in enumerate(job.blocks()):
                points = block.points() if block.size else None
                if points is None or points.distinct <= clusters:
                    blocks.append(block.rows)
                else:
                    blocks.append(block.shared(self._fit(job, number, points, clusters, _DRAWS)))
            yield job, np.concatenate(blocks)
            context.progress("share weights", done, len(jobs))

    def _by_budget(self, jobs: Sequence[_Job], context: Context) -> Iterator[tuple[_Job, Array]]:
        """Yield the shared rows of every tensor, all chosen together."""
        blocks = [(job, number, block) for job in jobs for number, block in enumerate(job.blocks())]
        items = {}
        for job, number, block in blocks:
            if block.size:
                points = block.points()
                items[block] = Item(
                    points=points,
                    fit=partial(self._fit, job, number, points),
                    worth=job.worth,
                    raw_bits=VALUE_BITS * block.rows.size,
                    zero_bits=block.zero_bits,
                    most=self.bias_clusters if job.tensor.is_bias else CLUSTERS,
                )
        bits = None if self.size_budget_bytes is None else 8 * self.size_budget_bytes
        try:
            fits = fits_within(
                list(items.values()), bits=bits, error=self.max_error, progress=context.progress
            )
        except BudgetTooSmall as error:
            why = (
                f"it is {self.size_budget_bytes}, and one cluster for each codebook takes "
                f"{math.ceil(error.bits / 8)} already; raise it."
            )
            raise PassRefused(self.name, "size_budget_bytes", why) from error
        chosen = dict(zip(items, fits, strict=True))
        for job in jobs:
            rows = []
            for owner, _, block in blocks:
                if owner is job:
                    fit = chosen.get(block)
                    rows.append(block.rows if fit is None else block.shared(fit))
            yield job, np.concatenate(rows)

    def _notes(self, reports: Sequence[_Report]) -> list[str]:
        """Say what was chosen, and where the error is largest."""
        notes = []
        if not any(map(self._given, ("clusters", "size_budget_bytes", "max_error"))):
            notes.append(
                f"Every codebook has up to {CLUSTERS} values; `clusters` sets another number."
            )
        top = sorted(reports, key=lambda report: -report.relative_error)[:3]
        listed = ", ".join(f"{report.name} {report.relative_error:.2%}" for report in top)
        notes.append(f"Largest relative squared errors of weights: {listed}.")
        if self._given("size_budget_bytes") or self._given("max_error"):
            order = sorted((r for r in reports if r.codebooks), key=lambda r: r.clusters)
            if order:
                few, many = order[0], order[-1]
                notes.append(
                    f"From {few.clusters} clusters in {few.name} to {many.clusters} in {many.name}."
                )
            if left := [report.name for report in reports if not report.codebooks]:
                notes.append(f"Left as they were: {', '.join(left)}.")
        return notes

    def _given(self, option: str) -> bool:
        return getattr(self, option) is not None

    def _demand(self, where: str, value: int | None, least: int, most: float = math.inf) -> None:
        """Refuse a number out of bounds."""
        if value is not None and not least <= value <= most:
            limits = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise PassRefused(self.name, where, f"it is {value}; it must be {limits}.")


def _stats(reports: Sequence[_Report]) -> dict[str, int | float]:
    """Add up what became of all tensors."""
    weights = sum(report.weights for report in reports)
    bits = sum(report.bits for report in reports)
    return {
        "weights": weights,
        "codebooks": sum(report.codebooks for report in reports),
        "clusters": sum(report.clusters for report in reports),
        "bits_per_weight": round(bits / weights, 4) if weights else 0.0,
        "size_bytes": math.ceil(bits / 8),
        "relative_error": float(f"{sum(report.lost for report in reports):.4g}"),
    }
