"""Runs a model over samples piece by piece, so that layers can be changed on the way.

A model is cut at stops. Every piece runs once, on what the pieces before it left behind: a layer
that was changed at one stop is what the next piece computes with, and nothing is computed twice.
Of all values only those are held that a later piece or stop reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import onnx_ir as ir

from edgepress.calibration.base import Array
from edgepress.passes._reads import reads
from edgepress.passes._taps import open_taps, size_bytes


class Replay:
    """A model on its way through samples.

    Attributes:
        values: per sample, the values that are held, by name.
    """

    def __init__(
        self,
        pass_name: str,
        model: ir.Model,
        feeds: Sequence[Mapping[str, Array]],
        stops: Sequence[Sequence[str]],
    ) -> None:
        """Begin before the first node.

        Args:
            pass_name: for refusals.
            model: nodes in order of execution. Nodes that have not run may still be changed.
            feeds: model inputs by name, one mapping per sample.
            stops: names of the values that must be there at each stop.
        """
        self.values: list[dict[str, Array]] = [dict(feed) for feed in feeds]
        self._pass_name, self._model = pass_name, model
        self._pieces = iter(_pieces(model.graph, stops))

    def advance(self) -> None:
        """Run to the next stop. Raises PassRefused where a value is NaN or infinite."""
        piece = next(self._pieces)
        if piece.outputs:
            self.run(piece.inputs, piece.outputs)
        for values in self.values:
            for name in values.keys() - piece.held:
                del values[name]

    def run(self, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        """Compute values from others that are held, with the nodes as they are now."""
        run = run_between(self._pass_name, self._model, inputs, outputs)
        for index, values in enumerate(self.values):
            values |= run(values, index)


def run_between(
    pass_name: str, model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]
) -> Callable[[Mapping[str, Array], int], dict[str, Array]]:
    """Return a function that computes the outputs from values that hold the inputs, by name.

    Its second argument is the number of the sample, for refusals.
    """
    graph = ir.convenience.extract(model.graph, inputs, outputs)
    tap = open_taps(pass_name, ir.Model(graph, ir_version=model.ir_version), list(graph.outputs))
    return lambda values, index: tap({name: values[name] for name in inputs}, index)


def held_bytes(graph: ir.Graph, stops: Sequence[Sequence[str]]) -> int:
    """Return the most bytes that a replay holds at once for one sample."""
    sizes = {value.name: size_bytes(value) for value in graph.inputs}
    sizes |= {value.name: size_bytes(value) for node in graph for value in node.outputs}
    pieces = _pieces(graph, stops)
    return max((sum(sizes[name] for name in piece.held) for piece in pieces), default=0)


@dataclass(frozen=True)
class _Piece:
    """A run of nodes between two stops: what it reads, what it leaves, and what is held after."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    held: frozenset[str]


def _pieces(graph: ir.Graph, stops: Sequence[Sequence[str]]) -> list[_Piece]:
    nodes = list(graph)
    made_by = {value.name: end for end, node in enumerate(nodes, 1) for value in node.outputs}
    ends = list(accumulate((max(made_by.get(n, 0) for n in names) for names in stops), max))
    read_by = [{value.name or "" for value in reads(node)} for node in nodes]
    have, start = {value.name or "" for value in graph.inputs}, 0
    pieces = []
    for number, end in enumerate(ends):
        later = {name for names in stops[number:] for name in names}
        later = later.union(*read_by[end : ends[-1]])
        inputs = have.intersection(set().union(*read_by[start:end]))
        written = {value.name or "" for node in nodes[start:end] for value in node.outputs}
        have = (have | written) & later
        pieces.append(
            _Piece(tuple(sorted(inputs)), tuple(sorted(written & later)), frozenset(have))
        )
        start = end
    return pieces
