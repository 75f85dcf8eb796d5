"""The layers of a quantized graph: which nodes, pairs and constants belong together.

A pair is a QuantizeLinear with the DequantizeLinear nodes that read it. Nodes that no pair
separates are one layer: a convolution, the rectifier that folds into it and the quantized constants
of both. A layer owns the pair behind its output; the pair behind a model input belongs to a layer
of its own, called `input NAME`.

Operators that only move values, such as a pool of maxima or a reshape, own nothing where they keep
the scale of what they read. What they read is on that grid, so the pair behind them changes nothing
and is left out of account. So is the pair behind a Concat for those of its inputs that have its
scale. The others are brought to it, which is the Concat's own: in place of the pair behind it there
is one at each of these inputs, and that computes the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepress.passes._constants import constant, free_name
from edgepress.passes._int8_rules import is_carrier

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
INPUT = "input"
#: Scale, zero point and dtype of a tensor with one scale.
Grid = tuple[float, int, ir.DataType | None]


@dataclass(frozen=True, kw_only=True)
class QuantizedLayer:
    """What is quantized together.

    Attributes:
        name: of its first node that has quantized constants, or else of its first node; for a
            model input `input NAME`. No two layers have the same.
        op_type: of that node; "input" for a model input.
        nodes: names of all its nodes, in graph order; empty for a model input.
        reads: names of the values that it reads from other layers and from model inputs. Values
            that were only moved on the way are called as the layer that made them writes them.
        writes: names of the values behind which it owns a pair; a value has two pairs where it
            is needed on two scales.
        dtypes: of the integers in each of `writes`: "uint8", "int8", "int16", …
        scales: name of the scale of each of `writes`; equal names are one scale.
        constants: names of its quantized constants.
    """

    name: str
    op_type: str
    nodes: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    dtypes: tuple[str, ...]
    scales: tuple[str, ...]
    constants: tuple[str, ...]


@dataclass(frozen=True)
class Pair:
    """A value and what quantizes and dequantizes it.

    Attributes:
        value: what is quantized.
        quantize: the QuantizeLinear.
        dequantize: all DequantizeLinear nodes that read it.
        first: the node that reads `value`: the QuantizeLinear, or a Clip that came with it to keep
            the value within some limit.
    """

    value: ir.Value
    quantize: ir.Node
    dequantize: tuple[ir.Node, ...]
    first: ir.Node

    @property
    def outputs(self) -> list[ir.Value]:
        """The dequantized values."""
        return [node.outputs[0] for node in self.dequantize]

    @property
    def name(self) -> str:
        """What the model calls the value: a model output has its name behind the pair."""
        outputs = (value.name for value in self.outputs if value.is_graph_output())
        return next(outputs, self.value.name) or ""


@dataclass(frozen=True)
class Use:
    """A dequantized constant and where it is read.

    Attributes:
        value: the dequantized constant.
        node: who computes with it.
        index: of the input.
        quantize: the QuantizeLinear between them, or None.
    """

    value: ir.Value
    node: ir.Node
    index: int
    quantize: ir.Node | None = None


@dataclass
class Group:
    """The parts of a layer, in the graph."""

    source: ir.Value | None = None
    nodes: list[ir.Node] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    layer: QuantizedLayer = field(init=False)


def find_layers(
    graph: ir.Graph, float_nodes: set[str] | None = None
) -> tuple[list[Group], list[tuple[ir.Value, ir.Value]]]:
    """Find the layers of a quantized graph; at some Concats pairs are moved to its inputs.

    Args:
        graph: nodes in order of execution.
        float_nodes: names of the nodes that the graph had before it was quantized, or None. A Clip
            that is not among them is a limit that came with a pair.

    Returns:
        The layers in graph order, and `(dequantized value, value)` of the pairs that change nothing
        as long as the layers before them are quantized.
    """
    finder = _Finder(graph, float_nodes)
    return finder.groups, finder.redundant


def is_dequantized_constant(value: ir.Value | None) -> bool:
    """Whether a value is a constant that was stored as integers of 8 to 32 bits."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != DEQUANTIZE or node.domain:
        return False
    if (array := constant(node.inputs[0])) is None or node.attributes.get("block_size") is not None:
        return False
    known = all(given is None or constant(given) is not None for given in node.inputs)
    return known and array.dtype.kind in "iu" and array.dtype.name != "int4"


