"""The instructions of compiled kernels: what they are, which loops they are in, what they do.

They are read from the assembly text that LLVM writes of the very module it makes the object of, for
two reasons. The parallel part of a kernel is a function without a symbol, which a disassembler of
the object cannot assign to its kernel; and LLVM knows every instruction it emits. Whether an
executable holds the code of that object is what `object_code.holds` tells.

Counts are static: how often an instruction stands in the code, not how often it runs. So counts of
the innermost loops are kept apart; that is where the time goes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from edgepress.targets.instructions import FLOAT_KINDS, Instruction, kind_of, products_of

_TYPE = re.compile(r"\.type\s+(\S+?),\s*[@%]function")
_SIZE = re.compile(r"\.size\s+(\S+?),")
_LABEL = re.compile(r"(\S+):\s*(?:[@#/].*)?")
_INSTRUCTION = re.compile(r"\t([a-z][\w.]*)(?:\s+(.*))?")
_PRIVATE = re.compile(r"\.L[\w.$]+")


@dataclass(frozen=True)
class KernelCode:
    """How often which instruction stands in a kernel.

    Attributes:
        kinds: number of instructions of each kind of `instructions.KINDS`.
        loop_kinds: those within innermost loops; of all instructions where there is no loop.
        multiplies: number of multiplications by mnemonic.
        loop_multiplies: likewise within innermost loops.
        multiply: the mnemonic that stands for most products in the innermost loops, counted as
            occurrences times products; "" where nothing is multiplied there.
        vector: whether that is a vector instruction; where nothing is multiplied, whether vector
            registers are used.
    """

    kinds: Mapping[str, int]
    loop_kinds: Mapping[str, int]
    multiplies: Mapping[str, int]
    loop_multiplies: Mapping[str, int]
    multiply: str = ""
    vector: bool = False

    @property
    def instructions(self) -> int:
        """Number of all instructions."""
        return sum(self.kinds.values())

    @property
    def float_instructions(self) -> int:
        """Number of instructions that calculate with floats, conversions included."""
        return sum(self.kinds.get(kind, 0) for kind in FLOAT_KINDS)

    @property
    def calls_library(self) -> bool:
        """Whether an innermost loop calls a function, such as one of libm."""
        return self.loop_kinds.get("call", 0) > 0


def kernel_codes(assembly: str, kernels: Iterable[str]) -> dict[str, KernelCode]:
    """Count the instructions of every kernel in a text that `compile_with_assembly` returned.

    The code of a kernel is its function, and the private functions that it refers to.

    Raises:
        ValueError: the text has no function of a kernel's name.
    """
    functions = _functions(assembly)
    codes = {}
    for kernel in kernels:
        if kernel not in functions:
            raise ValueError(f"the assembly text has no function {kernel!r}")
        codes[kernel] = _code([functions[name] for name in _reachable(kernel, functions)])
    return codes


@dataclass
class _Function:
    """A function: its instructions, where its labels stand among them, and what it mentions."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    mentions: set[str] = field(default_factory=set)

    def innermost(self) -> list[bool]:
        """Tell of every instruction whether it is in a loop that holds no other loop.

        A loop is what lies between a label and a later jump back to it.
        """
        loops: dict[int, int] = {}
        for index, instruction in enumerate(self.instructions):
            if not instruction.jumps:
                continue
            start = self.labels.get(instruction.operands.rpartition(",")[2].strip())
            if start is not None and start <= index:
                loops[start] = max(index, loops.get(start, 0))
        inside = [False] * len(self.instructions)
        for start, end in loops.items():
            if not any(start < other and loops[other] <= end for other in loops):
                inside[start : end + 1] = [True] * (end + 1 - start)
        return inside


def _functions(assembly: str) -> dict[str, _Function]:
    """Split a text into functions; directives count only as mentions, data not at all."""
    functions: dict[str, _Function] = {}
    current: _Function | None = None
    for line in assembly.splitlines():
        if found := _TYPE.search(line):
            current = functions.setdefault(found[1], _Function())
            continue
        if current is None:
            continue
        if _SIZE.search(line):
            current = None
            continue
        current.mentions.update(_PRIVATE.findall(line))
        if label := _LABEL.fullmatch(line):
            current.labels[label[1]] = len(current.instructions)
        elif found := _INSTRUCTION.fullmatch(line):
            current.instructions.append(Instruction(found[1], (found[2] or "").strip()))
    return functions


def _reachable(kernel: str, functions: Mapping[str, _Function]) -> list[str]:
    """Return a kernel and the private functions that it mentions, directly or through others."""
    found = [kernel]
    for name in found:
        mentioned = sorted(functions[name].mentions)
        found += [other for other in mentioned if other in functions and other not in found]
    return found


def _code(functions: Sequence[_Function]) -> KernelCode:
    everything = [instruction for one in functions for instruction in one.instructions]
    marks = [mark for one in functions for mark in one.innermost()]
    hot = [one for one, mark in zip(everything, marks, strict=True) if mark] or everything
    lanes: Counter[str] = Counter()
    for one in hot:
        if kind_of(one).endswith("multiply"):
            lanes[one.mnemonic] += products_of(one)
    multiply = min(lanes, key=lambda name: (-lanes[name], name)) if lanes else ""
    if multiply:
        vector = any(one.mnemonic == multiply and kind_of(one).startswith("vector") for one in hot)
    else:
        vector = any(one.in_vectors for one in hot)
    return KernelCode(
        kinds=dict(Counter(map(kind_of, everything))),
        loop_kinds=dict(Counter(map(kind_of, hot))),
        multiplies=_multiplies(everything),
        loop_multiplies=_multiplies(hot),
        multiply=multiply,
        vector=vector,
    )


def _multiplies(instructions: Sequence[Instruction]) -> dict[str, int]:
    products = (one.mnemonic for one in instructions if kind_of(one).endswith("multiply"))
    return dict(Counter(products))
