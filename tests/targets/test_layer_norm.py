"""Layer normalisation against float64, and its quantized rows against NumPy, to the bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st

from edgepress.targets.isa.base import load_isa
from edgepress.targets.lowering.dynamic_kernels import padded_width
from edgepress.targets.lowering.dynamic_reference import quantised_rows
from edgepress.targets.program import Array, Call, Program, Tensor
from edgepress.targets.schedules.layer_norm import LayerNormShape, layer_norm
from tests.targets.interpret import run_program
from tests.targets.kernels import native_isas, target_of
from tests.targets.qdq import drawn, merged
from tests.targets.test_bit_equality import EMULATED, emulate, need_board

TOLERANCE = 2e-6  # of the largest value of a row


def random_inputs(shape: LayerNormShape, seed: int) -> dict[str, Array]:
    """Rows whose means are large and small, and constants per column."""
    random = np.random.default_rng(seed)

    def normal(*size: int) -> Array:
        return random.standard_normal(size).astype(np.float32)

    x = normal(shape.rows, shape.width)
    x *= 10 ** random.uniform(-2, 2, (shape.rows, 1)).astype(np.float32)
    x += random.choice([0, 1, -20], (shape.rows, 1)).astype(np.float32)
    given = {
        "x": x,
        "residual": normal(shape.rows, shape.width),
        "scale": normal(shape.width),
        "shift": normal(shape.width),
        "factors": np.abs(normal(shape.width)) + np.float32(0.1),
    }
    wanted = (True, shape.residual, shape.scaled, shape.shifted, shape.factors)
    return {name: a for (name, a), there in zip(given.items(), wanted, strict=True) if there}


def program_of(shape: LayerNormShape, isa: str, feeds: Mapping[str, Array]) -> Program:
    """One call; what it reads are inputs, what it writes are outputs."""
    program = Program()
    program.kernels["k"] = layer_norm("k", shape, load_isa(isa))
    outputs: dict[str, tuple[str, tuple[int, ...]]] = {}
    outputs["y"] = ("float32", (shape.rows, shape.width))
    if shape.sum_read:
        outputs["sum"] = ("float32", (shape.rows, shape.width))
    if shape.padded:
        outputs["q"] = (load_isa(isa).staged, (shape.rows, shape.padded))
        outputs["step"], outputs["point"] = ("float32", (shape.rows,)), ("int32", (shape.rows,))
    for name, array in feeds.items():
        program.tensors[name] = Tensor(name, str(array.dtype), array.shape)
    for name, (dtype, size) in outputs.items():
        program.tensors[name] = Tensor(name, dtype, size)
    program.calls.append(Call("k", (*feeds, *outputs), tuple(outputs), "norm"))
    program.inputs, program.outputs = tuple(feeds), tuple(outputs)
    return program


def check(
    shape: LayerNormShape, isa: str, feeds: Mapping[str, Array], got: Mapping[str, Array]
) -> None:
    """Compare a normalisation with float64, and rows with what they must be for its own floats."""
    total = feeds["x"]
    if shape.residual:
        total = total + feeds["residual"]
    if shape.sum_read:
        np.testing.assert_array_equal(got["sum"], total)
    exact = total.astype(np.float64)
    centred = exact - exact.mean(axis=1, keepdims=True) * shape.centred
    deviation = np.sqrt((centred**2).mean(axis=1, keepdims=True) + shape.epsilon)
    wanted = centred / deviation * feeds.get("scale", 1) + feeds.get("shift", 0)
    # what float32 loses of a value that is small beside the mean cannot come back
    lost = 1 + np.abs(exact).max(axis=1, keepdims=True) / deviation
    size = np.abs(feeds.get("scale", np.ones(1))).max() * lost + np.abs(wanted).max()
    assert (np.abs(got["y"] - wanted) / size).max() < TOLERANCE, shape
    if not shape.padded:
        return
    steps, step, point = quantised_rows(got["y"] * feeds.get("factors", np.float32(1)))
    lowest = -128 if load_isa(isa).storage == "int8" else 0
    np.testing.assert_array_equal(got["step"], step[:, 0])
    np.testing.assert_array_equal(got["point"], point[:, 0] + lowest)
    np.testing.assert_array_equal(got["q"][:, : shape.width], steps.astype(np.int32) + lowest)
    assert not got["q"][:, shape.width :].any()


def shapes(isa: str) -> list[LayerNormShape]:
    """Every form, of rows and widths that divide by nothing."""
    plain = LayerNormShape(rows=1, width=1, epsilon=1e-3)
    forms = [
        plain,
        dataclasses.replace(plain, rows=9, width=37, epsilon=1e-12),
        dataclasses.replace(plain, rows=5, width=64, residual=True, scaled=False),
        dataclasses.replace(plain, rows=6, width=50, residual=True, sum_read=True, shifted=False),
        dataclasses.replace(plain, rows=7, width=129, centred=False, shifted=False),
        dataclasses.replace(plain, rows=3, width=16, centred=False, scaled=False, residual=True),
        dataclasses.replace(plain, rows=120, width=560, residual=True, sum_read=True),  # threads
    ]
    quantized = [
        dataclasses.replace(
            form, padded=padded_width(form.width, load_isa(isa)), factors=index % 2 == 0
        )
        for index, form in enumerate(forms[1:])
    ]
    return forms + quantized


def answer(
    all_shapes: Sequence[LayerNormShape], isa: str, all_feeds: Sequence[Mapping[str, Array]]
) -> list[dict[str, Array]]:
    """Run one program with all of them."""
    pairs = list(zip(all_shapes, all_feeds, strict=True))
    program = merged([program_of(shape, isa, feeds) for shape, feeds in pairs])
    joined = {f"g{i}_{n}": a for i, (_, feeds) in enumerate(pairs) for n, a in feeds.items()}
    results = run_program(program, target_of(isa), joined)
    return [
        {n.removeprefix(f"g{i}_"): a for n, a in results.items() if n.startswith(f"g{i}_")}
        for i in range(len(pairs))
    ]


@pytest.mark.parametrize("isa", native_isas())
def test_every_form(isa: str) -> None:
    chosen = shapes(isa)
    feeds = [random_inputs(shape, seed) for seed, shape in enumerate(chosen)]
    for shape, given, got in zip(chosen, feeds, answer(chosen, isa, feeds), strict=True):
        check(shape, isa, given, got)


FORMS = st.builds(
    LayerNormShape,
    rows=st.integers(1, 13),
    width=st.integers(1, 70),
    epsilon=st.sampled_from([1e-12, 1e-5, 0.5]),
    centred=st.booleans(),
    scaled=st.booleans(),
    shifted=st.booleans(),
    residual=st.booleans(),
    padded=st.integers(0, 1),
)


def test_any_form() -> None:
    isa, chosen, feeds = native_isas()[-1], [], []
    for seed, form in enumerate(drawn(FORMS, 8)):
        padded = padded_width(form.width, load_isa(isa)) if form.padded else 0
        chosen.append(
            dataclasses.replace(
                form,
                padded=padded,
                factors=padded > 0 and seed % 3 > 0,
                sum_read=form.residual and seed % 2 == 0,
            )
        )
        feeds.append(random_inputs(chosen[-1], seed))
    for shape, given, got in zip(chosen, feeds, answer(chosen, isa, feeds), strict=True):
        check(shape, isa, given, got)


@pytest.mark.parametrize("isa", native_isas())
def test_rows_that_hold_nan_or_infinity_harm_no_other(isa: str) -> None:
    shape = LayerNormShape(rows=9, width=21, epsilon=1e-5, padded=24)
    feeds = random_inputs(shape, 0)
    feeds["x"][[0, 4], 3], feeds["x"][7, 20] = np.nan, np.inf
    got = run_program(program_of(shape, isa, feeds), target_of(isa), feeds)
    whole = ~np.isin(np.arange(9), (0, 4, 7))
    assert np.isfinite(got["y"][whole]).all()
    assert np.isfinite(got["step"][whole]).all()
    assert np.isnan(got["y"][~whole]).all()
    assert np.isnan(got["step"][~whole]).all()


def test_a_large_mean_costs_no_digits() -> None:
    shape = LayerNormShape(rows=4, width=384, epsilon=0.0, scaled=False, shifted=False)
    random = np.random.default_rng(0)
    x = (1000 + random.integers(-8, 9, (4, 384)) / 8).astype(np.float32)  # exact in float32
    isa = native_isas()[-1]
    got = run_program(program_of(shape, isa, {"x": x}), target_of(isa), {"x": x})["y"]
    wanted = (x - x.mean(axis=1, keepdims=True, dtype=np.float64)) / x.std(
        axis=1, keepdims=True, dtype=np.float64
    )
    np.testing.assert_allclose(got, wanted, atol=3e-4)


@pytest.mark.parametrize("isa", EMULATED)
def test_boards(isa: str, tmp_path: Path) -> None:
    need_board(isa)
    shape = LayerNormShape(7, 37, 1e-5, residual=True, sum_read=True, factors=True)
    shape = dataclasses.replace(shape, padded=padded_width(37, load_isa(isa)))
    feeds = random_inputs(shape, 1)
    check(shape, isa, feeds, emulate(program_of(shape, isa, feeds), isa, tmp_path, feeds))
