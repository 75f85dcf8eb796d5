"""A few seconds of what `make fuzz` does for minutes; always the same inputs."""

import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from edgepress.targets.base import Target
from edgepress.targets.weights import Rule, read_weights
from tests.fuzz import differential, programs, reference, seeds
from tests.fuzz.differential import Case
from tests.fuzz.run import write_seeds
from tests.targets.tiny import ARMV7, HOST, PI4, need

OF_PAYLOADS = {Rule.SECTION, Rule.SECTION_SIZE, Rule.WORDS, Rule.CODE, Rule.STREAM, Rule.GAPS}
ACCEPTED = "accepted"
RUNS = 15_000
FILES = 2_500


def tally(name: str, folder: Path, runs: int) -> Counter[str]:
    """How often a target under gcc's sanitizers came to which verdict."""
    program = programs.build(folder, "gcc", programs.SANITIZERS, f"{name}.c", "standalone.c")
    inputs = write_seeds(name, folder / "seeds")
    done = subprocess.run(
        [program, str(runs), "1", *inputs], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = (line.partition(" ") for line in done.stdout.splitlines())
    return Counter({verdict: int(count) for count, _, verdict in lines})


def test_decode_survives_anything(tmp_path: Path) -> None:
    verdicts = tally("fuzz_decode", tmp_path, RUNS)
    assert verdicts.total() > RUNS
    assert verdicts[ACCEPTED] > len(seeds.payloads(np.random.default_rng(0)))
    assert set(verdicts) - {"too short"} == {ACCEPTED} | {rule.value for rule in OF_PAYLOADS}


def test_opening_weights_survives_anything(tmp_path: Path) -> None:
    verdicts = tally("fuzz_weights", tmp_path, RUNS)
    assert verdicts[ACCEPTED] > len(seeds.corpus(np.random.default_rng(0)))
    assert set(verdicts) >= {rule.value for rule in Rule}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    folder = tmp_path_factory.mktemp("cases")
    return differential.write_cases(folder, np.random.default_rng(1), FILES)


@pytest.mark.parametrize("target", [HOST, PI4, ARMV7], ids=lambda target: target.name)
def test_all_readers_agree(tmp_path: Path, cases: list[Case], target: Target) -> None:
    need(target.compiler, target.compiler_package)
    flags: tuple[str, ...] = programs.SANITIZERS
    command: list[str] = []
    if target.emulator:
        need(target.emulator, "qemu-user")
        flags = ("-static",)  # the sanitizers do not run under qemu
        command = [target.emulator, "-cpu", target.emulator_cpu]
    program = programs.build(tmp_path / "build", target.compiler, flags, "verdicts.c")
    verdicts = differential.compare([*command, str(program)], cases)
    assert verdicts.total() > FILES
    assert verdicts[ACCEPTED] > 100
    assert set(verdicts) >= {rule.name for rule in Rule}


def test_the_reference_reads_what_is_written(tmp_path: Path) -> None:
    coded = 0
    path = tmp_path / "weights.epw"
    for _, data in seeds.encoded(np.random.default_rng(2)):
        path.write_bytes(data)
        arrays = read_weights(path)
        for name, payload in differential.coded_payloads(data).items():
            raw = arrays[name].tobytes()
            assert reference.decode(payload, len(raw)) == raw
            coded += 1
    assert coded > 8
