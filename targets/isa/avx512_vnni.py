"""AVX-512 with VNNI: `vpdpbusd` multiplies four u8 by four s8 per lane, without saturation.

`vpdpwssd` does the same with pairs of s16.
"""

from __future__ import annotations

from dataclasses import replace

from tvm import tirx

from edgepress.targets.isa._x86 import dot_by_width, narrow_in_order, nearest, pack_fours
from edgepress.targets.isa.base import Expr, Isa

_BYTES_BY_WIDTH = {lanes: f"llvm.x86.avx512.vpdpbusd.{32 * lanes}" for lanes in (4, 8, 16)}
_WORDS_BY_WIDTH = {lanes: f"llvm.x86.avx512.vpdpwssd.{32 * lanes}" for lanes in (4, 8, 16)}


def _dot(accumulator: Expr, inputs: Expr, weights: Expr) -> Expr:
    repeated = tirx.Broadcast(tirx.reinterpret("int32", inputs), 16)
    return tirx.call_llvm_pure_intrin(
        "int32x16",
        "llvm.x86.avx512.vpdpbusd.512",
        accumulator,
        tirx.reinterpret("uint8x64", repeated),
        weights,
    )


def _wide_dot(accumulator: Expr, inputs: Expr, weights: Expr) -> Expr:
    repeated = tirx.Broadcast(tirx.reinterpret("int32", inputs), 16)
    return tirx.call_llvm_pure_intrin(
        "int32x16",
        "llvm.x86.avx512.vpdpwssd.512",
        accumulator,
        tirx.reinterpret("int16x32", repeated),
        tirx.Cast("int16x32", weights),
    )


_NARROW = Isa(
    name="avx512_vnni",
    vector_bytes=64,
    vector_registers=32,
    storage="uint8",
    staged="uint8",
    group=4,
    dot=_dot,
    lane_dot=dot_by_width("int8", _BYTES_BY_WIDTH),
    nearest=nearest,
    pack=pack_fours,
    narrow=narrow_in_order,
)
ISA = replace(
    _NARROW,
    wide=replace(
        _NARROW,
        group=2,
        dot=_wide_dot,
        lane_dot=dot_by_width("int16", _WORDS_BY_WIDTH),
        pack=None,
    ),
)
