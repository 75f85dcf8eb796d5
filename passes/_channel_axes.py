"""The identities of the elements of axes: which of them are one channel, and which layers share it.

Every element of every axis that may be cut has an identity, a number. Constants give identities to
the elements of their axes; a rule per operator (`_channel_rules.py`) says which identities the axes
of its outputs have, and ties those that must go together: those of a convolution's input channels
to axis 1 of its weight, those of both operands of a residual Add to each other. Identities that are
tied, directly or not, are one channel. Layers that share channels form a group.

An axis is None where it must not be cut: batch, space, tokens, everything that comes from a model
input. An identity is frozen where it reaches such an axis, a model output, or an operator without a
rule; the first reason is kept for the report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgepress.passes._constants import constant
from edgepress.passes._shapes import static_shape

Ids = npt.NDArray[np.int64]
#: The identities of the elements of an axis, or None where the axis must not be cut.
Axis = Ids | None
#: Answers which elements of an axis remain: `[extent]` bool.
Kept = Callable[[Ids], npt.NDArray[np.bool_]]


class NoRule(Exception):
    """No rule is known for a node; what it says follows the operator's name in the report."""


@dataclass(frozen=True, eq=False)
class Member:
    """A weight that makes or reads channels of a group.

    Attributes:
        node: the layer.
        weight: the initializer.
        axis: of the weight.
        channels: `[extent of that axis]` channel of every element.
        elements: `[n]` channel of every element of the axis that the layer writes or reads; there
            are more than the weight has where groups of a convolution share the weight's axis.
    """

    node: ir.Node
    weight: ir.Value
    axis: int
    channels: Ids
    elements: Ids


@dataclass(frozen=True, eq=False, kw_only=True)
class Group:
    """Channels that the same layers make, so that cutting one cuts all of these layers alike.

    Attributes:
        name: of the first layer that makes them.
        channels: `[n]`, in the order in which the first layer has them.
        frozen: `[n]` bool; these must stay.
        why: why they must, "" where none is frozen.
        width: elements of the widest producer that belong to one channel: 1 for a convolution, the
            size of a head for attention.
        producers: the layers that make the channels, in graph order.
        readers: the layers that sum over them, in graph order.
    """

    name: str
    channels: Ids
    frozen: npt.NDArray[np.bool_]
    why: str
    width: int
    producers: tuple[Member, ...]
    readers: tuple[Member, ...]

    @property
    def layers(self) -> tuple[ir.Node, ...]:
        """The layers that make the channels."""
        return tuple(dict.fromkeys(member.node for member in self.producers))

    @property
    def free(self) -> Ids:
        """The channels that may be cut."""
        return self.channels[~self.frozen]

    def places(self, channels: Ids) -> Ids:
        """Return the place in the group of each of these channels, -1 for those of other groups."""
        order = np.argsort(self.channels)
        found = np.searchsorted(self.channels, channels, sorter=order)
        places = order[np.minimum(found, len(order) - 1)]
        return np.where(self.channels[places] == channels, places, -1)


@dataclass(frozen=True, eq=False)
class _Note:
    """A layer that makes or reads channels, before it is known which identities are one channel."""

    node: ir.Node
    weight: ir.Value
    axis: int
    elements: Ids


