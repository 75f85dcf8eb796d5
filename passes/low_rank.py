"""low-rank: replace layers by two or three narrow ones that compute nearly the same."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from edgepress.passes._candidates import (
    Candidate,
    candidates,
    is_factor,
    itself,
    largest_rank,
    methods_for,
    put,
    why_not,
)
from edgepress.passes._layer_models import LAYERS, layer_model, signature
from edgepress.passes._moments import Moments, input_moments, is_layer
from edgepress.passes._patterns import demand_match, demand_regular_expressions
from edgepress.passes._recovery import recover
from edgepress.passes._shapes import refresh_shapes, shape_of
from edgepress.passes.base import Context, LayerTimer, Outcome, Pass, PassRefused

ERROR = 0.1  # where no option says how much
GAIN = 0.97  # of the layer's own cost; what saves less is not worth its error
_HINT = f"`edgepress inspect` lists the names; layers are {', '.join(LAYERS)}."
_EVERY = ".*"
_METHODS = ("best", "channel", "spatial", "tucker")
_KEEP = ("faster", "smaller", "always")
_PARAMETERS, _MACS = "parameters", "multiply-accumulates"


@dataclass(frozen=True, kw_only=True)
class _Proposal:
    """A layer, and what competes for its place.

    Attributes:
        seen: whether the rivals were fitted to samples, or the weights alone decided.
    """

    node: ir.Node
    itself: Candidate
    rivals: Sequence[Candidate]
    seen: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class _Choice:
    """The best candidate for the place of a layer, and what both cost in some unit."""

    proposal: _Proposal
    best: Candidate
    before: float
    after: float
    unit: str


@dataclass(frozen=True, kw_only=True)
class LowRank(Pass):
    """Replace Conv, Gemm and MatMul layers by two or three narrow ones in a row.

    A layer of low rank first computes `rank` channels, then its outputs from those. `channel`
    splits a convolution into one with the same kernel and `rank` channels, and a 1×1; `spatial`
    into a k×1 and a 1×k; `tucker` into a 1×1, a narrower k×k and a 1×1. Gemm and MatMul become two.

    With calibration samples, the factors keep what the layer computes on them rather than its
    weights; biases take up the mean error, and what counts is how the output varies. Without
    samples the weights alone decide.

    Stats: layers that were `decomposed`; `candidates` that there were for all layers; and of the
    decomposed layers parameters, multiply-accumulates and measured cost, before and after.

    Attributes:
        layers: regular expressions; a layer is considered where one matches its whole name.
        method: "channel", "spatial", "tucker", or "best", which lets all of them compete.
        rank: the rank of every layer, and for tucker of both modes.
        energy: the share of its squared output that a layer keeps.
        error: how far a layer's output may be off, as a share of the output: `error = 0.1` is
            `energy = 0.99`. Of rank, energy and error, give one; without any, error is 0.1.
        align: ranks are rounded up to a multiple of it; unset takes as many as a vector of the
            target holds in float32.
        keep: "faster" replaces a layer where the best candidate takes at most 97 % of its time,
            measured on the target; "smaller" where one has fewer parameters; "always" takes the
            candidate with the fewest multiply-accumulates.
        recover: with samples, fit the factors once more when all layers are replaced, so that
            later ones make up for what earlier ones lost.
    """

    lossless: ClassVar[bool] = False

    layers: tuple[str, ...] = (_EVERY,)
    method: Literal["best", "channel", "spatial", "tucker"] = "best"
    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    align: int | None = None
    keep: Literal["faster", "smaller", "always"] = "faster"
    recover: bool = True

    def __post_init__(self) -> None:
        """Refuse what no model could make right."""
        given = [option for option in ("rank", "energy", "error") if self._given(option)]
        if len(given) > 1:
            why = "each of them sets the ranks; give only one."
            raise PassRefused(self.name, " and ".join(given), why)
        for option in ("rank", "align"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise PassRefused(self.name, option, f"it is {value}; it must be at least 1.")
        if self.energy is not None and not 0 < self.energy <= 1:
            why = f"it is {self.energy}; give a share above 0 and up to 1."
            raise PassRefused(self.name, "energy", why)
        if self.error is not None and not 0 <= self.error < 1:
            why = f"it is {self.error}; give a share from 0 to below 1."
            raise PassRefused(self.name, "error", why)
        for option, choices in (("method", _METHODS), ("keep", _KEEP)):
            if (value := getattr(self, option)) not in choices:
                why = f"it is {value!r}; choose one of {', '.join(map(repr, choices))}."
                raise PassRefused(self.name, option, why)
        if not self.layers:
            why = f"no pattern is given, so no layer is considered; {_EVERY!r} matches all."
            raise PassRefused(self.name, "layers", why)
        demand_regular_expressions(self.name, "layers", self.layers)

    @property
    def needs_timer(self) -> bool:
        """Whether candidates are measured."""
        return self.keep == "faster"

    def requires(self, model: ir.Model, context: Context) -> None:
        """Refuse a missing timer, patterns without a layer, and ranks that no layer can have."""
        if self.needs_timer and context.timer is None:
            raise PassRefused(
                self.name,
                "keep",
                'it is "faster", which only a measurement on the target can tell; '
                'give a target with -t, or set keep = "smaller".',
            )
        layers = _layers(model)
        for pattern in self.layers:
            if pattern != _EVERY:
                names = [node.name or "" for node in layers]
                demand_match(self.name, "layers", pattern, names, hint=_HINT)
            nodes = [node for node in layers if re.fullmatch(pattern, node.name or "")]
            self._demand_some(nodes, named=pattern != _EVERY)

    def call(self, model: ir.Model, context: Context) -> Outcome:
        """Propose candidates for all layers, measure them together, replace, and fit once more."""
        matched = [node for node in _layers(model) if self._is_asked(node)]
        left = {node: why for node in matched if (why := self._why_left(node))}
        nodes = [node for node in matched if node not in left]
        proposals = self._proposals(model, nodes, context)
        choices = self._choices(proposals, context.timer)
        taken = [choice for choice in choices if self._is_worth_it(choice)]
        left |= {c.proposal.node: _why_kept(c) for c in choices if c not in taken}
        notes = [*self._notes(nodes, context), *map(_describe, taken)]
        original = model.clone() if taken else model
        for choice in taken:
            put(choice.proposal.node, choice.best)
        if taken:
            refresh_shapes(model, self.name)
            notes += self._recover(original, model, context)
        return Outcome(
            model=model,
            modified=bool(taken),
            stats={
                "decomposed": len(taken),
                "candidates": sum(len(p.rivals) for p in proposals),
                **_sums(taken),
            },
            skipped=[(node.name or "", left[node]) for node in matched if node in left],
            notes=notes,
        )

    def _given(self, option: str) -> bool:
        return getattr(self, option) is not None

    def _is_asked(self, node: ir.Node) -> bool:
        """Tell whether a pattern matches a layer."""
        return any(re.fullmatch(pattern, node.name or "") for pattern in self.layers)

    def _demand_some(self, nodes: Sequence[ir.Node], *, named: bool) -> None:
        """Refuse a rank that a named layer, or every layer, cannot have; and names of none."""
        too_high = [node for node in nodes if not why_not(node) and self._why_no_rank(node)]
        # after an earlier run it is no mistake that nothing is left to do
        none = all(map(self._why_left, nodes)) and not any(map(is_factor, nodes))
        if too_high and (named or none):
            where, why = f"layer {too_high[0].name!r}", self._why_no_rank(too_high[0])
            todo = "give a lower rank, or leave the layer out of `layers`."
            raise PassRefused(self.name, where, f"{why}; {todo}")
        if named and none:
            where, why = f"layer {nodes[0].name!r}", self._why_left(nodes[0])
            raise PassRefused(self.name, where, f"{why}; leave the layer out of `layers`.")

    def _why_left(self, node: ir.Node) -> str:
        """Say why a layer has no candidates, or nothing."""
        if why := why_not(node):
            return why
        if not methods_for(node, self.method):
            kernel = "×".join(map(str, shape_of(node.inputs[1])[2:]))
            return f"a kernel of {kernel} has no {self.method} decomposition of its own"
        return self._why_no_rank(node)

    def _why_no_rank(self, node: ir.Node) -> str:
        """Say that the rank is more than a layer has, or nothing."""
        most = {name: largest_rank(node, name) for name in methods_for(node, self.method)}
        if self.rank is None or not most or self.rank <= max(most.values()):
            return ""
        limits = " and ".join(f"{rank} by {name}" for name, rank in most.items())
        return f"rank {self.rank} is more than its largest, {limits}"

    def _proposals(
        self, model: ir.Model, nodes: list[ir.Node], context: Context
    ) -> list[_Proposal]:
        """Decompose every layer by every method that there is for it."""
        align = self.align or max(context.simd_bytes // 4, 1)
        error = ERROR if self.error is None else self.error
        lost = error**2 if self.energy is None else 1 - self.energy
        proposals = []
        for number, (node, moments) in enumerate(self._measured(model, nodes, context), 1):
            methods = [
                name
                for name in methods_for(node, self.method)
                if self.rank is None or self.rank <= largest_rank(node, name)
            ]
            rivals = candidates(node, methods, moments, align=align, rank=self.rank, lost=lost)
            proposals.append(
                _Proposal(
                    node=node,
                    itself=itself(node),
                    rivals=list(rivals),
                    seen=moments is not None,
                )
            )
            context.progress("decompose layers", number, len(nodes))
        return proposals

    def _measured(
        self, model: ir.Model, nodes: list[ir.Node], context: Context
    ) -> Iterator[tuple[ir.Node, Moments | None]]:
        """Yield every layer with the moments of its input, where there are samples for them."""
        wanted = [node for node in nodes if context.samples is not None and is_layer(node)]
        found: Iterator[tuple[ir.Node, Moments]] = iter(())
        if wanted and context.samples is not None:
            found = input_moments(self.name, model, wanted, context.samples, context)
        for node in nodes:
            yield node, next(found)[1] if node in wanted else None

    def _choices(self, proposals: Sequence[_Proposal], timer: LayerTimer | None) -> list[_Choice]:
        """Find the best candidate for every layer."""
        if self.keep == "smaller":
            return [_choice(p, p.rivals, lambda c: c.parameters, _PARAMETERS) for p in proposals]
        if self.keep == "always" or timer is None:
            return [_choice(p, p.rivals, lambda c: c.macs, _MACS) for p in proposals]
        costs = _timed(proposals, timer)
        choices = []
        for proposal in proposals:
            rivals = [rival for rival in proposal.rivals if rival in costs]
            choices.append(
                _choice(proposal, rivals, costs.__getitem__, timer.unit)
                if rivals
                else _choice(proposal, proposal.rivals, lambda c: c.macs, _MACS)
            )
        return choices

    def _is_worth_it(self, choice: _Choice) -> bool:
        """Tell whether the best candidate takes the layer's place."""
        match self.keep:
            case "faster":
                return choice.after <= GAIN * choice.before
            case "smaller":
                return choice.after < choice.before
            case _:
                return True

    def _recover(self, original: ir.Model, model: ir.Model, context: Context) -> list[str]:
        """Fit the factors once more, and say what is left."""
        if not self.recover or context.samples is None:
            return []
        fit: Literal["least-squares"] = "least-squares"
        left = recover(self.name, original, model, {}, context.samples, context, method=fit)
        refresh_shapes(model, self.name)
        worst = sorted(left, key=lambda name: -left[name])[:3]
        listed = ", ".join(f"{name} {left[name]:.0%}" for name in worst)
        return [f"refitted by {fit}; the largest relative errors that are left: {listed}"]

    def _notes(self, nodes: Sequence[ir.Node], context: Context) -> list[str]:
        """Say what decided where the user did not."""
        notes = []
        if nodes and not any(map(self._given, ("rank", "energy", "error"))):
            notes.append(f"layers may be off by {ERROR:.0%} of their output; `error` sets a share")
        if nodes and context.samples is None:
            notes.append("the weights alone decided; give samples with --calib to keep outputs")
        elif wide := [node.name or "" for node in nodes if not is_layer(node)]:
            notes.append(
                f"too wide to look at samples, so their weights decided: {', '.join(wide)}"
            )
        return notes


