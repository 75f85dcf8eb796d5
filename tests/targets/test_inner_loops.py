"""What the innermost loops of convolutions execute: products, and hardly anything else."""

import dataclasses

import pytest

from edgepress.targets.compile import kernel_assembly
from edgepress.targets.isa.base import load_isa
from edgepress.targets.kernel_code import KernelCode, kernel_codes
from edgepress.targets.program import Program
from edgepress.targets.schedules import conv
from tests.targets.kernels import FLOATS, requantise_to, target_of

#: Products of one instruction.
PRODUCTS = {
    "sdot": 16, "smmla": 32, "fmla": 4, "smull": 8, "smull2": 8, "smlal": 8, "smlal2": 8,
    "vmull.s8": 8, "vmlal.s8": 8, "vfma.f32": 4,
}  # fmt: skip
#: Products of the instruction that the set is measured by: sdot, smlal of 16 bits, fmla.
IDEAL = {"neon": 4, "neon_armv7": 4, "neon_dotprod": 16, "neon_i8mm": 16}


def code_of(isa_name: str, quantized: bool, kernel: tuple[int, int]) -> KernelCode:
    """Compile a layer without any rest: only whole tiles, whole vectors of inputs and outputs."""
    isa = load_isa(isa_name)
    size = conv.ConvShape(1, 8, 8, 128, 8, 8, 96, kernel)
    tile = conv.choose_tile(dataclasses.replace(size, out_width=840), isa, quantized)
    width = 8 * tile.rows
    shape = conv.ConvShape(
        1, 7 + kernel[0], width - 1 + kernel[1], 128, 8, width, 24 * tile.columns, kernel
    )
    epilogue = requantise_to(isa, 3) if quantized else FLOATS
    program = Program()
    program.kernels["layer"] = conv.conv("layer", shape, isa, epilogue, tile)
    return kernel_codes(kernel_assembly(program, target_of(isa_name)), ["layer"])["layer"]


def efficiency(code: KernelCode, ideal: int) -> float:
    """How many instructions the products would need, over those that the loops have."""
    products = sum(PRODUCTS[name] * count for name, count in code.loop_multiplies.items())
    return products / ideal / sum(code.loop_kinds.values())


@pytest.mark.parametrize("isa", IDEAL)
@pytest.mark.parametrize("kernel", [(3, 3), (1, 1)], ids=str)
def test_integers_need_hardly_more_than_their_products(isa: str, kernel: tuple[int, int]) -> None:
    code = code_of(isa, True, kernel)
    assert efficiency(code, IDEAL[isa]) >= 0.8
    assert code.loop_kinds.get("store", 0) == 0


@pytest.mark.parametrize(
    ("isa", "least"), [("neon", 0.8), ("neon_dotprod", 0.8), ("neon_armv7", 0.4)]
)
@pytest.mark.parametrize("kernel", [(3, 3), (1, 1)], ids=str)
def test_floats_too(isa: str, least: float, kernel: tuple[int, int]) -> None:
    """32-bit Arm has no fused product with an element, and half as many registers."""
    code = code_of(isa, False, kernel)
    assert efficiency(code, 4) >= least
    assert code.loop_kinds.get("store", 0) == 0


@pytest.mark.parametrize(
    ("isa", "multiply"),
    [("avx512_vnni", "vpdpbusd"), ("avx512", "vpmaddwd"), ("avx2", "vpmaddwd")],
)
@pytest.mark.parametrize("quantized", [True, False], ids=["integers", "floats"])
def test_x86_keeps_accumulators_in_registers(isa: str, multiply: str, quantized: bool) -> None:
    code = code_of(isa, quantized, (3, 3))
    assert code.multiply.startswith(multiply if quantized else "vfmadd")
    assert code.loop_kinds.get("store", 0) == 0
