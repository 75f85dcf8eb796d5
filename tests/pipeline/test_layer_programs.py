"""What is left of a layer between its ends, and layers side by side in one program."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.calibration.base import Array
from edgepress.passes.base import refresh_shapes
from edgepress.pipeline._layer_programs import layer_program, side_by_side
from edgepress.pipeline.layer_timer import _quantized
from edgepress.targets.load import load_target
from edgepress.targets.lowering.build import lower
from edgepress.targets.program import Program
from tests.graphs import net, random

TARGETS = ("x86-64-v3", "x86-64-v4", "raspberry-pi-4", "raspberry-pi-5", "armv7-neon")
PADDED = "<pads=[1,1,1,1]>"


def model(signature: str, body: str, weights: Mapping[str, Array]) -> ir.Model:
    made = net(signature, body, weights)
    refresh_shapes(made, "test")
    return made


def conv(inputs: int, outputs: int, kernel: int, extent: int = 6, clamp: str = "") -> ir.Model:
    line = f"Conv{PADDED if kernel == 3 else ''}(x, w, b)"
    return model(
        f"(float[1,{inputs},{extent},{extent}] x) => (float[1,{outputs},{extent},{extent}] y)",
        f"c = {line} y = {clamp}(c)" if clamp else f"y = {line}",
        {"w": random(outputs, inputs, kernel, kernel), "b": random(outputs)},
    )


def gemm(inputs: int, outputs: int) -> ir.Model:
    return model(
        f"(float[1,{inputs}] x) => (float[1,{outputs}] y)",
        "y = Gemm<transB=1>(x, w, b)",
        {"w": random(outputs, inputs), "b": random(outputs)},
    )


def kinds(program: Program) -> list[str]:
    """What kind of kernel every call is of, in order."""
    return [call.kernel.rpartition("_")[0] for call in program.calls]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("layer", "floats", "integers"),
    [
        (conv(16, 32, 1), ["conv"], ["qconv"]),
        (conv(16, 32, 3, clamp="Relu"), ["winograd"], ["stage", "qconv"]),
        (conv(16, 32, 1, extent=1), ["conv"], ["qconv"]),  # its exit is a copy, not a transpose
        (gemm(16, 32), ["gemm"], ["qgemm"]),
        (
            model(
                "(float[1,16,6,6] x) => (float[1,16,6,6] y)",
                f"c = Conv{PADDED[:-1]}, group=16>(x, w) y = Clip(c, low, high)",
                {
                    "w": random(16, 1, 3, 3),
                    "low": np.array(0, np.float32),
                    "high": np.array(6, np.float32),
                },
            ),
            ["depthwise"],
            ["qdepthwise"],
        ),
    ],
    ids=["1x1", "3x3", "one pixel", "gemm", "depthwise"],
)
def test_only_the_layer_itself_is_left(
    target: str, layer: ir.Model, floats: list[str], integers: list[str]
) -> None:
    board = load_target(target)
    if floats == ["winograd"] and board.architecture == "x86_64":
        floats = ["stage", "conv"]  # wide vectors: so few pixels are quicker directly
    assert kinds(layer_program(layer, board)) == floats
    program = layer_program(_quantized(layer), board)
    got = kinds(program)
    assert got[-len(integers) :] == integers
    # where a kernel reads wider numbers than lie in memory, widening them is the layer's own work
    assert got[: -len(integers)] in ([], ["stage"])
    dtypes = {program.tensors[name].dtype for name in (*program.inputs, *program.outputs)}
    assert dtypes <= {"uint8", "int8"}


def chain(first: ir.Model, second: ir.Model) -> ir.Model:
    """One network of two layers."""
    joined, other = first.clone(), second.clone()
    middle = joined.graph.outputs[0]
    values: dict[ir.Value | None, ir.Value | None] = {other.graph.inputs[0]: middle, None: None}
    for value in other.graph.initializers.values():
        copy = ir.Value(name=f"{value.name}_2", shape=value.shape, type=value.type)
        copy.const_value = value.const_value
        joined.graph.register_initializer(copy)
        values[value] = copy
    for node in other.graph:
        inputs = [values[value] for value in node.inputs]
        made = ir.node(node.op_type, inputs, {a.name: a.value for a in node.attributes.values()})
        made.name = f"{node.name}_2"
        made.outputs[0].name = f"{node.outputs[0].name}_2"
        joined.graph.append(made)
        values[node.outputs[0]] = made.outputs[0]
    last = values[other.graph.outputs[0]]
    assert last is not None
    last.type, last.shape = other.graph.outputs[0].type, other.graph.outputs[0].shape
    joined.graph.outputs[0] = last
    refresh_shapes(joined, "test")
    return joined


@pytest.mark.parametrize("target", ["x86-64-v4", "raspberry-pi-4"])
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (conv(8, 16, 3, clamp="Relu"), conv(16, 32, 1)),
        (conv(8, 16, 1), conv(16, 8, 3)),
        (gemm(16, 32), gemm(32, 16)),
    ],
    ids=["3x3 then 1x1", "1x1 then 3x3", "gemms"],
)
def test_layers_alone_run_what_they_run_in_a_network(
    target: str, quantized: bool, first: ir.Model, second: ir.Model
) -> None:
    def made(layer: ir.Model) -> ir.Model:
        return _quantized(layer) if quantized else layer

    board = load_target(target)
    network = kinds(lower(made(chain(first, second)), board))
    ends = {"quantise", "dequantise", "transpose", "copy"}
    while network[0] in ends:
        network.pop(0)
    while network[-1] in ends:
        network.pop()
    alone = [kinds(layer_program(made(layer), board)) for layer in (first, second)]
    assert [*alone[0], *alone[1]] == network


def test_a_conversion_between_float_and_integers_inside_a_layer_stays() -> None:
    """What has no integer kernel converts on both sides, in a network too."""
    layer = model(
        "(float[1,8,10] x) => (float[1,8,10] y)",
        "y = Conv<pads=[1,1]>(x, w)",
        {"w": random(8, 8, 3)},
    )
    program = layer_program(_quantized(layer), load_target("x86-64-v3"))
    assert kinds(program)[0] == "dequantise"
    assert kinds(program)[-1] == "quantise"
    assert [program.tensors[name].dtype for name in program.inputs] == ["uint8"]


def test_a_conversion_that_the_layer_itself_reads_stays() -> None:
    layer = model(
        "(float[1,8,6,6] x) => (float[1,16,6,6] y, float[1,16,6,6] z)",
        "y = Conv(x, w) z = Softmax<axis=3>(y)",
        {"w": random(16, 8, 1, 1)},
    )
    program = layer_program(layer, load_target("x86-64-v3"))
    assert kinds(program)[:2] == ["conv", "transpose"]
    assert len(program.outputs) == 2
    program.validate()


def test_a_layer_is_a_whole_program() -> None:
    program = layer_program(conv(16, 32, 3), load_target("x86-64-v3"))
    program.validate()
    assert len(program.inputs) == len(program.outputs) == 1
    assert program.tensors[program.inputs[0]].shape == (1, 6, 6, 16)
    assert program.tensors[program.outputs[0]].shape == (1, 6, 6, 32)
    touched = {name for call in program.calls for name in call.arguments}
    assert touched == set(program.tensors) | set(program.constants)
    assert {call.kernel for call in program.calls} == set(program.kernels)


def test_a_layer_that_only_changes_a_shape_has_no_calls() -> None:
    layer = model("(float[1,16] x) => (float[4,4] y)", "y = Reshape(x, s)", {"s": np.array([4, 4])})
    program = layer_program(layer, load_target("x86-64-v3"))
    assert (program.calls, program.inputs, program.outputs) == ([], (), ())


def test_layers_side_by_side() -> None:
    board = load_target("x86-64-v3")
    layers = {3: layer_program(conv(16, 32, 3), board), 8: layer_program(gemm(16, 32), board)}
    joined = side_by_side(layers, board)
    joined.program.validate()
    calls, owners = joined.program.calls, joined.owners
    assert len(owners) == len(calls)
    assert owners == (None, None, None, 3, 3, None, 8)
    assert (joined.program.inputs, joined.program.outputs) == (("x",), ("y",))
    for number, layer in layers.items():
        own = [call for call, owner in zip(calls, owners, strict=True) if owner == number]
        names = [[f"layer_{number}_{name}" for name in call.arguments] for call in layer.calls]
        assert [list(call.arguments) for call in own] == names
        before = calls[calls.index(own[0]) - 1]
        assert before.outputs == tuple(f"layer_{number}_{name}" for name in layer.inputs)
        for name, array in layer.constants.items():
            assert joined.program.constants[f"layer_{number}_{name}"] is array
        for name, tensor in layer.tensors.items():
            copy = joined.program.tensors[f"layer_{number}_{name}"]
            assert (copy.dtype, copy.shape) == (tensor.dtype, tensor.shape)
    own_kernels = {call.kernel for call, owner in zip(calls, owners, strict=True) if owner == 3}
    others = {call.kernel for call, owner in zip(calls, owners, strict=True) if owner == 8}
    assert not own_kernels & others


def test_the_idle_call_runs_warm_code_and_is_not_the_first() -> None:
    board = load_target("x86-64-v3")
    joined = side_by_side({0: layer_program(gemm(8, 8), board)}, board)
    calls: list[Any] = joined.program.calls
    assert joined.idle > 0
    assert joined.owners[joined.idle] is None
    assert calls[joined.idle].kernel == calls[joined.idle - 1].kernel
    (written,) = calls[joined.idle].outputs
    assert joined.program.tensors[written].shape == (1,)
