"""What an instruction does, by its mnemonic and operands as LLVM writes them.

Knows x86-64 in AT&T syntax, AArch64 and 32-bit Arm. Moves, shuffles and bitwise operations count as
no float arithmetic, whatever their mnemonics say: `vxorps` clears a register.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

#: Every kind. A multiplication is one even where it adds or loads too.
KINDS = (
    "vector_integer_multiply",
    "scalar_integer_multiply",
    "vector_float_multiply",
    "scalar_float_multiply",
    "vector_float",
    "scalar_float",
    "conversion",
    "vector_other",
    "load",
    "store",
    "call",
    "jump",
    "other",
)
#: Kinds that calculate with floats, conversions between floats and integers included.
FLOAT_KINDS = (
    "vector_float_multiply",
    "scalar_float_multiply",
    "vector_float",
    "scalar_float",
    "conversion",
)

_CONDITION = r"(?:eq|ne|cs|hs|cc|lo|mi|pl|vs|vc|hi|ls|ge|lt|gt|le|al)"
_CALL = re.compile(rf"callq?|bl[xr]?{_CONDITION}?")
_JUMP = re.compile(rf"j[a-z]+|b(?:\.?{_CONDITION})?|b[rx]|cbn?z|tbn?z")

_X86_DOT = re.compile(r"pdp(?:bu|ws|wu|bs)[su]?d?s?|pdpbusds?|pdpwssds?|pmadd(?:wd|ubsw)")
_X86_INTEGER_MULTIPLY = re.compile(r"pmul\w+|pmadd52\w+")
_X86_SCALAR_MULTIPLY = re.compile(r"i?mulx?[bwlq]?")
_X86_FLOAT_MULTIPLY = re.compile(r"(?:fn?m(?:add|sub|addsub|subadd)\d{3}|mul)([ps])[sdh]|dpbf16ps")
_X86_FLOAT = re.compile(
    r"(?:add|sub|div|max|min|sqrt|cmp\w*?|u?comi|round|rndscale|rcp\w*?|rsqrt\w*?|hadd|addsub"
    r"|range|reduce|getexp|getmant|scalef|dp)([ps])[sdh]"
)

_ARM_FLOAT_TYPE = r"\.f(?:16|32|64)"
_ARM_MULTIPLY = re.compile(
    rf"v(?:n?m(?:ul|la|ls)|fn?m[as]|m(?:ul|la|ls)l|qr?dmul[hl]|qdml[as]l|qrdml[as]h|[su]dot)"
    rf"{_CONDITION}?(\.\w+)"
)
_ARM_SCALAR_MULTIPLY = re.compile(
    rf"(?:mul|ml[as]|[su]mull|[su]mlal|umaal|smul[bwt][bt]?|smla[bwt][bt]?|smlal[bt][bt]|smla?ld?x?"
    rf"|smu[as]dx?|smla[d]x?|smm(?:ul|la|ls)r?)s?{_CONDITION}?"
)
_ARM_FLOAT = re.compile(
    rf"v(?:add|sub|div|max|min|maxnm|minnm|abs|abd|neg|sqrt|cmpe?|c[gl][te]|ceq|acg[te]|recp[es]"
    rf"|rsqrt[es]|padd|pmax|pmin|rint\w|sel\w\w){_CONDITION}?{_ARM_FLOAT_TYPE}(?:\.\w+)?"
)
_A64_INTEGER_MULTIPLY = re.compile(
    r"[su]?dot|usdot|sudot|(?:us|[su])mmla|[su]ml[as]l2?|[su]mull2?|mla|mls|mul|pmull2?"
    r"|sqr?dmul[hl]2?|sqdml[as]l2?|sqrdml[as]h"
)
_A64_SCALAR_MULTIPLY = re.compile(
    r"mul|madd|msub|mneg|[su]mull|[su]maddl|[su]msubl|[su]mulh|[su]mnegl"
)
_A64_FLOAT_MULTIPLY = re.compile(r"fn?m(?:ul|la|ls|add|sub)x?|fml[as]l2?|bfdot|bfmmla")
_A64_FLOAT = re.compile(
    r"f(?:add|sub|div|max|min|maxnm|minnm|abs|abd|neg|sqrt|cmpe?|ccmpe?|cm[gl][te]|cmeq|acg[te]"
    r"|recp[exs]|rsqrt[es]|rint\w|csel|addp|maxp|minp|maxnmp|minnmp|maxv|minv|maxnmv|minnmv)"
)
_CONVERSION = re.compile(r"v?cvt[\w.]*|[su]cvtf|b?fcvt\w*")
_LOAD = re.compile(r"v?ld(?!r?ex)\w*(?:\.\w+)?")
_STORE = re.compile(r"v?st\w*(?:\.\w+)?")

_X86_MEMORY = re.compile(r"\([^)]*%[^)]*\)")
_X86_STORE = re.compile(r"\([^)]*%[^)]*\)(?:\s*\{%k\d\})?$")
_X86_VECTOR = re.compile(r"%[xyz]mm\d+")
_A64_VECTOR = re.compile(r"\bv\d+\.")
_A64_OR_ARM_VECTOR = re.compile(r"\b[vqdsh]\d+\b")
_VECTOR_REGISTER = re.compile(r"%[xyz]mm\d|\bv\d+\.|\b[qd]\d+\b")
_NARROW_A64 = re.compile(r"\bv\d+\.(?:8b|4h|2s|1d)\b")
#: Products that a dot product adds up in every lane of 32 bits.
_PRODUCTS = {"vpdpbusd": 4, "vpdpbusds": 4, "sdot": 4, "udot": 4, "usdot": 4, "smmla": 8,
             "vpmaddwd": 2, "vpdpwssd": 2, "vpdpwssds": 2, "vsdot.s8": 4, "vudot.u8": 4,
             }  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """One line of assembly.

    Attributes:
        mnemonic: such as `vpdpbusd`, `b.ne`, `vmlal.s16`.
        operands: the rest of the line.
    """

    mnemonic: str
    operands: str = ""

    @property
    def jumps(self) -> bool:
        """Whether it may go on elsewhere in the same function."""
        return _JUMP.fullmatch(self.mnemonic) is not None

    @property
    def in_vectors(self) -> bool:
        """Whether it reads or writes a register of several numbers."""
        return _VECTOR_REGISTER.search(self.operands) is not None


def kind_of(instruction: Instruction) -> str:
    """Return one of `KINDS`.

    >>> kind_of(Instruction("vpdpbusd", "(%rsi), %zmm1, %zmm2"))
    'vector_integer_multiply'
    >>> kind_of(Instruction("madd", "x0, x1, x2, x3"))
    'scalar_integer_multiply'
    """
    mnemonic, operands = instruction.mnemonic, instruction.operands
    if _CALL.fullmatch(mnemonic):
        return "call"
    if instruction.jumps:
        return "jump"
    if "%" in operands:
        return _x86_kind(mnemonic.removeprefix("v"), operands)
    if "." in mnemonic or mnemonic.startswith("v"):
        return _arm_vector_kind(mnemonic, operands)
    return _a64_or_scalar_kind(mnemonic, operands)


def products_of(instruction: Instruction) -> int:
    """Return how many products a multiplication computes, as if every lane had 32 bits.

    >>> products_of(Instruction("vpdpbusd", "%ymm0, %ymm1, %ymm2"))
    32
    """
    if not kind_of(instruction).startswith("vector"):
        return 1
    operands = instruction.operands
    for name, lanes in (("%zmm", 16), ("%ymm", 8), ("%xmm", 4)):
        if name in operands:
            return lanes * _PRODUCTS.get(instruction.mnemonic, 1)
    if _A64_VECTOR.search(operands):
        narrow = _NARROW_A64.match(operands.partition(",")[0]) is not None
    else:
        narrow = re.match(r"d\d", operands) is not None
    return (2 if narrow else 4) * _PRODUCTS.get(instruction.mnemonic, 1)


def _x86_kind(core: str, operands: str) -> str:
    """`core` is the mnemonic without the v of VEX and EVEX."""
    vector = _X86_VECTOR.search(operands) is not None
    if _X86_DOT.fullmatch(core) or _X86_INTEGER_MULTIPLY.fullmatch(core):
        return "vector_integer_multiply"
    if not vector and _X86_SCALAR_MULTIPLY.fullmatch(core):
        return "scalar_integer_multiply"
    if found := _X86_FLOAT_MULTIPLY.fullmatch(core):
        return f"{_scalar_or_vector(found[1] != 's')}_float_multiply"
    if core.startswith("cvt"):
        return "conversion"
    if found := _X86_FLOAT.fullmatch(core):
        return f"{_scalar_or_vector(found[1] != 's')}_float"
    if core.startswith(("lea", "push", "pop", "prefetch", "nop")):
        return "other"
    if _X86_STORE.search(operands) and not core.startswith(("cmp", "test", "bt")):
        return "store"
    if _X86_MEMORY.search(operands) and core.startswith(
        ("mov", "broadcast", "pbroadcast", "pmov", "gather", "pgather", "lddqu", "insert", "pinsr",
         "maskmov", "pmaskmov", "expand", "pexpand")
    ):  # fmt: skip
        return "load"
    return "vector_other" if vector else "other"


def _arm_vector_kind(mnemonic: str, operands: str) -> str:
    """Arm's mnemonics that name a type (`vmul.f32`), and those that move vectors (`vldr`)."""
    if found := _ARM_MULTIPLY.fullmatch(mnemonic):
        if re.fullmatch(_ARM_FLOAT_TYPE, found[1]):
            return f"{_scalar_or_vector(_is_neon(mnemonic, operands))}_float_multiply"
        return "vector_integer_multiply"
    if _CONVERSION.fullmatch(mnemonic):
        return "conversion"
    if _ARM_FLOAT.fullmatch(mnemonic):
        return f"{_scalar_or_vector(_is_neon(mnemonic, operands))}_float"
    if mnemonic.startswith("vld"):
        return "load"
    if mnemonic.startswith("vst"):
        return "store"
    return "other" if mnemonic in ("vpush", "vpop") else "vector_other"


