"""What every instruction set promises, and the instructions that LLVM makes of the kernels."""

import re

import pytest

from edgepress.targets.compile import kernel_assembly
from edgepress.targets.isa.base import load_isa
from edgepress.targets.schedules.epilogue import Clip, Epilogue
from tests.targets.kernels import (
    ISAS,
    Window,
    conv_case,
    depthwise_case,
    program_of,
    requantise_to,
    target_of,
)

DOT = {
    "avx2": r"vpmaddwd\s.*%ymm",
    "avx512": r"vpmaddwd\s.*%zmm",
    "avx512_vnni": r"vpdpbusd\s.*%zmm",
    "neon": r"smlal2?\s+v\d+\.8h",  # bytes by pairs
    "neon_dotprod": r"sdot\s+v\d+\.4s",
    "neon_i8mm": r"smmla\s+v\d+\.4s",
    "neon_armv7": r"vmlal\.s8\s+q",
}
WIDE_DOT = DOT | {
    "avx512_vnni": r"vpdpwssd\s.*%zmm",
    "neon": r"smlal2?\s+v\d+\.4s",
    "neon_dotprod": r"smlal2?\s+v\d+\.4s",
    "neon_i8mm": r"smlal2?\s+v\d+\.4s",
    "neon_armv7": r"vmlal\.s16\s+[qd]",
}
FLOAT = {
    "avx2": r"vfmadd\d+ps\s.*%ymm",
    "avx512": r"vfmadd\d+ps\s.*%zmm",
    "avx512_vnni": r"vfmadd\d+ps\s.*%zmm",
    "neon": r"fmla\s+v\d+\.4s",
    "neon_dotprod": r"fmla\s+v\d+\.4s",
    "neon_i8mm": r"fmla\s+v\d+\.4s",
    "neon_armv7": r"v(mul|mla|fma)\.f32\s+q",
}
DEPTHWISE = {
    "avx2": r"vpmaddwd\s.*%ymm",
    "avx512": r"vpmaddwd\s.*%zmm",
    "avx512_vnni": r"vpdpbusd\s.*%zmm",
    "neon": r"sm(ul|la)l2?\s+v\d+\.8h",
    "neon_dotprod": r"sdot\s+v\d+\.4s",
    "neon_i8mm": r"sdot\s+v\d+\.4s",
    "neon_armv7": r"vm(ul|la)l\.s8\s+q",
}
WIDE_DEPTHWISE = {  # LLVM may split vpdpwssd
    "avx2": r"vpmaddwd\s.*%ymm",
    "avx512": r"vpmaddwd\s.*%zmm",
    "avx512_vnni": r"vp(dpwssd|maddwd)\s.*%zmm",
    "neon": r"smlal2?\s+v\d+\.4s",
    "neon_dotprod": r"smlal2?\s+v\d+\.4s",
    "neon_i8mm": r"smlal2?\s+v\d+\.4s",
    "neon_armv7": r"vm(ul|la)l\.s16\s+q",
}
# products of pairs and repeated inputs take more registers than the tile leaves
SPILLING = {"neon", "neon_armv7"}
SATURATING = r"vpmaddubsw|vpdpbusds|vpdpwssds|sqdmlal|vqdmlal"


def assembly(
    isa_name: str,
    quantized: bool,
    depthwise: bool = False,
    operands: tuple[str, str] = ("", "int8"),
) -> str:
    isa = load_isa(isa_name)
    epilogue: Epilogue = requantise_to(isa) if quantized else Clip(0.0)
    window = Window(out=(14, 14), channels=64, out_channels=64, kernel=(3, 3))
    make = depthwise_case if depthwise else conv_case
    program, _ = program_of([make(window, isa, epilogue, operands=operands)])
    return kernel_assembly(program, target_of(isa_name))


