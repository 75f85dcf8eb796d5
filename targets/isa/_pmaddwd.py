"""What AVX2 and AVX-512 without VNNI share: exact products of 16-bit pairs through `vpmaddwd`."""

from __future__ import annotations

from dataclasses import replace

from tvm import tirx

from edgepress.targets.isa.base import Expr, Isa


def _fills(value: Expr, lanes: int) -> bool:
    return str(value.ty).endswith(f"x{lanes}")


def pmaddwd_isa(name: str, lanes: int, vector_registers: int, intrinsic: str) -> Isa:
    """Return an instruction set whose `intrinsic` adds two 16-bit products per 32-bit lane."""

    def products(x: Expr, w: Expr) -> Expr:
        return tirx.call_llvm_pure_intrin(f"int32x{lanes}", intrinsic, x, w)

    def dot(accumulator: Expr, inputs: Expr, weights: Expr) -> Expr:
        repeated = tirx.Broadcast(tirx.reinterpret("int32", inputs), lanes)
        x = tirx.reinterpret(f"int16x{2 * lanes}", repeated)
        return accumulator + products(x, tirx.Cast(f"int16x{2 * lanes}", weights))

    def multiply_add(accumulator: Expr, x: Expr, w: Expr) -> Expr:
        if not _fills(accumulator, lanes):
            return accumulator + x * w
        # x is zero-extended from 8 bits: the upper 16-bit product of every lane is zero.
        pairs = (tirx.reinterpret(f"int16x{2 * lanes}", value) for value in (x, w))
        return accumulator + products(*pairs)

    def wide_multiply_add(accumulator: Expr, x: Expr, w: Expr) -> Expr:
        # Only w's lower 16 bits are left, so that the upper product of every lane is zero again.
        lower = w & tirx.Broadcast(tirx.const(0xFFFF, "int32"), lanes) if _fills(w, lanes) else w
        return multiply_add(accumulator, x, lower)

    narrow = Isa(
        name=name,
        vector_bytes=4 * lanes,
        vector_registers=vector_registers,
        storage="uint8",
        staged="int16",
        group=2,
        dot=dot,
        multiply_add=multiply_add,
    )
    return replace(narrow, wide=replace(narrow, multiply_add=wide_multiply_add))