class _Finder:
    """Walks through a graph; the results are `groups` and `redundant`."""

    def __init__(self, graph: ir.Graph, float_nodes: set[str] | None) -> None:
        self._graph, self._float_nodes = graph, float_nodes
        self._order = {node: index for index, node in enumerate(graph)}
        self._pair_of: dict[ir.Value, Pair] = {}  # by each dequantized value
        self._origins: dict[ir.Value, list[ir.Value]] = {}  # of values that were only moved
        self._owner: dict[ir.Node, Group] = {}
        self._inputs: dict[ir.Value, Group] = {}
        self.redundant: list[tuple[ir.Value, ir.Value]] = []
        pairs = list(self._pairs())
        for pair in pairs:
            self._pair_of |= dict.fromkeys(pair.outputs, pair)
        switched = [own for pair in pairs for own in self._settle(pair)]
        self.groups = self._collect(switched)
        self._describe()

    # Pairs --------------------------------------------------------------------------------------

    def _pairs(self) -> Iterator[Pair]:
        """Yield the pairs of one scale around activations, in graph order."""
        for node in self._graph:
            if node.op_type != QUANTIZE or node.domain or (value := node.inputs[0]) is None:
                continue
            grid, integers = _grid(node), node.outputs[0]
            readers = tuple(integers.consumers())
            if grid is None or not readers or integers.is_graph_output():
                continue
            if constant(value) is not None or is_dequantized_constant(value):
                continue
            if all(user.op_type == DEQUANTIZE and _grid(user) == grid for user in readers):
                first = self._limit(value) or node
                yield Pair(first.inputs[0] or value, node, readers, first)

    def _limit(self, value: ir.Value) -> ir.Node | None:
        """Return the Clip that came with a pair."""
        node = value.producer()
        if node is None or node.op_type != "Clip" or self._float_nodes is None:
            return None
        return None if (node.name or "") in self._float_nodes or len(value.uses()) > 1 else node

    def _settle(self, pair: Pair) -> Iterator[Pair]:
        """Yield the pairs that stand for this one: itself, none, or those at a Concat's inputs."""
        node, grid = pair.value.producer(), _grid(pair.quantize)
        if node is None or node.domain or not _moves_only(node):
            yield pair
            return
        read = dict.fromkeys(value for value in node.inputs if value is not None)
        moved = [value for value in read if value in self._pair_of]
        same = [value for value in moved if _grid(self._pair_of[value].quantize) == grid]
        if not same:
            yield pair
            return
        sources = list(same)
        if node.op_type == "Concat":
            for value in (value for value in read if value not in same):
                maker = value.producer()
                if maker is None or not is_dequantized_constant(value) or _grid(maker) != grid:
                    new = self._before(node, value, pair)
                    sources += new.outputs
                    yield new
        origins = [origin for value in sources for origin in self._made(value)]
        self._origins[pair.value] = origins
        for output in pair.outputs:
            self._origins[output] = origins
            self.redundant.append((output, pair.value))

    def _before(self, node: ir.Node, value: ir.Value, like: Pair) -> Pair:
        """Put a pair like another one between a value and the node that reads it."""
        made: list[ir.Node] = []
        source = value
        for old in (like.quantize, like.dequantize[0]):
            name = free_name(self._graph, f"{value.name}_{old.op_type}_for_{node.name}")
            new = ir.node(old.op_type, [source, *old.inputs[1:]], old.attributes, name=name)
            source = new.outputs[0]
            source.name = name
            source.type, source.shape = old.outputs[0].type, value.shape
            self._graph.insert_before(node, new)
            made.append(new)
        group = self._group_of(node)
        for index, given in enumerate(node.inputs):
            if given is value:
                node.replace_input_with(index, source)
                if is_dequantized_constant(value):
                    group.uses.append(Use(value, node, index, made[0]))
        pair = Pair(value, made[0], (made[1],), made[0])
        self._pair_of[source] = pair
        self._owner[made[0]] = group
        return pair

    def _made(self, value: ir.Value) -> list[ir.Value]:
        """Return the values that were quantized before they were moved to this one."""
        if value in self._origins:
            return self._origins[value]
        return [self._pair_of[value].value] if value in self._pair_of else [value]

    # Layers -------------------------------------------------------------------------------------

    def _group_of(self, node: ir.Node) -> Group:
        return self._owner.setdefault(node, Group(nodes=[node]))

    def _collect(self, switched: list[Pair]) -> list[Group]:
        """Give nodes, pairs and quantized constants to their layers."""
        found: dict[int, Group] = {}
        for pair in switched:
            at_concat = self._owner.get(pair.quantize)
            group = at_concat or self._maker(pair.value)
            group.pairs.append(pair)
            found[id(group)] = group
        for value in self._graph.outputs:
            self._maker(value)
        for node in self._graph:
            if node.op_type in (QUANTIZE, DEQUANTIZE) and not node.domain:
                continue
            read = enumerate(node.inputs)
            uses = [Use(v, node, i) for i, v in read if v and is_dequantized_constant(v)]
            if uses:
                group = self._group_of(node)
                group.uses += uses
                found[id(group)] = group
        return list(found.values())

    def _maker(self, value: ir.Value) -> Group:
        """Return the layer that makes a value: all nodes back to values that are quantized."""
        if value in self._pair_of:  # the same value on one more scale
            return self._maker(self._pair_of[value].value)
        producer = value.producer()
        if producer is None or producer.op_type in (QUANTIZE, DEQUANTIZE):
            return self._inputs.setdefault(value, Group(source=value))
        if producer in self._owner:
            return self._owner[producer]
        group = Group()
        waiting = [producer]
        while waiting:
            node = waiting.pop()
            if node in self._owner:
                continue
            self._owner[node] = group
            group.nodes.append(node)
            for source in node.inputs:
                if source is None or source in self._pair_of or source in self._origins:
                    continue
                maker = source.producer()
                if maker is not None and maker.op_type not in (QUANTIZE, DEQUANTIZE):
                    waiting.append(maker)
        return group

    def _describe(self) -> None:
        """Order the layers and say what each of them is."""
        position = {value: index for index, value in enumerate(self._graph.inputs)}

        def place(group: Group) -> tuple[int, int]:
            if not group.nodes:
                return 0, -1 if group.source is None else position.get(group.source, -1)
            return 1, self._order[group.nodes[0]]

        for group in self.groups:
            group.nodes.sort(key=self._order.__getitem__)
        self.groups.sort(key=place)
        taken: set[str] = set()
        for group in self.groups:
            group.layer = self._described(group, taken)
            taken.add(group.layer.name)

    def _described(self, group: Group, taken: set[str]) -> QuantizedLayer:
        holders = {use.node for use in group.uses}
        node = next((node for node in group.nodes if node in holders), None)
        node = node or next(iter(group.nodes), None)
        if node is None:
            name = f"{INPUT} {'' if group.source is None else group.source.name}"
        else:
            name = node.name or node.outputs[0].name or ""
        while name in taken:  # a node may be called as an input is here
            name += "_"
        return QuantizedLayer(
            name=name,
            op_type=INPUT if node is None else node.op_type,
            nodes=tuple(member.name or "" for member in group.nodes),
            reads=tuple(dict.fromkeys(self._reads(group))),
            writes=tuple(pair.name for pair in group.pairs),
            dtypes=tuple(_dtype_name(pair.quantize) for pair in group.pairs),
            scales=tuple(_scale_name(pair.quantize) for pair in group.pairs),
            constants=tuple(dict.fromkeys(_stored(use.value) for use in group.uses)),
        )

    def _reads(self, group: Group) -> Iterator[str]:
        """Yield what a layer reads from outside."""
        names = {pair.value: pair.name for pair in self._pair_of.values()}
        for node in group.nodes:
            for value in node.inputs:
                if value is None or constant(value) is not None or is_dequantized_constant(value):
                    continue
                maker = value.producer()
                inside = maker is not None and self._owner.get(maker) is group
                if inside and value not in self._origins:
                    continue
                if (pair := self._pair_of.get(value)) and pair in group.pairs:  # at a Concat
                    value = pair.value
                for origin in self._made(value):
                    yield names.get(origin, origin.name or "")


