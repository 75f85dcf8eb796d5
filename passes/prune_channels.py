"""prune-channels: remove the channels that matter least, with everything that hangs on them.

Channels are removed from the graph, not zeroed: what remains is an ordinary, smaller model. Widths
stay multiples of the target's vector width, without which fewer channels are no faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from edgepress.calibration.base import Array, CalibrationError
from edgepress.calibration.importance.base import Importance, importance
from edgepress.passes._channel_axes import Axes, Group, Ids
from edgepress.passes._channel_choice import (
    Candidate,
    Macs,
    candidates,
    local,
    local_macs,
    ranked,
    ranked_macs,
    shrinkable,
)
from edgepress.passes._channel_evidence import collect
from edgepress.passes._channels import analyse, cut
from edgepress.passes._macs import macs_after
from edgepress.passes._patterns import demand_match, demand_regular_expressions
from edgepress.passes._recovery import Kept, recover
from edgepress.passes.analysis import changed_layers
from edgepress.passes.base import (
    Context,
    LayerTimer,
    Outcome,
    Pass,
    PassRefused,
    refresh_shapes,
)
from edgepress.passes.fold_batch_norm import GAMMA

#: Of a layer's own cost, and of the cost of all: what takes less is faster, or does not matter.
NOT_FASTER, LEAST_SHARE = 0.97, 0.01
_FROM_SAMPLES = frozenset({"contributions", "first_order"})


@dataclass(frozen=True, kw_only=True)
class PruneChannels(Pass):
    """Remove whole channels, attention heads and hidden units.

    Channels that must be cut together, through residual additions, concatenations, depthwise
    convolutions and so on, are found first (`edgepress inspect MODEL --channels` prints them). An
    operator that is not known to the analysis keeps every channel it touches.

    Stats: `groups` cut; `channels` cut; `channels_before`; `macs_before` and `macs_after`.

    Attributes:
        amount: the share to remove, from 0 to below 1; or a table from regular expressions, which
            match a node's whole name, to the share of those layers' channels.
        of: what the share is of: "channels", or "macs", the multiply-accumulates of the model.
        ranking: "global" compares channels of all groups, each group's scores divided by their
            mean, and for "macs" by the work that goes with them; no group is emptied far beyond
            the others. "local" removes the same share of every group. A table of amounts is local.
        importance: which channels matter least: "l1", "l2", "batch_norm", "geometric_median" or
            "random"; with samples also "thinet" and "taylor".
        align: what remains of a layer is a multiple of this many channels, or all of them; unset
            takes as many as a vector of the target holds in float32.
        min_channels: no group keeps fewer.
        recover: what is done to the layers that remain, without labels: "least-squares" refits
            their weights to what they computed before, "bias" only the mean of every channel,
            "none" nothing; "auto" is "least-squares" where there are samples, else "none".
        seed: of "random", and of the projections of "taylor".
        measure: measure every layer that changed on the target, before and after, and name those
            that are not faster.
    """

    lossless: ClassVar[bool] = False

    amount: float | dict[str, float] = 0.3
    of: Literal["channels", "macs"] = "channels"
    ranking: Literal["global", "local"] = "global"
    importance: str = "l1"
    align: int | None = None
    min_channels: int = 1
    recover: Literal["auto", "none", "bias", "least-squares"] = "auto"
    seed: int = 0
    measure: bool = False

    def __post_init__(self) -> None:
        """Refuse what no model could make right."""
        amounts = self.amount.values() if isinstance(self.amount, dict) else [self.amount]
        for amount in amounts:
            if not 0 <= amount < 1:
                why = "which would empty a group" if amount >= 1 else "which is no share"
                raise PassRefused(
                    self.name, "amount", f"it is {amount:g}, {why}; give 0 to below 1."
                )
        if not amounts:
            why = 'the table is empty; write a share, or a table such as {"conv.*" = 0.5}.'
            raise PassRefused(self.name, "amount", why)
        if isinstance(self.amount, dict):
            demand_regular_expressions(self.name, "amount of", self.amount)
        if isinstance(self.amount, dict) and self.of == "macs":
            raise PassRefused(
                self.name, "of", "'macs' takes a single amount for the whole model; give a number."
            )
        for name, least in (("align", 1), ("min_channels", 1), ("seed", 0)):
            if (given := getattr(self, name)) is not None and given < least:
                raise PassRefused(self.name, name, f"it is {given}; it must be at least {least}.")
        self._importance()

    @property
    def needs_samples(self) -> bool:
        """Whether the importance or the recovery that was asked for looks at samples."""
        asked = self.recover in ("bias", "least-squares")
        return asked or bool(self._importance().needs & _FROM_SAMPLES)

    @property
    def needs_timer(self) -> bool:
        """Whether layers are measured."""
        return self.measure

    def requires(self, model: ir.Model, context: Context) -> None:  # noqa: ARG002
        """Refuse to measure without a target."""
        if self.measure and context.timer is None:
            why = "only a target can tell what is faster; give one with -t, or leave this out."
            raise PassRefused(self.name, "measure", why)

    def call(self, model: ir.Model, context: Context) -> Outcome:
        """Find the groups, rank their channels, cut, and recover."""
        axes = analyse(model)
        cuts, skipped = self._plan(model, axes, context)
        groups, macs = axes.groups(), macs_after(model, axes)
        stats: dict[str, int | float] = {
            "groups": sum(bool(np.isin(group.channels, cuts).any()) for group in groups),
            "channels": len(cuts),
            "channels_before": sum(len(group.channels) for group in groups),
            "macs_before": round(macs(np.empty(0, np.int64))),
            "macs_after": round(macs(cuts)),
        }
        notes = self._notes(stats, skipped)
        if not len(cuts):
            return Outcome(model=model, modified=False, stats=stats, skipped=skipped, notes=notes)
        original = model.clone()
        kept = _kept(model, axes, cuts)
        cut(model, axes, cuts.tolist())
        _forget_gammas(model)
        refresh_shapes(model, self.name)
        notes += self._recover(original, model, kept, context)
        if self.measure and context.timer is not None:
            notes += _measured(original, model, context.timer, stats)
        return Outcome(model=model, modified=True, stats=stats, skipped=skipped, notes=notes)

    def _notes(self, stats: dict[str, int | float], skipped: list[tuple[str, str]]) -> list[str]:
        """Say where less could be cut than was asked for."""
        if not stats["channels"] and self.amount and skipped:
            return [f"no channel could be cut: {skipped[-1][0]}: {skipped[-1][1]}."]
        if self.of == "channels" or isinstance(self.amount, dict) or not stats["macs_before"]:
            return []
        saved = 1 - stats["macs_after"] / stats["macs_before"]
        if saved >= self.amount - 1e-9:
            return []
        return [
            f"only {saved:.0%} of the multiply-accumulates could be cut, {self.amount:.0%} were "
            "asked for; `align` and `min_channels` keep the rest, and the layers that are skipped."
        ]

    def _plan(
        self, model: ir.Model, axes: Axes, context: Context
    ) -> tuple[Ids, list[tuple[str, str]]]:
        """Return the channels to cut, and the groups that stay whole with the reason."""
        groups = axes.groups()
        amounts = self._amounts(groups)
        align = self.align or max(1, context.simd_bytes // 4)
        skipped = [(name, f"{op} has no rule for channels") for name, op in axes.unknown]
        chosen: list[tuple[Group, float]] = []
        for group, amount in zip(groups, amounts, strict=True):
            if amount is None:
                continue
            if shrinkable(group, align, self.min_channels):
                self._demand_rest(group, amount)
                chosen.append((group, amount))
            else:
                skipped.append((group.name, _why_not(group, align)))
        scored = self._scored(model, [group for group, _ in chosen], context, skipped)
        ranking = candidates(
            list(scored), list(scored.values()), axes.parts, align, self.min_channels
        )
        asked = [amount for group, amount in chosen if group in scored]
        return self._choose(ranking, asked, macs_after(model, axes)), skipped

    def _scored(
        self,
        model: ir.Model,
        groups: list[Group],
        context: Context,
        skipped: list[tuple[str, str]],
    ) -> dict[Group, Array]:
        """Score the channels of every group; those that cannot be scored are skipped."""
        measure = self._importance()
        evidence = collect(self.name, model, groups, measure, context, self.seed)
        scored: dict[Group, Array] = {}
        why = ""
        for group, known in zip(groups, evidence, strict=True):
            try:
                scored[group] = measure.score(known)
            except CalibrationError as error:
                why = str(error)
                skipped.append((group.name, why))
        if groups and not scored:
            raise PassRefused(self.name, f"importance {self.importance!r}", why)
        return scored

    def _choose(self, ranking: list[Candidate], amounts: list[float], macs: Macs) -> Ids:
        """Return the channels to cut."""
        if isinstance(self.amount, dict):
            return local(ranking, amounts)
        if self.of == "macs":
            choose = ranked_macs if self.ranking == "global" else local_macs
            return choose(ranking, self.amount, macs)
        if self.ranking == "global":
            return ranked(ranking, self.amount)
        return local(ranking, amounts)

    def _importance(self) -> Importance:
        try:
            return importance(self.importance)
        except CalibrationError as error:
            raise PassRefused(self.name, "importance", str(error)) from error

    def _amounts(self, groups: list[Group]) -> list[float | None]:
        """Return the share of every group, None for those that were not asked for."""
        if not isinstance(self.amount, dict):
            return [self.amount] * len(groups)
        names = [node.name or "" for group in groups for node in group.layers]
        found: dict[str, float] = {}
        for pattern, amount in self.amount.items():
            hint = "`edgepress inspect MODEL --channels` lists them."
            matched = demand_match(self.name, "amount of", pattern, names, hint=hint)
            touched = [g for g in groups if any(node.name in matched for node in g.layers)]
            if amount and not any(len(group.free) for group in touched):
                raise PassRefused(
                    self.name, f"amount of {pattern!r}", f"{touched[0].why}; remove it."
                )
            found |= {name: amount for name in matched if name not in found}
        result: list[float | None] = []
        for group in groups:
            asked = {
                name: found[name] for node in group.layers if (name := node.name or "") in found
            }
            for other in asked:
                first = next(iter(asked))
                if asked[other] != asked[first]:
                    raise PassRefused(
                        self.name,
                        "amount",
                        f"{first} ({asked[first]:g}) and {other} ({asked[other]:g}) are cut "
                        "together; give them the same amount.",
                    )
            result.append(next(iter(asked.values()), None))
        return result

    def _demand_rest(self, group: Group, amount: float) -> None:
        """Refuse an amount that leaves less than half a channel."""
        total = len(group.channels)
        if self.of == "channels" and total * (1 - amount) < 0.5:
            raise PassRefused(
                self.name,
                "amount",
                f"{amount:g} would empty {group.name}, which has {total} channels; give less.",
            )

    def _recover(
        self, original: ir.Model, model: ir.Model, kept: Kept, context: Context
    ) -> list[str]:
        """Refit what remains, and say how."""
        if self.recover == "none":
            return []
        if context.samples is None:
            return ["without samples nothing was refitted; give some with --calib to lose less."]
        method: Literal["bias", "least-squares"]
        method = "bias" if self.recover == "bias" else "least-squares"
        left = recover(self.name, original, model, kept, context.samples, context, method=method)
        refresh_shapes(model, self.name)
        if not left:
            return ["nothing could be refitted: no layer has float weights of its own."]
        worst = sorted(left, key=lambda name: -left[name])[:3]
        listed = ", ".join(f"{name} {left[name]:.0%}" for name in worst)
        return [f"refitted by {method}; the largest relative errors that are left: {listed}."]


def _measured(
    before: ir.Model, after: ir.Model, timer: LayerTimer, stats: dict[str, int | float]
) -> list[str]:
    """Measure the layers that changed; add their sums to `stats`, and name what is not faster."""
    pairs = changed_layers(before, after)
    costs = timer([model for _, *both in pairs for model in both])
    figures = list(zip((name for name, *_ in pairs), costs[::2], costs[1::2], strict=True))
    whole, left, unit = sum(costs[::2]), sum(costs[1::2]), timer.unit
    stats |= {f"{unit}_before": whole, f"{unit}_after": left}
    notes = [
        f"measured on the target, the layers that changed take {whole:.3g} → {left:.3g} {unit}."
    ]
    kept = [
        f"{name} {old:.3g} → {new:.3g} {unit}"
        for name, old, new in figures
        if new > NOT_FASTER * old and new >= LEAST_SHARE * left
    ]
    return notes + ([f"not faster: {', '.join(kept)}."] if kept else [])


def _why_not(group: Group, align: int) -> str:
    if not len(group.free):
        return group.why
    count = len(group.channels)
    what = f"its {count} channels fill" if count > 1 else "its only channel fills"
    return f"{what} no more than one vector of {align}"


def _kept(model: ir.Model, axes: Axes, cuts: Ids) -> dict[str, list[Ids | None]]:
    """Return which elements of every axis remain, for every value that loses some."""
    kept: dict[str, list[Ids | None]] = {}
    for node in model.graph:
        for value in node.outputs:
            gone = [
                None if axis is None else np.isin(axis, cuts) for axis in axes.channels_of(value)
            ]
            if any(lost is not None and lost.any() for lost in gone):
                kept[value.name or ""] = [None if g is None else np.flatnonzero(~g) for g in gone]
    return kept


def _forget_gammas(model: ir.Model) -> None:
    """Drop the notes of folded BatchNorms: they count channels that may be gone."""
    for node in model.graph:
        node.metadata_props.pop(GAMMA, None)