def _a64_or_scalar_kind(mnemonic: str, operands: str) -> str:
    """AArch64, whose vectors are told by their operands, and scalar instructions of 32-bit Arm."""
    vector = _A64_VECTOR.search(operands) is not None
    if vector and _A64_INTEGER_MULTIPLY.fullmatch(mnemonic):
        return "vector_integer_multiply"
    if not vector and (
        _A64_SCALAR_MULTIPLY.fullmatch(mnemonic) or _ARM_SCALAR_MULTIPLY.fullmatch(mnemonic)
    ):
        return "scalar_integer_multiply"
    if _A64_FLOAT_MULTIPLY.fullmatch(mnemonic):
        return f"{_scalar_or_vector(vector)}_float_multiply"
    if _CONVERSION.fullmatch(mnemonic):
        return "conversion"
    if _A64_FLOAT.fullmatch(mnemonic):
        return f"{_scalar_or_vector(vector)}_float"
    if _LOAD.fullmatch(mnemonic):
        return "load"
    if _STORE.fullmatch(mnemonic):
        return "store"
    return "vector_other" if vector or _A64_OR_ARM_VECTOR.search(operands) else "other"


def _scalar_or_vector(vector: bool) -> str:
    return "vector" if vector else "scalar"


def _is_neon(mnemonic: str, operands: str) -> bool:
    """Tell whether 32-bit Arm works on a vector: d registers hold one double or several floats."""
    return not mnemonic.endswith(".f64") and re.match(r"[qd]\d", operands) is not None
