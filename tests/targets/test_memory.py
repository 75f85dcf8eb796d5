import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.targets.memory import ALIGNMENT_BYTES, Plan, plan
from edgepress.targets.program import Call, Program, Tensor

SIZES = st.sampled_from([0, 1, 63, 64, 65, 100, 128, 1000, 4096])


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Random calls, each of which reads what is there and writes one or two new tensors."""
    program = Program(inputs=("x",), tensors={"x": Tensor("x", "uint8", (100,))})
    program.constants["w"] = np.zeros(3, np.int8)
    program.kernels["k"] = None
    written = ["x"]
    for index in range(draw(st.integers(1, 12))):
        reads = draw(st.lists(st.sampled_from(written), max_size=4, unique=True))
        writes = [f"t{index}_{i}" for i in range(draw(st.integers(1, 2)))]
        for name in writes:
            program.tensors[name] = Tensor(name, "uint8", (draw(SIZES),))
        program.calls.append(Call("k", ("w", *reads, *writes), tuple(writes)))
        written += writes
    computed = written[1:]
    outputs = draw(st.lists(st.sampled_from(computed), min_size=1, max_size=3, unique=True))
    program.outputs = tuple(outputs)
    program.validate()
    return program


def live_at(program: Program, call: int) -> set[str]:
    """Tensors that hold a value which is wanted while a call runs, found the slow way."""
    outside = {*program.inputs, *program.outputs, *program.constants}
    before = {name for c in program.calls[: call + 1] for name in c.arguments}
    after = {name for c in program.calls[call:] for name in c.arguments}
    return (before & after) - outside


def rounded(size: int) -> int:
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@settings(deadline=None, max_examples=50)
@given(programs())
def test_what_lives_together_lies_apart(program: Program) -> None:
    made = plan(program)
    for call in range(len(program.calls)):
        live = sorted(live_at(program, call), key=lambda n: made.offsets[n])
        spans = [
            (made.offsets[n], made.offsets[n] + program.tensors[n].size_bytes)
            for n in live
            if program.tensors[n].size_bytes
        ]
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        assert all(end <= made.arena_bytes for _, end in spans)
        assert made.arena_bytes >= sum(rounded(program.tensors[n].size_bytes) for n in live)


@settings(deadline=None, max_examples=50)
@given(programs())
def test_the_plan_covers_all_and_only_intermediates(program: Program) -> None:
    made = plan(program)
    named = {name for call in program.calls for name in call.arguments}
    assert set(made.offsets) == named - {*program.inputs, *program.outputs, *program.constants}
    assert all(offset % ALIGNMENT_BYTES == 0 for offset in made.offsets.values())
    assert made == plan(program)
    sizes = [rounded(program.tensors[name].size_bytes) for name in made.offsets]
    assert made.arena_bytes <= sum(sizes)


def chain(*sizes: int) -> Plan:
    """Plan x → t0 → t1 → … → y."""
    names = [f"t{i}" for i in range(len(sizes))]
    path = ["x", *names, "y"]
    tensors = {n: Tensor(n, "int8", (s,)) for n, s in zip(names, sizes, strict=True)}
    tensors |= {n: Tensor(n, "int8", (8,)) for n in "xy"}
    calls = [Call("k", (a, b), (b,)) for a, b in itertools.pairwise(path)]
    return plan(Program(("x",), ("y",), tensors, {}, calls, {"k": None}))


def test_a_chain_needs_no_more_than_its_largest_neighbours() -> None:
    assert chain(640, 640, 640, 640).arena_bytes == 1280
    assert chain(64, 6400, 640, 6400, 64).arena_bytes == 7040
    assert chain(100).arena_bytes == 128


def test_the_smallest_gap_that_fits_is_taken() -> None:
    """Of the gaps that `b` (640) and `d` (128) leave, a late tensor of 128 bytes takes d's."""
    sizes = {"a": 1280, "b": 640, "c": 320, "d": 128, "e": 64, "f": 128, "g": 640}
    tensors = {n: Tensor(n, "int8", (s,)) for n, s in sizes.items()}
    tensors |= {n: Tensor(n, "int8", (8,)) for n in "xy"}
    calls = [
        Call("k", ("x", "a", "b", "c", "d", "e"), ("a", "b", "c", "d", "e")),
        Call("k", ("a", "c", "e", "f", "g"), ("f", "g")),
        Call("k", ("a", "c", "e", "f", "g", "y"), ("y",)),
    ]
    made = plan(Program(("x",), ("y",), tensors, {}, calls, {"k": None}))
    assert made.offsets["f"] == made.offsets["d"]
    assert made.offsets["g"] == made.offsets["b"]
    assert made.arena_bytes == 1280 + 640 + 320 + 128 + 64


def test_an_output_that_is_read_stays_in_the_callers_memory() -> None:
    tensors = {n: Tensor(n, "int8", (64,)) for n in ("x", "y", "z")}
    calls = [Call("k", ("x", "y"), ("y",)), Call("k", ("y", "z"), ("z",))]
    made = plan(Program(("x",), ("y", "z"), tensors, {}, calls, {"k": None}))
    assert made == Plan({}, 0, {})
