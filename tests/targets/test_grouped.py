"""Convolutions in groups of few channels: several groups in one vector."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.targets.isa.base import load_isa
from edgepress.targets.lowering.build import lower
from edgepress.targets.program import Array, Program
from edgepress.targets.schedules.conv import ConvShape
from edgepress.targets.schedules.grouped import groups_together
from tests.graphs import answers, feeds, net, random
from tests.targets.interpret import run_program
from tests.targets.kernels import largest_weight, native_isas, target_of
from tests.targets.qdq import Qdq, check_graphs, inputs_of, merged_graphs, shaped
from tests.targets.test_bit_equality import EMULATED, emulate, need_board


@dataclass(frozen=True)
class Layer:
    """A grouped convolution: `groups` groups of so many inputs and outputs."""

    groups: int
    inputs: int
    outputs: int
    size: tuple[int, int] = (6, 9)
    kernel: tuple[int, int] = (3, 3)
    attributes: str = "pads=[1,1,1,1]"
    batch: int = 1

    @property
    def text(self) -> str:
        return f"group={self.groups}, {self.attributes}"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.batch, self.groups * self.inputs, *self.size)


LAYERS = [
    Layer(8, 2, 2),
    Layer(32, 4, 4, batch=2),
    Layer(12, 4, 4, attributes="pads=[0,2,1,0], strides=[2,1]"),
    Layer(24, 2, 2, attributes="pads=[2,2,2,2], dilations=[2,2]"),
    Layer(6, 8, 8, kernel=(1, 1), attributes="pads=[0,0,0,0]"),
    Layer(48, 1, 2),  # a depthwise convolution of two filters a channel
    Layer(16, 3, 2, kernel=(2, 3), attributes="pads=[0,1,1,1]"),
    Layer(9, 2, 3),
    Layer(10, 5, 1, size=(1, 1)),
    Layer(6, 6, 4, kernel=(1, 5), attributes="pads=[0,2,0,2]", size=(3, 17)),
    Layer(4, 16, 2),
    Layer(2, 40, 3),
]


def float_model(layer: Layer, followed: str = "") -> ir.Model:
    outputs = layer.groups * layer.outputs
    weights = {
        "w": random(outputs, layer.inputs, *layer.kernel),
        "b": random(outputs),
    }
    dims = ",".join(map(str, layer.shape))
    conv = f"Conv <{layer.text}> (x, w, b)"
    body = f"a = {conv} {followed}" if followed else f"y = {conv}"
    return shaped(net(f"(float[{dims}] x) => (float y)", body, weights))


def integer_model(layer: Layer, seed: int, dtypes: tuple[str, str]) -> ir.Model:
    graph, numbers = Qdq(layer.shape, dtypes[0]), np.random.default_rng(seed)
    outputs = layer.groups * layer.outputs
    shape = (outputs, layer.inputs, *layer.kernel)
    largest = largest_weight(dtypes[0], dtypes[1], int(np.prod(shape[1:])))
    w = numbers.integers(-largest, largest + 1, shape).astype(dtypes[1])
    source = graph.pair("x", (0.03, 100))
    named = graph.weight(w, numbers.uniform(0.2, 2, outputs).astype(np.float32) / largest)
    bias = graph.constant(numbers.uniform(-1, 1, outputs).astype(np.float32))
    out = graph.op("Conv", source, named, bias, attributes=layer.text)
    if seed % 2:
        out = graph.op("Relu", out)
    return graph.model(graph.pair(out, (0.05, 7)))


def calls_grouped(program: Program) -> int:
    return sum("grouped_" in call.kernel for call in program.calls)


def integer_models() -> list[ir.Model]:
    kinds = [("uint8", "int8")] * 3 + [("int16", "int8"), ("uint8", "int16")]
    return [
        integer_model(layer, seed, kinds[seed % len(kinds)]) for seed, layer in enumerate(LAYERS)
    ]


@pytest.mark.parametrize("isa", native_isas())
def test_floats_are_those_of_onnxruntime(isa: str) -> None:
    models = [float_model(layer) for layer in LAYERS]
    models += [float_model(LAYERS[1], "y = Relu (a)"), float_model(LAYERS[0], "y = Add (a, x)")]
    inputs = [feeds(model) for model in models]
    program, joined = merged_graphs(models, target_of(isa), inputs)
    assert calls_grouped(program) >= 8
    results = run_program(program, target_of(isa), joined)
    for index, (model, feed) in enumerate(zip(models, inputs, strict=True)):
        np.testing.assert_allclose(
            results[f"g{index}_y"], answers(model, feed)[0], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("isa", native_isas())
def test_integers_are_those_of_the_reference(isa: str) -> None:
    models = integer_models()
    inputs = inputs_of(models)
    program, joined = merged_graphs(models, target_of(isa), inputs)
    assert calls_grouped(program) >= 8
    results = run_program(program, target_of(isa), joined)
    assert check_graphs(models, inputs, results) == len(models)


@pytest.mark.parametrize("isa", EMULATED)
def test_boards(isa: str, tmp_path: Path) -> None:
    need_board(isa)
    models = integer_models()
    inputs: list[dict[str, Array]] = inputs_of(models)
    program, joined = merged_graphs(models, target_of(isa), inputs)
    assert check_graphs(models, inputs, emulate(program, isa, tmp_path, joined)) == len(models)


def shape_of(groups: int, inputs: int, outputs: int) -> ConvShape:
    return ConvShape(1, 8, 8, inputs, 8, 8, groups * outputs, groups=groups)


@pytest.mark.parametrize(
    ("isa", "groups", "inputs", "outputs", "quantized", "wanted"),
    [
        ("avx512", 32, 4, 4, False, 4),
        ("avx512", 6, 4, 4, False, 3),  # all of them, since 4 do not divide 6
        ("avx2", 32, 4, 4, False, 2),
        ("avx2", 32, 8, 8, False, 1),
        ("avx512", 32, 32, 4, False, 2),  # more inputs would be too many to shuffle
        ("avx512_vnni", 32, 32, 4, True, 4),
        ("neon", 32, 2, 2, True, 2),
        ("scalar", 32, 2, 2, False, 1),
    ],
)
def test_how_many_groups_share_a_vector(
    isa: str, groups: int, inputs: int, outputs: int, quantized: bool, wanted: int
) -> None:
    assert groups_together(shape_of(groups, inputs, outputs), load_isa(isa), quantized) == wanted


def test_wide_groups_are_convolved_one_by_one() -> None:
    program = lower(float_model(Layer(2, 40, 40)), target_of("avx2"))
    assert not calls_grouped(program)
