"""Passes get samples, a vector width and a timer where they need them, and only there."""

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.passes.base import Context, Outcome, Pass
from edgepress.passes.calibrate import Calibrate
from edgepress.passes.drop_no_ops import DropNoOps
from edgepress.passes.quantize_int8 import QuantizeInt8
from edgepress.pipeline import prepare as module
from edgepress.pipeline import snapshot
from edgepress.pipeline.cache import Cache
from edgepress.pipeline.driver import CANONICAL
from edgepress.pipeline.layer_timer import DeviceTimer
from edgepress.pipeline.prepare import UsageError, prepare
from edgepress.pipeline.recipe import Recipe
from edgepress.targets.base import DeviceFailed
from edgepress.targets.load import load_target
from tests.graphs import random
from tests.pipeline.conftest import World

SEEN: list[Context] = []


@dataclass(frozen=True, kw_only=True)
class Studious(Pass):
    """Notes what it may train on, and changes the model."""

    @property
    def needs_training(self) -> bool:
        return True

    def call(self, model: ir.Model, context: Context) -> Outcome:
        SEEN.append(context)
        return Outcome(model=model, modified=False)


@dataclass(frozen=True, kw_only=True)
class Curious(Pass):
    """Notes what it may use."""

    timed: bool = True

    @property
    def needs_timer(self) -> bool:
        return self.timed

    def call(self, model: ir.Model, context: Context) -> Outcome:
        SEEN.append(context)
        return Outcome(model=model, modified=False)


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    SEEN.clear()


def recipe(*passes: Pass) -> Recipe:
    return Recipe(name="mine", text="", passes=passes)


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> None:
        raise AssertionError("nothing needs a device")

    monkeypatch.setattr(module, "open_device", fail)


@pytest.mark.parametrize(
    ("after", "quantized"),
    [
        ([], False),
        ([DropNoOps()], False),
        ([Calibrate(), QuantizeInt8()], True),
        ([DropNoOps(), Calibrate(), QuantizeInt8()], True),
    ],
)
def test_layers_are_timed_as_they_will_run(
    world: World, after: Sequence[Pass], quantized: bool
) -> None:
    native = load_target("native")
    prepare(world.model, recipe(Curious(), *after), target=native, calib=world.samples)
    (context,) = SEEN
    assert isinstance(context.timer, DeviceTimer)
    assert context.timer.quantized is quantized
    assert context.timer.target == native
    assert context.timer.device.name == "local"


def test_layers_are_float_again_after_quantization(world: World) -> None:
    """What follows quantize-int8 changes a graph whose layers hold integers already."""
    steps = recipe(Curious(), Calibrate(), QuantizeInt8(), Curious())
    prepare(world.model, steps, target=load_target("native"), calib=world.samples)
    timers = [context.timer for context in SEEN]
    assert [t.quantized for t in timers if isinstance(t, DeviceTimer)] == [True, False]


def test_the_device_that_is_named_measures(world: World) -> None:
    with pytest.raises(DeviceFailed, match="has no emulator"):
        prepare(world.model, recipe(Curious()), target=load_target("native"), device="qemu")
    assert SEEN == []


@pytest.mark.usefixtures("no_device")
@pytest.mark.parametrize("device", [None, "local", "nonsense"])
def test_no_device_is_opened_for_nothing(world: World, device: str | None) -> None:
    native = load_target("native")
    prepare(world.model, recipe(Curious(timed=False)), target=native, device=device)
    (context,) = SEEN
    assert context.timer is None


@pytest.mark.usefixtures("no_device")
def test_a_target_is_asked_for_before_any_work(world: World, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with pytest.raises(UsageError, match=r"mine: test-prepare measures layers.*-t TARGET"):
        prepare(world.model, recipe(DropNoOps(), Curious()), cache=cache)
    assert SEEN == []
    assert list(tmp_path.iterdir()) == []


def test_the_vector_width_is_that_of_the_target(world: World) -> None:
    step = recipe(Curious(timed=False))
    for target in (None, load_target("x86-64-v3"), load_target("x86-64-v4")):
        prepare(world.model, step, target=target)
    assert [context.simd_bytes for context in SEEN] == [16, 32, 64]


def test_samples_and_targets_leave_canonical_steps_in_the_cache(
    world: World, tmp_path: Path
) -> None:
    cache, steps = Cache(tmp_path / "cache"), recipe(Curious(timed=False))
    other = tmp_path / "other.npz"
    np.savez(other, x=random(4, 3, 8, 8, seed=1))

    def cached(calib: Path | None, target: str | None = None) -> list[str]:
        board = None if target is None else load_target(target)
        prepared = prepare(world.model, steps, calib=calib, target=board, cache=cache)
        return [record.pass_name for record in prepared.steps if record.cached]

    assert cached(world.samples) == []
    assert cached(world.samples) == [*CANONICAL, "test-prepare"]
    assert cached(other) == list(CANONICAL)
    assert cached(None) == list(CANONICAL)
    assert cached(world.samples, "x86-64-v4") == list(CANONICAL)


def test_timers_use_the_cache_and_report_progress(world: World, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    prepare(world.model, recipe(Curious()), target=load_target("native"), cache=cache)
    timer = SEEN[0].timer
    assert isinstance(timer, DeviceTimer)
    assert timer.cache is cache
    assert timer.progress == SEEN[0].progress


def test_passes_that_measure_nothing_need_no_compiler(world: World, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from edgepress.pipeline import commands\n"
        f"commands.compress(Path({str(world.model)!r}), 'none', "
        f"output=Path({str(tmp_path / 'out.onnx')!r}), target=None, device=None, calib=None, "
        "evaluation=None, input_shapes={}, overwrite=False, no_cache=True, as_json=True)\n"
        "assert 'onnx_ir' in sys.modules\n"
        "assert 'tvm' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_record_is_the_same_from_the_cache(world: World, tmp_path: Path) -> None:
    native, cache = load_target("native"), Cache(tmp_path)
    first, again = (
        prepare(world.model, recipe(Curious()), target=native, cache=cache) for _ in range(2)
    )
    assert len(SEEN) == 1
    assert [step.facts() for step in first.steps] == [step.facts() for step in again.steps]
    assert dataclasses.asdict(again.steps[-1])["cached"]


def test_training_samples_reach_the_passes_with_the_original_model(world: World) -> None:
    prepared = prepare(world.model, recipe(Studious()), train=world.samples)
    (context,) = SEEN
    assert context.training is not None
    assert prepared.training is context.training
    assert context.original is not None
    assert snapshot.take(context.original) == prepared.canonical
    assert context.samples is None


def test_a_pass_that_trains_asks_for_samples_before_any_work(world: World) -> None:
    with pytest.raises(UsageError, match=r"--train DATA\.npz"):
        prepare(world.model, recipe(Studious()), calib=world.samples)
    assert SEEN == []