def _layers(model: ir.Model) -> list[ir.Node]:
    """Return the layers of a model, in order."""
    return [node for node in model.graph if not node.domain and node.op_type in LAYERS]


def _timed(proposals: Sequence[_Proposal], timer: LayerTimer) -> dict[Candidate, float]:
    """Measure layers and candidates in one go, equal ones once.

    A candidate that multiplies as often as its layer cannot be faster with its extra pass through
    memory, so it is not measured; nor is a layer without any other candidate.
    """
    keys: dict[Candidate, str] = {}
    models: dict[str, ir.Model] = {}
    for proposal in proposals:
        rivals = [rival for rival in proposal.rivals if rival.macs < proposal.itself.macs]
        for rival in (proposal.itself, *rivals) if rivals else ():
            model = layer_model(proposal.node, rival.layers)
            keys[rival] = signature(model)
            models.setdefault(keys[rival], model)
    costs = timer(list(models.values())) if models else []
    measured = dict(zip(models, costs, strict=True))
    return {rival: measured[key] for rival, key in keys.items()}


def _choice(
    proposal: _Proposal, rivals: Sequence[Candidate], cost: Callable[[Candidate], float], unit: str
) -> _Choice:
    """Choose the candidate that costs least."""
    best = min(rivals, key=cost)
    before = cost(proposal.itself)
    return _Choice(proposal=proposal, best=best, before=before, after=cost(best), unit=unit)


