"""The kernel that measures a CPU's peak: what it computes, and that its loop does nothing else."""

from __future__ import annotations

import functools
import re

import numpy as np
import pytest

from edgepress.targets.compile import kernel_assembly
from edgepress.targets.isa.base import load_isa
from edgepress.targets.program import Program
from edgepress.targets.schedules import peak
from tests.targets.kernels import ISAS, Case, check, native_isas, target_of

DTYPES, STEPS = ("float32", "int8", "int16"), 36


@pytest.mark.parametrize("isa_name", native_isas())
def test_it_multiplies_and_adds(isa_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "PIECES", 6)
    monkeypatch.setattr(peak, "STEPS", STEPS)
    rng = np.random.default_rng(1)
    cases = []
    for dtype in DTYPES:
        isa, quantized = load_isa(isa_name).for_operands(dtype), dtype != "float32"
        rows, columns = peak.chains(isa, quantized)
        group, parts = isa.group if quantized else 1, peak.parts(isa, quantized)
        staged = isa.staged if quantized else "float32"
        x = rng.integers(0, 120, (STEPS // parts, rows, parts, group)).astype(staged)
        weights = rng.integers(-100, 100, (columns, isa.lanes, group)).astype(dtype)
        total = np.zeros((rows, columns, isa.lanes), np.int64)
        for part in range(parts):
            turned = np.roll(weights.astype(np.int64), -part, axis=0)
            total += np.einsum("srg,clg->rcl", x[:, :, part].astype(np.int64), turned)
        wanted = np.broadcast_to(total, (6, *total.shape))
        cases.append(
            Case(
                kernel=functools.partial(peak.peak, isa=isa, weights_dtype=dtype),
                arguments=(x.ravel(), weights.ravel()),
                wanted=wanted.astype("int32" if quantized else "float32"),
                what=f"{isa_name} {dtype}",
            )
        )
        assert peak.peak_macs(isa, quantized) == 6 * STEPS * rows * columns * isa.lanes * group
        assert peak.peak_sizes(isa, quantized) == (x.size, weights.size, wanted.size)
    check(cases, isa_name)


@pytest.mark.parametrize("isa_name", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_its_loop_holds_products_and_one_load_a_row(isa_name: str, dtype: str) -> None:
    """No accumulator is stored or read, and no product is computed once for all steps."""
    isa, program = load_isa(isa_name).for_operands(dtype), Program()
    program.kernels["k"] = peak.peak("k", isa, dtype)
    assembly = kernel_assembly(program, target_of(isa_name))
    loops = [body for body in innermost(assembly) if any(PRODUCT.match(line) for line in body)]
    assert len(loops) == 1
    (body,) = loops
    products = sum(PRODUCT.match(line) is not None for line in body)
    rows, columns = peak.chains(isa, dtype != "float32")
    steps, rest = divmod(products, rows * columns)
    assert (steps >= 1, rest) == (True, 0)
    assert not [line for line in body if STORE.match(line)]
    # what is no product: sums, loads and repetitions of inputs, and the loop itself
    others = rows * steps * 3 + 7
    sums = sum(ADDITION.match(line) is not None for line in body)
    assert len(body) - products - sums <= others


PRODUCT = re.compile(
    r"vfmadd|vpdp\w+|vpmaddwd|fmla\t|sdot|smmla|smlal|vmlal|vmul\.f32|vmla\.f32|vfma\.f32"
)
ADDITION = re.compile(r"vpaddd|vadd\.f32|sadalp|vpadal|v?s?mull")
STORE = re.compile(r"v?st[rmp]|vmov\w+\t%[xyz]mm\d+, .*\(")


def innermost(assembly: str) -> list[list[str]]:
    """Return the instructions of loops that are one block: from a label to a jump back to it."""
    loops: list[list[str]] = []
    label, body = "", list[str]()
    for line in assembly.splitlines():
        if found := re.match(r"(\.LBB\w+):", line):
            label, body = found[1], []
        elif re.match(r"\t[a-z]", line):
            body.append(line.strip())
            if label and re.search(rf"\b{re.escape(label.lstrip('.'))}$", line):
                loops.append(body)
                label, body = "", []
    return loops
