"""AVX-512 (F, BW, DQ, VL) without VNNI: exact 16-bit pairs through `vpmaddwd`."""

from edgepress.targets.isa._pmaddwd import pmaddwd_isa

ISA = pmaddwd_isa("avx512", 16, 32, "llvm.x86.avx512.pmaddw.d.512")
