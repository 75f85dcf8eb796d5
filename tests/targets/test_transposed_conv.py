"""Transposed convolutions as dense ones: equal results, and no product of a zero in between."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.targets.coverage import work_of
from edgepress.targets.isa.base import load_isa
from edgepress.targets.lowering.build import lower
from edgepress.targets.lowering.transposed_conv import joined, phases
from edgepress.targets.schedules.interlace import InterlaceShape
from tests.graphs import answers, feeds, net, random
from tests.targets.interpret import run_program
from tests.targets.kernels import native_isas, target_of
from tests.targets.qdq import merged_graphs, shaped
from tests.targets.test_bit_equality import emulate, need_board

CASES = {
    "stride equals kernel": ((1, 6, 5, 7), (6, 20, 2, 2), "strides=[2,2]"),
    "phases of different sizes": (
        (1, 6, 5, 4), (6, 9, 3, 3), "strides=[2,2], pads=[1,1,1,1], output_padding=[1,0]",
    ),
    "even kernel": ((2, 3, 4, 4), (3, 24, 4, 4), "strides=[2,2], pads=[1,1,1,1]"),
    "one output channel": ((1, 8, 6, 5), (8, 1, 4, 4), "strides=[2,2], pads=[1,1,1,1]"),
    "joined, cropped": ((1, 8, 3, 3), (8, 2, 3, 3), "strides=[3,2], pads=[0,1,1,1]"),
    "stride 1": ((1, 4, 5, 5), (4, 10, 3, 3), "pads=[1,1,1,1]"),
    "groups": ((1, 12, 4, 5), (12, 6, 4, 4), "strides=[2,2], pads=[1,1,1,1], group=4"),
    "depthwise": ((1, 20, 4, 5), (20, 1, 4, 4), "strides=[2,2], pads=[1,1,1,1], group=20"),
    "empty phases": ((1, 4, 4, 4), (4, 5, 1, 2), "strides=[3,3]"),
    "dilated": ((1, 4, 5, 4), (4, 5, 3, 2), "strides=[2,3], dilations=[2,2], pads=[1,0,2,1]"),
    "pads beyond the kernel": ((1, 3, 6, 6), (3, 5, 2, 2), "strides=[2,2], pads=[5,4,3,3]"),
    "one pixel": ((1, 5, 1, 1), (5, 33, 7, 7), "strides=[1,1]"),
}  # fmt: skip


def model(
    x: tuple[int, ...], w: tuple[int, ...], attributes: str, bias: bool = True, then: str = ""
) -> ir.Model:
    groups = int(attributes.partition("group=")[2] or 1)
    node = f"ConvTranspose <{attributes}> (x, w{', b' if bias else ''})"
    body = f"a = {node} {then}" if then else f"y = {node}"
    weights = {"w": random(*w), "b": random(w[1] * groups)}
    if not bias:
        del weights["b"]
    return shaped(net(f"(float[{','.join(map(str, x))}] x) => (float y)", body, weights))


@pytest.mark.parametrize("isa", native_isas())
def test_cases(isa: str) -> None:
    models = [model(*case) for case in CASES.values()]
    models.append(model(*CASES["even kernel"], bias=False))
    models.append(model(*CASES["even kernel"], then="y = Relu (a)"))
    models.append(model(*CASES["even kernel"], then="c = Relu (a) y = Add (a, c)"))
    inputs = [feeds(each) for each in models]
    program, given = merged_graphs(models, target_of(isa), inputs)
    assert not any("conv2d_transpose" in name for name in program.kernels)
    results = run_program(program, target_of(isa), given)
    for index, (each, feed) in enumerate(zip(models, inputs, strict=True)):
        np.testing.assert_allclose(
            results[f"g{index}_y"], answers(each, feed)[0], rtol=1e-4, atol=1e-4
        )


def test_a_board(tmp_path: Path) -> None:
    need_board("neon")
    models = [model(*case) for case in CASES.values()]
    inputs = [feeds(each) for each in models]
    program, given = merged_graphs(models, target_of("neon"), inputs)
    results = emulate(program, "neon", tmp_path, given)
    for index, (each, feed) in enumerate(zip(models, inputs, strict=True)):
        np.testing.assert_allclose(
            results[f"g{index}_y"], answers(each, feed)[0], rtol=1e-4, atol=1e-4
        )


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 7), st.integers(1, 5), st.integers(1, 4),
    st.integers(0, 8), st.integers(0, 3), st.integers(0, 3),
)  # fmt: skip
def test_phases_are_the_definition(
    size: int, kernel: int, stride: int, dilation: int, before: int, after: int, extra: int
) -> None:
    """Along one axis, against the sums that ONNX defines."""
    out = stride * (size - 1) + extra + (kernel - 1) * dilation + 1 - before - after
    if out < 1:
        return
    x, w = np.arange(1.0, size + 1), 10.0 ** np.arange(kernel)
    wanted = np.zeros(out)
    for i in range(size):
        for k in range(kernel):
            o = stride * i + dilation * k - before
            if 0 <= o < out:
                wanted[o] += x[i] * w[k]
    parts = phases(out, kernel, stride, dilation, before)
    for each in (parts, joined(parts)):
        answer = np.full((max(part.count for part in each), stride), np.nan)
        for rest, part in enumerate(each):
            assert part.first <= 0
            for q in range(part.count):
                reads = [(q + part.first + t * part.step, tap) for t, tap in enumerate(part.taps)]
                answer[q, rest] = sum(
                    x[i] * w[tap] for i, tap in reads if tap is not None and 0 <= i < size
                )
        np.testing.assert_array_equal(answer.ravel()[:out], wanted)


@pytest.mark.parametrize(
    ("channels", "kernel"), [((32, 32), 2), ((32, 32), 4), ((32, 64), 3), ((32, 1), 4)]
)
def test_no_more_is_multiplied_than_has_to_be(channels: tuple[int, int], kernel: int) -> None:
    inputs, outputs = channels
    pads = (kernel - 2) // 2
    attributes = f"strides=[2,2], pads=[{pads},{pads},{pads},{pads}]"
    isa, size = load_isa("avx2"), 8
    made = model((1, inputs, size, size), (inputs, outputs, kernel, kernel), attributes)
    work = work_of_convolutions(made)
    # Two columns of one output channel share a vector; else each phase has its own taps alone.
    vectors = math.ceil(outputs / isa.lanes) if outputs > 1 else 3 / 4
    needed = (size * kernel) ** 2 * inputs * vectors * isa.lanes
    assert work <= 1.25 * needed + 5e4


def work_of_convolutions(made: ir.Model) -> int:
    program = lower(made, target_of("avx2"))
    return sum(
        work_of(kernel).vector + work_of(kernel).scalar
        for name, kernel in program.kernels.items()
        if name.startswith("conv")
    )


def test_sizes_of_phases() -> None:
    shape = InterlaceShape(1, 5, 7, 3, (2, 1), joined=2)
    assert [shape.rows(phase) for phase in (0, 1)] == [3, 2]
    assert shape.columns(0) == 8
    assert [InterlaceShape(1, 5, 7, 3, (2, 2)).columns(phase) for phase in (0, 1)] == [4, 3]
