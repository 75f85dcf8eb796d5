"""A model's graph as a torch function with gradients, for batches of any size.

This module imports torch: import it inside functions only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from edgepress.passes._constants import constant
from edgepress.passes._gradient_tape import is_float
from edgepress.passes._shapes import shape_of, static_shape
from edgepress.passes._torch_operators import OPERATORS, NotInTorch, Operator
from edgepress.passes.base import PassRefused


class TorchGraph:
    """Computes values of a model in torch.

    The model keeps its own batch, which is 1 in most: the function of one sample is mapped over
    the samples (`torch.func.vmap`), so that no operator can mix them, and a Reshape to a constant
    shape needs no care. All floats are computed in one dtype, whatever the model's.

    Attributes:
        parameters: the trainable initializers by name: leaves that require a gradient.
    """

    def __init__(
        self,
        pass_name: str,
        model: ir.Model,
        trainable: Iterable[str],
        *,
        outputs: Sequence[ir.Value] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Read the graph.

        Args:
            pass_name: for refusals.
            model: after the canonical passes: fixed shapes, opset 13 or newer. It changes in
                `write_back` only, and its nodes must stay as they are.
            trainable: names of floating initializers.
            outputs: what to compute; None takes the model's outputs.
            dtype: of all floats.

        Raises:
            PassRefused: an operator, or this form of it, is not known here, or a shape is open.
        """
        self._pass_name, self._graph, self._dtype = pass_name, model.graph, dtype
        self._outputs = list(model.graph.outputs if outputs is None else outputs)
        self._inputs = list(model.graph.inputs)
        nodes = _needed(model.graph, self._outputs)
        for value in (*self._inputs, *(v for node in nodes for v in node.outputs[:1])):
            if static_shape(value) is None:
                why = "its shape is not fixed; run the canonical passes first."
                raise PassRefused(pass_name, f"value {value.name!r}", why)
        self._steps = [(node, self._operator(node)) for node in nodes]
        trained = set(trainable)
        self._constants: dict[ir.Value, Tensor] = {}
        self.parameters: dict[str, Tensor] = {}
        for name, value in model.graph.initializers.items():
            array = constant(value)
            if array is None:
                continue
            # a copy: numpy arrays may be read-only, and have dtypes that torch does not know
            if is_float(value):
                tensor = torch.tensor(array.astype("float64"), dtype=dtype)
            else:
                tensor = torch.tensor(array)
            if name in trained:
                self.parameters[name] = tensor.requires_grad_()
            else:
                self._constants[value] = tensor

    def forward(
        self, batch: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Compute the outputs of n samples.

        Args:
            batch: by input name, `[n, *input shape]`, without the shape's batch axis of 1, as
                `calibration.base.Samples` has it.
            weights: takes the place of `parameters`, by name.

        Returns:
            By output name, `[n, *output shape]`, without the shape's batch axis of 1.
        """
        given = self.parameters | dict(weights or {})
        known = self._constants | {
            self._graph.initializers[name]: tensor for name, tensor in given.items()
        }
        mapped = torch.func.vmap(lambda sample: self._of_one(known, sample))
        answers = mapped([self._prepared(batch, value) for value in self._inputs])
        return {value.name or "": y for value, y in zip(self._outputs, answers, strict=True)}

    def write_back(self, weights: Mapping[str, Tensor] | None = None) -> None:
        """Put the parameters, or these weights by name, into the initializers, in their dtypes."""
        for name, tensor in (self.parameters | dict(weights or {})).items():
            value = self._graph.initializers[name]
            assert value.dtype is not None
            array = tensor.detach().cpu().numpy().astype(value.dtype.numpy())
            value.const_value = ir.tensor(array, name=name, dtype=value.dtype)

    def _of_one(self, known: Mapping[ir.Value, Tensor], sample: Sequence[Tensor]) -> list[Tensor]:
        """Compute the outputs of one sample, without their batch axis of 1."""
        values = dict(known)
        for value, tensor in zip(self._inputs, sample, strict=True):
            values[value] = tensor.reshape(shape_of(value))
        for node, operator in self._steps:
            read = (None if value is None else values[value] for value in node.inputs)
            values[node.outputs[0]] = operator(*read)
        return [values[value].reshape(sample_shape(value)) for value in self._outputs]

    def _prepared(self, batch: Mapping[str, Tensor], value: ir.Value) -> Tensor:
        tensor = batch[value.name or ""]
        return tensor.to(self._dtype) if is_float(value) else tensor

    def _operator(self, node: ir.Node) -> Operator:
        """Return what computes a node's first output. Raises PassRefused."""
        where = f"node {node.name!r}"
        if node.domain or node.op_type not in OPERATORS:
            kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            why = f"{kind} cannot be trained through; known are {', '.join(sorted(OPERATORS))}."
            raise PassRefused(self._pass_name, where, why)
        try:
            for value in node.outputs[1:]:
                if value.uses() or value.is_graph_output():
                    raise NotInTorch(f"its output {value.name!r} is read, too")
            return OPERATORS[node.op_type](node)
        except NotInTorch as reason:
            why = f"this {node.op_type} cannot be trained through: {reason}."
            raise PassRefused(self._pass_name, where, why) from reason


def sample_shape(value: ir.Value) -> tuple[int, ...]:
    """Return the shape of one sample: without a batch axis of 1."""
    shape = shape_of(value)
    return shape[1:] if shape[:1] == (1,) else shape


def _needed(graph: ir.Graph, outputs: Sequence[ir.Value]) -> list[ir.Node]:
    """Return the nodes that these values depend on, in order of execution."""
    wanted, nodes = set(outputs), []
    for node in reversed(graph):
        if not wanted.isdisjoint(node.outputs):
            wanted.update(value for value in node.inputs if value is not None)
            nodes.append(node)
    return nodes[::-1]
