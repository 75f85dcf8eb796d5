"""What AVX2 and AVX-512 without VNNI share: exact products of 16-bit pairs through `vpmaddwd`."""

from __future__ import annotations

from dataclasses import replace

from tvm import tirx

from edgepress.targets.isa._x86 import dot_by_width, narrow_in_order, nearest, pack_pairs
from edgepress.targets.isa.base import Expr, Isa

_BY_WIDTH = {
    4: "llvm.x86.sse2.pmadd.wd",
    8: "llvm.x86.avx2.pmadd.wd",
    16: "llvm.x86.avx512.pmaddw.d.512",
}


def pmaddwd_isa(name: str, lanes: int, vector_registers: int, intrinsic: str) -> Isa:
    """Return an instruction set whose `intrinsic` adds two 16-bit products per 32-bit lane."""

    def products(x: Expr, w: Expr) -> Expr:
        return tirx.call_llvm_pure_intrin(f"int32x{lanes}", intrinsic, x, w)

    def dot(accumulator: Expr, inputs: Expr, weights: Expr) -> Expr:
        repeated = tirx.Broadcast(tirx.reinterpret("int32", inputs), lanes)
        x = tirx.reinterpret(f"int16x{2 * lanes}", repeated)
        return accumulator + products(x, tirx.Cast(f"int16x{2 * lanes}", weights))

    narrow = Isa(
        name=name,
        vector_bytes=4 * lanes,
        vector_registers=vector_registers,
        storage="uint8",
        staged="int16",
        group=2,
        dot=dot,
        lane_dot=dot_by_width("int16", _BY_WIDTH),
        nearest=nearest,
        pack=pack_pairs,
        narrow=narrow_in_order,
    )
    return replace(narrow, wide=replace(narrow, pack=None))