def _moves_only(node: ir.Node) -> bool:
    """Whether quantizing the outputs is quantizing the inputs, where both have one scale."""
    if node.op_type == "Pad":
        fill = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        return not (fill is not None and fill.any())
    return node.op_type == "Concat" or is_carrier(node)


def _grid(node: ir.Node) -> Grid | None:
    """Return what a node quantizes to or dequantizes from; None where it is not one scale."""
    scale = constant(node.inputs[1])
    given = node.inputs[2] if len(node.inputs) > 2 else None
    zero_point = np.zeros(1, np.uint8) if given is None else constant(given)
    if scale is None or zero_point is None or scale.size != 1 or zero_point.size != 1:
        return None
    integers = node.outputs[0] if node.op_type == QUANTIZE else node.inputs[0]
    dtype = given.dtype if given is not None else integers.dtype if integers else None
    return float(scale.item()), int(zero_point.item()), dtype


def _dtype_name(node: ir.Node) -> str:
    grid = _grid(node)
    return "" if grid is None or grid[2] is None else grid[2].numpy().name


def _scale_name(node: ir.Node) -> str:
    return (node.inputs[1].name or "") if node.inputs[1] is not None else ""


def _stored(value: ir.Value) -> str:
    """Return the name of the integers of a dequantized constant."""
    node = value.producer()
    stored: Any = None if node is None else node.inputs[0]
    return stored.name or "" if stored is not None else ""
