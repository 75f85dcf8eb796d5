"""One small int8 bundle for this machine, built once for all tests that need a real one."""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from edgepress.pipeline import interruption, verify
from edgepress.pipeline.cache import Cache
from edgepress.pipeline.cli import main
from edgepress.pipeline.recipe import load_recipe, parse_recipe
from edgepress.pipeline.run import Request, Result, run
from edgepress.targets.load import load_target
from tests.graphs import net, random

Edgepress = Callable[..., tuple[int, str, str]]
RECIPE = """schema = 1
[[pass]]
name = "calibrate"
[[pass]]
name = "quantize-int8"
[budget]
accuracy_drop = 50
size_bytes = 1_000_000
sqnr_db = 20
"""


@dataclass(frozen=True)
class World:
    """A model, its samples, and what `run` made of them.

    Attributes:
        model: a CNN whose batch is dynamic.
        samples: 8 samples with labels, those that the float model gives.
        request: how the bundle was built.
        result: what came out.
        cache: the cache that it was built with.
    """

    model: Path
    samples: Path
    request: Request
    result: Result
    cache: Cache


def cnn() -> ir.Model:
    return net(
        "(float[N,3,8,8] x) => (float[N,10] y)",
        """c = Conv<pads=[1,1,1,1], kernel_shape=[3,3]>(x, w1, b1)
           r = Relu(c)
           p = GlobalAveragePool(r)
           f = Flatten(p)
           y = Gemm<transB=1>(f, w2, b2)""",
        {"w1": random(8, 3, 3, 3), "b1": random(8), "w2": random(10, 8), "b2": random(10)},
    )


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    model, samples = folder / "net.onnx", folder / "samples.npz"
    ir.save(cnn(), model)
    x = random(8, 3, 8, 8)
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    np.savez(samples, x=x, labels=np.argmax(np.asarray(session.run(None, {"x": x})[0]), axis=1))
    cache = Cache(folder / "cache")
    request = Request(
        model=model,
        target=load_target("native"),
        recipe=parse_recipe(RECIPE, "mine"),
        output=folder / "bundle",
        calib=samples,
        eval=samples,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "BENCH_SECONDS", 0.05)
        result = run(request, cache=cache)
    return World(model, samples, request, result, cache)


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure as often as always, but no longer than needed for that."""
    monkeypatch.setattr(verify, "BENCH_SECONDS", 0.05)


@pytest.fixture
def float_request(world: World, tmp_path: Path) -> Request:
    """How to compile the same model as it is."""
    return Request(
        model=world.model,
        target=load_target("native"),
        recipe=load_recipe("none"),
        output=tmp_path / "float",
    )


@pytest.fixture
def edgepress(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, world: World
) -> Edgepress:
    """Run the command line here; return exit code, stdout and stderr."""
    monkeypatch.setenv("EDGEPRESS_CACHE_DIR", str(world.cache.folder))

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return int(caught.value.code or 0), printed.out, printed.err

    return call


@pytest.fixture
def handlers() -> Iterator[None]:
    """Handle signals as the command line does; afterwards as before, with none remembered."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    interruption.install()
    yield
    interruption.install()
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