def _why_kept(choice: _Choice) -> str:
    """Say why a layer stays."""
    verb = "has" if choice.unit in (_PARAMETERS, _MACS) else "takes"
    before, after = _amount(choice.before, choice.unit), _amount(choice.after, choice.unit)
    return f"the best, {choice.best.label}, {verb} {after}, the layer itself {before}"


def _describe(choice: _Choice) -> str:
    """Say what took the place of a layer, and why."""
    before, after = _amount(choice.before, choice.unit), _amount(choice.after, choice.unit)
    error = f"{'output' if choice.proposal.seen else 'weight'} error {choice.best.lost**0.5:.1%}"
    return f"{choice.proposal.node.name}: {choice.best.label}, {before} → {after}, {error}"


def _amount(value: float, unit: str) -> str:
    """Write a cost with its unit; whole numbers in full."""
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"


def _sums(taken: Sequence[_Choice]) -> dict[str, int | float]:
    """Add up what the replaced layers cost before and after."""
    sums: dict[str, int | float] = {
        "parameters_before": sum(choice.proposal.itself.parameters for choice in taken),
        "parameters_after": sum(choice.best.parameters for choice in taken),
        "macs_before": sum(choice.proposal.itself.macs for choice in taken),
        "macs_after": sum(choice.best.macs for choice in taken),
    }
    for unit in {choice.unit for choice in taken} - {_PARAMETERS, _MACS}:
        sums[f"{unit}_before"] = sum(choice.before for choice in taken)
        sums[f"{unit}_after"] = sum(choice.after for choice in taken)
    return sums
