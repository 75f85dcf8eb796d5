"""The benchmark of "Deep Compression": the networks are the paper's, and so are the recipes."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from edgepress.pipeline.recipe import load_recipe

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# Han, Mao and Dally, 2016, tables 2 and 3: weights per layer; biases are counted beside.
WEIGHTS = {
    "lenet-300-100": {"fc1": 235_200, "fc2": 30_000, "fc3": 1_000},
    "lenet-5": {"conv1": 500, "conv2": 25_000, "fc1": 400_000, "fc2": 5_000},
}
PASSES = ["prune-and-retrain", "share-weights", "tune-codebooks", "encode-huffman"]


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    """The benchmarks are no package: their files are scripts, and import each other."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("deep_compression")
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in set(sys.modules) - before:
            if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]


@pytest.fixture(scope="module")
def lenet(benchmark: ModuleType) -> ModuleType:
    """What trains the networks; it needs torch."""
    pytest.importorskip("torch")
    return sys.modules[benchmark.train.__module__]


def row(name: str, seed: int, size: int, error: float) -> dict[str, Any]:
    """A made-up result, on two boards of which the second is the worse."""
    boards = {
        "native": {"weights_bytes": size - 10, "error": error - 0.01, "samples": 10_000},
        "armv7-neon": {"weights_bytes": size, "error": error, "samples": 10_000},
    }
    sums = ("fp32", "pruned", "shared", "coded", "container", "entropy")
    total = {"weights": 250, "zeros": 200} | {f"{key}_bytes": 1000 for key in sums}
    ledger = {"layers": [{"name": "/fc1/Gemm", **total}], "total": total}
    facts = {"network": name, "seed": seed, "dense_error": 0.5, "fp32_bytes": 1000 * size}
    return facts | {"boards": boards, "ledger": ledger}


@pytest.mark.parametrize("name", WEIGHTS)
def test_recipes_are_valid_and_name_the_passes_of_the_paper(
    benchmark: ModuleType, name: str, tmp_path: Path
) -> None:
    path = benchmark.recipe(benchmark.NETWORKS[name], 7, tmp_path, quick=True)
    passes = load_recipe(str(path)).passes
    assert [step.name for step in passes] == PASSES
    trained: list[Any] = [passes[0], passes[2]]
    assert [step.seed for step in trained] == [7, 7]
    assert [step.epochs for step in trained] == [1, 1]


@pytest.mark.parametrize("name", WEIGHTS)
def test_networks_have_the_papers_layers(lenet: ModuleType, name: str) -> None:
    images = np.zeros((130, 1, 28, 28), np.float32)
    model: onnx.ModelProto = lenet.train(name, lenet.Data(images, np.arange(130) % 10), 1, 0)
    onnx.checker.check_model(model, full_check=True)
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    assert {n.removesuffix(".weight"): s for n, s in sizes.items() if n.endswith(".weight")} == (
        WEIGHTS[name]
    )
    assert sum(sizes.values()) == {"lenet-300-100": 266_610, "lenet-5": 431_080}[name]


def test_training_is_repeatable_and_learns(lenet: ModuleType) -> None:
    torch = importlib.import_module("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    labels = np.arange(400) % 4
    images = np.zeros((400, 1, 28, 28), np.float32)
    for number, label in enumerate(labels):  # a bar whose place tells the class
        images[number, 0, 6 + 4 * label : 9 + 4 * label, 5:23] = 1
    data = lenet.Data(images, labels)
    once, again = (lenet.train("lenet-300-100", data, 25, 3) for _ in range(2))
    other = lenet.train("lenet-300-100", data, 25, 4)
    torch.set_num_threads(threads)
    assert once.graph.initializer[0].raw_data == again.graph.initializer[0].raw_data
    assert once.graph.initializer[0].raw_data != other.graph.initializer[0].raw_data
    session = onnxruntime.InferenceSession(once.SerializeToString())
    (answers,) = (np.asarray(a) for a in session.run(None, {lenet.INPUT: images}))
    assert (answers.argmax(1) == labels).mean() > 0.9


def test_distorted_images_stay_where_they_are_but_for_a_little(lenet: ModuleType) -> None:
    torch = importlib.import_module("torch")
    dot = torch.zeros(200, 1, 28, 28)
    dot[:, :, 13:15, 13:15] = 1  # in the middle, where only shifts and the shear's none act
    torch.manual_seed(0)
    images = lenet.distorted(dot)
    mass = images.sum((1, 2, 3))
    place = torch.arange(28) + 0.5
    right = (images.sum((1, 2)) * place).sum(1) / mass - 14
    down = (images.sum((1, 3)) * place).sum(1) / mass - 14
    for distance in (right, down):
        # a shrunk image is moved by less than the shift, an enlarged one by more
        assert 0.9 * lenet.SHIFT_PIXELS < distance.abs().max() < 1.3 * lenet.SHIFT_PIXELS
    assert not torch.equal(images[0], images[1])


def test_table_has_the_papers_rows_and_ours(benchmark: ModuleType) -> None:
    rows = [row("lenet-5", seed, 10_000 + seed, 0.7) for seed in range(2)]
    lines = benchmark.tables(rows).splitlines()
    assert "| lenet-5 | Han et al. 2016 | 1720 KB | 44 KB | 44 KB | 39× | 0.80 | 0.74 | 0.74 |" in (
        lines
    )
    assert "| | seed 0 | 10,000,000 | 9,990 | 10,000 | 1000× | 0.50 | 0.69 | 0.70 |" in lines
    (verdict,) = (line for line in lines if "wanted" in line)
    assert "≥ 100×, ≤ 0.74 %: reached" in verdict
    widths = {line.count("|") for line in lines[2:7]}
    assert widths == {10}
    assert "| `/fc1/Gemm` | 250 | 50 | 1,000 | 1,000 | 1,000 | 1,000 | 1,000 | 1,000 |" in lines


@pytest.mark.parametrize(("size", "error"), [(10_000, 0.75), (10, 0.75), (10, 0.7)])
def test_one_bad_seed_is_a_miss(benchmark: ModuleType, size: int, error: float) -> None:
    good, bad = row("lenet-5", 0, 10_000, 0.7), row("lenet-5", 1, size, error)
    bad["fp32_bytes"] = 10_000 * 100 if size == 10_000 else 99 * size
    assert benchmark.reached("lenet-5", [good])
    assert not benchmark.reached("lenet-5", [good, bad])
