"""Winograd's filtering against the direct sum in float64."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from edgepress.targets.isa.base import Isa, load_isa
from edgepress.targets.lowering.build import lower
from edgepress.targets.program import Array, Call, Program, Tensor
from edgepress.targets.schedules.conv import Tile
from edgepress.targets.schedules.epilogue import Added, Clip
from edgepress.targets.schedules.winograd import winograd
from edgepress.targets.schedules.winograd_layout import (
    WinogradPlan,
    WinogradShape,
    pack_weights,
    scratch_size,
)
from edgepress.targets.schedules.winograd_plan import choose_plan, cost, direct_cost
from edgepress.targets.schedules.winograd_transforms import F2, F4, Arithmetic, Transform
from tests.graphs import answers, feeds, net, random
from tests.targets.interpret import run_program
from tests.targets.kernels import FLOATS, ISAS, native_isas, target_of
from tests.targets.qdq import shaped
from tests.targets.test_bit_equality import emulate, need_board

# Floats are the same with VNNI and without.
NATIVE = [name for name in native_isas() if name != "avx512_vnni"]
ERRORS = {F2: 1e-6, F4: 4e-6}  # of the largest output
FUSED = Added(Clip(-1.0, np.inf), Clip(0.0, 2.5))


@dataclass(frozen=True)
class Case:
    """A layer of random values and how to compute it."""

    shape: WinogradShape
    plan: WinogradPlan
    epilogue: Clip | Added = FLOATS
    seed: int = 0

    def arrays(self) -> list[Array]:
        """Return x, `[out, in, 3, 3]` weights, bias and the residual if there is one."""
        random, s = np.random.default_rng(self.seed), self.shape
        outputs = (s.batch, s.out_height, s.out_width, s.out_channels)
        shapes = [(s.batch, s.height, s.width, s.channels), (s.out_channels, s.channels, 3, 3),
                  (s.out_channels,)]  # fmt: skip
        if isinstance(self.epilogue, Added):
            shapes.append(outputs)
        x, w, *others = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
        return [np.maximum(x, 0), w / np.float32((9 * s.channels) ** 0.5), *others]

    def wanted(self) -> Array:
        """Return the outputs in float64, tap by tap."""
        s, (x, w, bias, *residual) = self.shape, self.arrays()
        below, right = (
            max(out + 2 - before - size, 0)
            for out, before, size in (
                (s.out_height, s.top, s.height), (s.out_width, s.left, s.width),
            )
        )  # fmt: skip
        padded = np.pad(x.astype(np.float64), ((0, 0), (s.top, below), (s.left, right), (0, 0)))
        y = np.zeros((s.batch, s.out_height, s.out_width, s.out_channels)) + bias
        for i in range(3):
            for j in range(3):
                seen = padded[:, i : i + s.out_height, j : j + s.out_width]
                y += seen @ w[:, :, i, j].T.astype(np.float64)
        if isinstance(self.epilogue, Clip):
            return np.clip(y, self.epilogue.low, self.epilogue.high)
        inner, final = self.epilogue.inner, self.epilogue.final
        assert isinstance(inner, Clip)
        assert isinstance(final, Clip)
        return np.clip(np.clip(y, inner.low, inner.high) + residual[0], final.low, final.high)


def program_of(cases: list[Case], isa: Isa) -> tuple[Program, dict[str, Array]]:
    """One program that calls the kernel of every case, and its feeds."""
    program, given = Program(), dict[str, Array]()
    for number, case in enumerate(cases):
        x, weights, *others = case.arrays()
        constants = [pack_weights(weights, isa, case.plan.tile.columns), *others]
        names = [f"k{number}_a{i}" for i in range(1 + len(constants))]
        scratch, y = f"k{number}_scratch", f"k{number}_out"
        size = (scratch_size(case.shape, isa, case.plan),)
        program.tensors[names[0]] = Tensor(names[0], "float32", x.shape)
        program.tensors[scratch] = Tensor(scratch, "float32", size)
        program.tensors[y] = Tensor(y, "float32", case.wanted().shape)
        program.constants.update(zip(names[1:], constants, strict=True))
        kernel = winograd(f"k{number}", case.shape, isa, case.epilogue, case.plan)
        program.kernels[f"k{number}"] = kernel
        program.calls.append(Call(f"k{number}", (*names, scratch, y), (scratch, y), "layer"))
        given[names[0]] = x
    program.inputs = tuple(given)
    program.outputs = tuple(f"k{number}_out" for number in range(len(cases)))
    return program, given


def compare(cases: list[Case], results: dict[str, Array]) -> None:
    for number, case in enumerate(cases):
        wanted, answer = case.wanted(), results[f"k{number}_out"]
        error = np.abs(answer - wanted).max() / np.abs(wanted).max()
        assert error < ERRORS[case.plan.transform], case


def check(cases: list[Case], isa_name: str) -> None:
    program, given = program_of(cases, load_isa(isa_name))
    compare(cases, run_program(program, target_of(isa_name), given))


def grid(isa: Isa) -> list[Case]:
    """Both orders of loops, odd sizes, few and many channels, pads on one side, batches."""
    lanes = isa.lanes

    def case(
        shape: tuple[int, ...],
        transform: Transform,
        weights_first: bool,
        lines: int,
        depth: int,
        tile: tuple[int, int],
        epilogue: Clip | Added = FUSED,
    ) -> Case:
        depth = shape[3] if weights_first else depth
        plan = WinogradPlan(transform, weights_first, lines, depth, Tile(*tile))
        return Case(WinogradShape(*shape), plan, epilogue, seed=len(shape) + depth)

    odd, wide = 2 * lanes + 3, 3 * lanes
    return [
        # batch, height, width, channels, top, left, out height, out width, out channels
        case((1, 7, 7, wide, 1, 1, 7, 7, 2 * lanes), F4, False, 2, lanes, (4, 1)),
        case((2, 5, 9, odd, 1, 0, 5, 8, wide + 1), F4, True, 3, 0, (3, 2), Clip(0.0)),
        case((2, 5, 9, odd, 1, 0, 5, 8, wide + 1), F2, False, 2, lanes + 2, (5, 2), Clip(high=1.0)),
        case((1, 1, 1, 5, 1, 1, 1, 1, 3), F2, True, 1, 0, (1, 1)),
        case((1, 6, 2, lanes, 0, 2, 7, 4, lanes - 1), F4, False, 1, 3, (1, 1), Clip()),
        case((1, 13, 6, 3, 2, 1, 13, 6, 2 * lanes), F2, True, 4, 0, (6, 2)),
    ]


@pytest.mark.parametrize("isa_name", NATIVE)
def test_grid(isa_name: str) -> None:
    check(grid(load_isa(isa_name)), isa_name)


@pytest.mark.parametrize("isa_name", ["neon", "neon_armv7"])
def test_boards(isa_name: str, tmp_path: Path) -> None:
    need_board(isa_name)
    cases = grid(load_isa(isa_name))[:2]
    program, given = program_of(cases, load_isa(isa_name))
    compare(cases, emulate(program, isa_name, tmp_path, given))


SIZES = st.integers(1, 10)


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    height, width, channels, out_channels = (draw(SIZES), draw(SIZES), draw(SIZES), draw(SIZES))
    top, left = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    shape = WinogradShape(
        draw(st.integers(1, 2)), height, width, channels, top, left,
        max(height + top - draw(st.integers(0, 2)), 1),
        max(width + left - draw(st.integers(0, 2)), 1), 3 * out_channels,
    )  # fmt: skip
    transform, weights_first = draw(st.sampled_from([F2, F4])), draw(st.booleans())
    rows, _ = shape.tiles(transform)
    depth = channels if weights_first else draw(st.integers(1, channels))
    tile = Tile(draw(st.integers(1, 5)), draw(st.integers(1, 2)))
    plan = WinogradPlan(transform, weights_first, draw(st.integers(1, rows)), depth, tile)
    epilogue = FUSED if draw(st.booleans()) else FLOATS
    return Case(shape, plan, epilogue, draw(st.integers(0, 99)))


@pytest.mark.parametrize("isa_name", NATIVE[:1])
@settings(max_examples=2, deadline=None, derandomize=True, phases=[Phase.generate])
@given(cases=st.lists(any_case(), min_size=3, max_size=3))
def test_drawn_layers(isa_name: str, cases: list[Case]) -> None:
    check(cases, isa_name)


@pytest.mark.parametrize("transform", [F2, F4])
def test_transforms_are_exact(transform: Transform) -> None:
    arithmetic = Arithmetic(lambda factor, value: Fraction(factor) * value, lambda value: value)
    random = np.random.default_rng(0)
    d = [Fraction(int(value)) for value in random.integers(-99, 99, transform.inputs)]
    g = [Fraction(int(value)) for value in random.integers(-99, 99, 3)]
    products = [
        u * v
        for u, v in zip(
            transform.weights(g, arithmetic), transform.data(d, arithmetic), strict=True
        )
    ]
    for count in range(1, transform.outputs + 1):
        result = transform.result(products, arithmetic, count)
        wanted = [sum(g[k] * d[i + k] for k in range(3)) for i in range(count)]
        assert [float(value) for value in result] == pytest.approx([float(v) for v in wanted])


@pytest.mark.parametrize("transform", [F2, F4])
def test_missing_inputs_are_zeros(transform: Transform) -> None:
    arithmetic = Arithmetic(lambda factor, value: factor * value, lambda value: value)
    some = [None, *map(float, range(3, transform.inputs)), None, None][: transform.inputs]
    whole = [0.0 if value is None else value for value in some]
    got = [value or 0.0 for value in transform.data(some, arithmetic)]
    assert got == transform.data(whole, arithmetic)
    assert transform.data([None] * transform.inputs, arithmetic) == [None] * transform.inputs


def test_the_errors_of_a_long_sum() -> None:
    """The budget that `winograd_transforms` states, with as many channels as real layers have."""
    shape = WinogradShape(1, 8, 8, 128, 1, 1, 8, 8, 16)
    cases = [
        Case(shape, WinogradPlan(transform, False, lines, 32, Tile(4, 1)), seed=seed)
        for seed, (transform, lines) in enumerate(((F2, 4), (F4, 2)))
    ]
    for name in NATIVE[:1]:
        check(cases, name)


# Which layers ---------------------------------------------------------------------------------

RESNET = [(56, 64), (28, 128), (14, 256), (7, 512)]


@pytest.mark.parametrize("isa_name", ISAS)
def test_plans(isa_name: str) -> None:
    isa = load_isa(isa_name)
    for size, channels in RESNET:
        shape = WinogradShape(1, size, size, channels, 1, 1, size, size, channels)
        plan = choose_plan(shape, isa)
        assert plan is not None
        assert plan == choose_plan(shape, isa)
        assert cost(shape, isa, plan) < direct_cost(shape, isa)
        tile = plan.tile
        assert tile.rows * tile.columns + tile.columns < isa.vector_registers
        rows, columns = shape.tiles(plan.transform)
        assert 1 <= plan.lines <= rows
        assert tile.rows <= plan.lines * columns
        assert 1 <= plan.depth <= channels
        assert 4 * scratch_size(shape, isa, plan) <= 2**20 + 2**16


def test_layers_that_stay_direct() -> None:
    few = WinogradShape(1, 112, 112, 3, 1, 1, 112, 112, 32)
    pixel = WinogradShape(1, 1, 1, 256, 1, 1, 1, 1, 256)
    for name in ISAS:
        assert choose_plan(few, load_isa(name)) is None
        assert choose_plan(pixel, load_isa(name)) is None
    large = WinogradShape(1, 56, 56, 64, 1, 1, 56, 56, 64)
    assert choose_plan(large, load_isa("scalar")) is None


def kernels_of(model: ir.Model) -> set[str]:
    program = lower(model, target_of(NATIVE[0]))
    return {call.kernel.rpartition("_")[0] for call in program.calls}


@pytest.mark.skipif(not NATIVE, reason="no instruction set of this machine has kernels")
def test_only_3x3_with_stride_1_in_one_group() -> None:
    signature = "(float[1,32,28,28] x) => (float y)"
    body = "y = Conv <pads=[1,1,1,1]{}> (x, w)"
    weights: dict[str, Any] = {"w": random(32, 32, 3, 3)}
    assert "winograd" in kernels_of(shaped(net(signature, body.format(""), weights, opset=19)))
    for attribute in (", strides=[1,2]", ", dilations=[2,2]"):
        model = shaped(net(signature, body.format(attribute), weights, opset=19))
        assert "winograd" not in kernels_of(model)
    others = {"": random(32, 32, 3, 1), ", group=2": random(32, 16, 3, 3)}
    for attribute, w in others.items():
        model = shaped(net(signature, body.format(attribute), {"w": w}, opset=19))
        assert "winograd" not in kernels_of(model)


@pytest.mark.skipif(not NATIVE, reason="no instruction set of this machine has kernels")
def test_a_residual_block() -> None:
    body = """
        a = Conv <pads=[1,1,1,1]> (x, v, b)
        r = Relu(a)
        c = Conv <pads=[1,1,1,1]> (r, w)
        s = Add(c, x)
        y = Relu(s)
    """
    weights: dict[str, Any] = {
        "v": random(32, 32, 3, 3) / 8,
        "w": random(32, 32, 3, 3) / 8,
        "b": random(32),
    }
    proto = net("(float[2,32,9,14] x) => (float[2,32,9,14] y)", body, weights, opset=19)
    target = target_of(NATIVE[0])
    program = lower(shaped(proto), target)
    assert [call.kernel.rpartition("_")[0] for call in program.calls].count("winograd") == 2
    assert len(program.calls) <= 4  # to NHWC and back beside them: the addition is fused
    given = feeds(proto)
    (wanted,) = answers(proto, given)
    result = run_program(program, target, given)["y"]
    np.testing.assert_allclose(result, wanted, 0, 4e-6 * np.abs(wanted).max())
