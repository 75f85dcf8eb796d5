"""Where every intermediate tensor lies: liveness, and an arena plan.

The plan is offline: the generated C adds constant offsets to one arena. Tensors are placed largest
first, each into the smallest gap that fits between those already placed which live at the same
time (greedy by size, best fit: Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net
Inference", 2020, section 5.2).
"""

from __future__ import annotations

from dataclasses import dataclass

from edgepress.targets.program import Program

ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class Life:
    """First and last call, both included, during which a tensor's bytes must stay."""

    first: int
    last: int

    def overlaps(self, other: Life) -> bool:
        """Whether some call needs both."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Plan:
    """Offsets into one arena.

    Attributes:
        offsets: tensor name to byte offset. Model inputs and outputs are not in it: they lie in the
            caller's memory.
        arena_bytes: size of the arena.
        lives: tensor name to the calls during which it is live.
    """

    offsets: dict[str, int]
    arena_bytes: int
    lives: dict[str, Life]


def plan(program: Program, alignment_bytes: int = ALIGNMENT_BYTES) -> Plan:
    """Place every tensor of a program that is neither an input, an output nor a constant.

    Every offset is a multiple of `alignment_bytes`.

    Two arguments of one call never share memory, so a kernel may assume that its pointers do not
    alias. Deterministic: it depends on sizes, calls and names only.
    """
    lives = _lives(program)
    sizes = {name: _aligned(program.tensors[name].size_bytes, alignment_bytes) for name in lives}
    offsets: dict[str, int] = {}
    for name in sorted(lives, key=lambda n: (-sizes[n], lives[n].first, n)):
        taken = sorted(
            (offsets[other], offsets[other] + sizes[other])
            for other in offsets
            if lives[name].overlaps(lives[other])
        )
        offsets[name] = _best_gap(taken, sizes[name])
    arena_bytes = max((offsets[name] + sizes[name] for name in offsets), default=0)
    return Plan({name: offsets[name] for name in lives}, arena_bytes, lives)


def _lives(program: Program) -> dict[str, Life]:
    """Life of every tensor that belongs into the arena, in the order in which they are written."""
    outside = {*program.inputs, *program.outputs, *program.constants}
    lives: dict[str, Life] = {}
    for index, call in enumerate(program.calls):
        for name in call.arguments:
            if name not in outside:
                first = lives[name].first if name in lives else index
                lives[name] = Life(first, index)
    return lives


def _aligned(size_bytes: int, alignment_bytes: int) -> int:
    return -(-size_bytes // alignment_bytes) * alignment_bytes


def _best_gap(taken: list[tuple[int, int]], size: int) -> int:
    """Offset of the smallest gap of at least `size` bytes; behind everything where none fits."""
    best, best_waste = -1, 0
    end = 0
    for start, stop in taken:
        waste = start - end - size
        if waste >= 0 and (best < 0 or waste < best_waste):
            best, best_waste = end, waste
        end = max(end, stop)
    return best if best >= 0 else end