@dataclass(eq=False)
class Axes:
    """The identities of all axes, while rules walk a graph and after.

    Attributes:
        unknown: `(node, operator)` of every node that has no rule; where an operator lacks one only
            in some form, the form is said behind its name.
    """

    unknown: list[tuple[str, str]] = field(default_factory=list)
    _axes: dict[ir.Value, list[Axis]] = field(default_factory=dict)
    _count: int = 0
    _ties: list[tuple[Ids, Ids]] = field(default_factory=list)
    _frozen: list[tuple[Ids, str]] = field(default_factory=list)
    _makes: list[_Note] = field(default_factory=list)
    _reads: list[_Note] = field(default_factory=list)
    _parts: list[Ids] = field(default_factory=list)
    _fixes: list[Callable[[Kept], None]] = field(default_factory=list)

    def of(self, value: ir.Value) -> list[Axis]:
        """Return the axes of a value; those of a constant get identities when first asked for."""
        if value not in self._axes:
            shape = static_shape(value)
            fixed = value.is_initializer() and value.const_value is not None
            self._axes[value] = [self.fresh(n) if fixed else None for n in shape or ()]
            for axis in self._axes[value]:
                self.part(axis)
            if value.is_graph_input():
                self.freeze(*self._axes[value], why=f"{value.name} is an input of the model")
        return self._axes[value]

    def knows(self, value: ir.Value) -> bool:
        """Tell whether the axes of a value are known."""
        return value in self._axes

    def set(self, value: ir.Value, axes: Sequence[Axis]) -> None:
        """Give the output of a node its axes."""
        self._axes[value] = list(axes)

    def set_fixed(self, value: ir.Value) -> None:
        """Let no axis of the output of a node be cut."""
        self.set(value, [None] * len(static_shape(value) or ()))

    def fresh(self, extent: int) -> Ids:
        """Return new identities."""
        self._count += extent
        return np.arange(self._count - extent, self._count)

    def freeze(self, *axes: Axis, why: str) -> None:
        """Keep these elements."""
        self._frozen += [(axis, why) for axis in axes if axis is not None]

    def tie(self, one: Axis, other: Axis, why: str) -> None:
        """Cut two axes of equal extent alike; one that must not be cut freezes the other.

        Raises NoRule where the extents differ.
        """
        if one is None or other is None:
            self.freeze(one, other, why=why)
        elif one.shape != other.shape:
            raise NoRule(" of operands that do not fit")
        else:
            self._ties.append((one, other))

    def merge(self, rows: Ids) -> None:
        """Make the elements of every row one channel: `[rows, elements]`."""
        self._ties.append((np.repeat(rows[:, 0], rows.shape[1]), rows.ravel()))

    def makes(self, node: ir.Node, weight: ir.Value, axis: int, elements: Axis = None) -> None:
        """Note that a layer makes the channels of this axis of its weight.

        `elements` are those of the axis that it writes, where that is not the weight's axis.
        """
        self._note(self._makes, node, weight, axis, elements)

    def reads(self, node: ir.Node, weight: ir.Value, axis: int, elements: Axis = None) -> None:
        """Note that a layer sums over the channels of this axis of its weight."""
        self._note(self._reads, node, weight, axis, elements)

    def _note(
        self, notes: list[_Note], node: ir.Node, weight: ir.Value, axis: int, elements: Axis
    ) -> None:
        stored = underlying(weight)
        if stored is None:
            return
        ids = self.of(stored)[axis]
        assert ids is not None, "constants have identities on every axis"
        axis %= len(self.of(stored))
        notes.append(_Note(node, stored, axis, ids if elements is None else elements))

    def part(self, axis: Axis) -> None:
        """Demand that at least one of these elements stays: an empty tensor is no tensor."""
        if axis is not None:
            self._parts.append(axis)

    def on_cut(self, fix: Callable[[Kept], None]) -> None:
        """Call this when channels are cut, to mend attributes and shapes that count them."""
        self._fixes.append(fix)

    @cached_property
    def channel(self) -> Ids:
        """The channel of every identity: the least identity it is tied to."""
        label = np.arange(self._count)
        if not self._ties:
            return label
        one = np.concatenate([one for one, _ in self._ties])
        other = np.concatenate([other for _, other in self._ties])
        while True:
            least = np.minimum(label[one], label[other])
            before = label.copy()
            # hooking whole trees, not elements, makes long chains of ties short
            np.minimum.at(label, before[one], least)
            np.minimum.at(label, before[other], least)
            label = label[label]
            if np.array_equal(label, before) and np.array_equal(label[one], label[other]):
                return label

    @cached_property
    def frozen(self) -> dict[int, str]:
        """Why a channel must stay, for every channel that must."""
        first = np.full(self._count, len(self._frozen))
        for index in reversed(range(len(self._frozen))):
            first[self.channel[self._frozen[index][0]]] = index
        found = np.flatnonzero(first < len(self._frozen))
        reasons = (self._frozen[index][1] for index in first[found].tolist())
        return dict(zip(found.tolist(), reasons, strict=True))

    @cached_property
    def parts(self) -> list[Ids]:
        """Sets of channels of which at least one must stay; those that lose none are left out."""
        stays = np.zeros(self._count, bool)
        stays[list(self.frozen)] = True
        found: dict[bytes, Ids] = {}
        for part in self._parts:
            channels = np.unique(self.channel[part])
            if len(channels) and not stays[channels].any():
                found[channels.tobytes()] = channels
        return list(found.values())

    def channels_of(self, value: ir.Value) -> list[Axis]:
        """Return the channel of every element of every axis of a value, none if it is new."""
        axes = self._axes.get(value, [None] * len(static_shape(value) or ()))
        return [None if axis is None else self.channel[axis] for axis in axes]

    def without(self, channels: Iterable[int]) -> Kept:
        """Return which elements of axes remain without these channels.

        Raises ValueError for a number that is no channel, for a frozen channel, and where nothing
        of a part would remain.
        """
        stays = np.ones(self._count, bool)
        for channel in channels:
            if not 0 <= channel < self._count or self.channel[channel] != channel:
                raise ValueError(f"{channel} is no channel of this model")
            if channel in self.frozen:
                raise ValueError(f"a frozen channel cannot be cut: {self.frozen[channel]}")
            stays[channel] = False

        def kept(axis: Ids) -> npt.NDArray[np.bool_]:
            found: npt.NDArray[np.bool_] = stays[self.channel[axis]]
            return found

        if not all(kept(part).any() for part in self.parts):
            raise ValueError("a constant, or a part of an axis that is split, would be empty")
        return kept

    def mend(self, kept: Kept) -> None:
        """Let attributes and shapes count what remains."""
        for fix in self._fixes:
            fix(kept)

    def groups(self) -> list[Group]:
        """Return the groups, in the order of their first layers."""
        made = [self._member(note) for note in self._makes]
        owner, group_of = _joined([member.channels for member in made], self._count)
        producers: dict[int, list[Member]] = {}
        for member, group in zip(made, owner, strict=True):
            producers.setdefault(group, []).append(member)
        readers: dict[int, list[Member]] = {group: [] for group in producers}
        for member in map(self._member, self._reads):
            for group in np.unique(group_of[member.channels]).tolist():
                if group >= 0:
                    readers[group].append(member)
        return [self._group(found, readers[group]) for group, found in producers.items()]

    def _member(self, note: _Note) -> Member:
        ids = self.of(note.weight)[note.axis]
        assert ids is not None, "constants have identities on every axis"
        elements = self.channel[note.elements]
        return Member(note.node, note.weight, note.axis, self.channel[ids], elements)

    def _group(self, producers: list[Member], readers: list[Member]) -> Group:
        everything = np.concatenate([member.channels for member in producers])
        channels, first = np.unique(everything, return_index=True)
        channels = channels[np.argsort(first)]
        reasons = [self.frozen.get(channel) for channel in channels.tolist()]
        return Group(
            name=producers[0].node.name or "",
            channels=channels,
            frozen=np.array([reason is not None for reason in reasons]),
            why=next((reason for reason in reasons if reason is not None), ""),
            width=max(len(m.elements) // len(np.unique(m.elements)) for m in producers),
            producers=tuple(producers),
            readers=tuple(readers),
        )


def _joined(sets: Sequence[Ids], count: int) -> tuple[list[int], Ids]:
    """Join sets of numbers below `count` that overlap, directly or through others.

    Returns the first set that each set is joined with, and that of each number, -1 for numbers that
    are in none.

    >>> _joined([np.array([0, 1]), np.array([4]), np.array([1, 3]), np.array([3, 4])], 6)
    ([0, 0, 0, 0], array([ 0,  0, -1,  0,  0, -1]))
    """
    parent = list(range(len(sets)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    latest = np.full(count, -1)
    for index, members in enumerate(sets):
        for other in np.unique(latest[members]).tolist():
            if other >= 0:
                one, two = sorted((root(other), root(index)))
                parent[two] = one
        latest[members] = index
    owner = [root(index) for index in range(len(sets))]
    return owner, np.array([*owner, -1])[latest]


def underlying(value: ir.Value | None) -> ir.Value | None:
    """Return the constant that a value is, or dequantizes; None for anything computed or given."""
    while value is not None and not value.is_initializer():
        producer = value.producer()
        if producer is None or producer.op_type != "DequantizeLinear":
            return None
        value = producer.inputs[0]
    return None if constant(value) is None else value
