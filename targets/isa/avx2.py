"""AVX2 with FMA: exact 16-bit pairs through `vpmaddwd`, never the saturating `vpmaddubsw`."""

from edgepress.targets.isa._pmaddwd import pmaddwd_isa

ISA = pmaddwd_isa("avx2", 8, 16, "llvm.x86.avx2.pmadd.wd")