def innermost(text: str, pattern: str) -> list[str]:
    """The loop without a loop inside that has most lines that match."""
    lines = text.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\.L\w+):", line))}
    loops: list[tuple[int, int]] = []
    for end, line in enumerate(lines):
        target = re.match(r"\s+(?:j\w+|b\S*|t?cbn?z\s.*)\s+(\.L\w+)\s*$", line)
        start = labels.get(target[1], end) if target else end
        if start < end and not any(start <= first and last <= end for first, last in loops):
            loops.append((start, end))
    assert loops, "no loop found"
    bodies = [lines[start : end + 1] for start, end in loops]
    return max(bodies, key=lambda body: sum(bool(re.search(pattern, line)) for line in body))


def spills(loop: list[str]) -> list[str]:
    """Lines that use the stack."""
    return [line for line in loop if re.search(r"%rsp|\bsp\b", line)]


@pytest.mark.parametrize("isa_name", ISAS)
def test_an_isa_is_consistent(isa_name: str) -> None:
    isa = load_isa(isa_name)
    assert isa.name == isa_name
    assert isa.storage in ("uint8", "int8")
    assert isa.staged in (isa.storage, "int16")
    wide = isa.for_operands("int16", "int8")
    assert (wide.storage, wide.staged, wide.lanes) == ("int16", "int16", isa.lanes)
    assert isa.for_operands("uint8", "int8") is isa
    assert isa.lanes * 4 == isa.vector_bytes
    assert target_of(isa_name).isa == isa_name


def test_an_unknown_isa() -> None:
    with pytest.raises(ModuleNotFoundError, match="mmx"):
        load_isa("mmx")
    with pytest.raises(AttributeError, match="ISA"):
        load_isa("base")


@pytest.mark.parametrize("isa_name", ISAS)
def test_integer_convolutions(isa_name: str) -> None:
    text = assembly(isa_name, quantized=True)
    loop = innermost(text, DOT[isa_name])
    dots = [line for line in loop if re.search(DOT[isa_name], line)]
    assert len(dots) >= 8
    assert not re.search(SATURATING, text)
    assert isa_name in SPILLING or not spills(loop), "\n".join(loop)


@pytest.mark.parametrize("operands", [("int16", "int8"), ("int16", "int16")])
@pytest.mark.parametrize("isa_name", ISAS)
def test_16_bit_convolutions(isa_name: str, operands: tuple[str, str]) -> None:
    text = assembly(isa_name, quantized=True, operands=operands)
    loop = innermost(text, WIDE_DOT[isa_name])
    dots = [line for line in loop if re.search(WIDE_DOT[isa_name], line)]
    assert len(dots) >= 8
    assert not re.search(SATURATING, text)
    assert isa_name in SPILLING or not spills(loop), "\n".join(loop)


@pytest.mark.parametrize("isa_name", ISAS)
def test_16_bit_depthwise_convolutions(isa_name: str) -> None:
    text = assembly(isa_name, quantized=True, depthwise=True, operands=("int16", "int8"))
    assert len(re.findall(WIDE_DEPTHWISE[isa_name], text)) >= 9
    assert not re.search(SATURATING, text)


@pytest.mark.parametrize("isa_name", ISAS)
def test_float_convolutions(isa_name: str) -> None:
    loop = innermost(assembly(isa_name, quantized=False), FLOAT[isa_name])
    products = [line for line in loop if re.search(FLOAT[isa_name], line)]
    assert len(products) >= 8
    assert isa_name in SPILLING or not spills(loop), "\n".join(loop)


@pytest.mark.parametrize("isa_name", ISAS)
def test_depthwise_convolutions(isa_name: str) -> None:
    text = assembly(isa_name, quantized=True, depthwise=True)
    assert len(re.findall(DEPTHWISE[isa_name], text)) >= 9
    assert not re.search(SATURATING, text)
    text = assembly(isa_name, quantized=False, depthwise=True)
    assert len(re.findall(FLOAT[isa_name], text)) >= 9
