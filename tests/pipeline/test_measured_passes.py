"""The command line with a pass that keeps only what is measured faster on the target."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgepress.pipeline import layer_timer
from tests.graphs import net, random
from tests.pipeline.conftest import Edgepress
from tests.targets.tiny import need

RECIPE = """schema = 1
[[pass]]
name = "low-rank"
layers = ["Gemm_0"]
rank = 8
keep = "faster"
"""


@pytest.fixture
def low_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A model whose one wide layer has rank 4, and a recipe that makes it narrow."""
    monkeypatch.setattr(layer_timer, "PROCESSES", 3)
    monkeypatch.setattr(layer_timer, "SECONDS", 0.02)
    weights = {"w1": random(400, 4) @ random(4, 400) / np.float32(40), "w2": random(8, 400)}
    made = net(
        "(float[1,400] x) => (float[1,8] y)",
        "h = Gemm<transB=1>(x, w1) r = Relu(h) y = Gemm<transB=1>(r, w2)",
        weights,
    )
    model, recipe = tmp_path / "wide.onnx", tmp_path / "narrow.toml"
    ir.save(made, model)
    recipe.write_text(RECIPE)
    return model, recipe


@pytest.mark.parametrize(
    ("place", "unit"),
    [(("-t", "native"), "ms"), (("-t", "raspberry-pi-4", "-d", "qemu"), "instructions")],
    ids=["native", "qemu"],
)
def test_compress_keeps_what_is_faster_on_the_target(
    edgepress: Edgepress,
    low_rank: tuple[Path, Path],
    tmp_path: Path,
    place: tuple[str, ...],
    unit: str,
) -> None:
    if unit == "instructions":
        need("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu")
        need("qemu-aarch64", "qemu-user")
    model, recipe = low_rank
    arguments = ("compress", model, "-r", recipe, *place, "--json")
    code, out, err = edgepress(*arguments, "-o", tmp_path / "a.onnx")
    assert code == 0, err
    step = json.loads(out)["steps"][-1]
    assert step["stats"]["decomposed"] == 1
    assert 0 < step["stats"][f"{unit}_after"] < step["stats"][f"{unit}_before"]
    assert len(onnx.load(tmp_path / "a.onnx").graph.node) == 4
    code, out, _ = edgepress(*arguments, "-o", tmp_path / "b.onnx")
    assert code == 0
    assert json.loads(out)["steps"][-1]["cached"], "nothing is measured twice"


def test_run_measures_layers_where_it_verifies(
    edgepress: Edgepress, low_rank: tuple[Path, Path], tmp_path: Path
) -> None:
    model, recipe = low_rank
    code, out, err = edgepress(
        "run", model, "-t", "native", "-r", recipe, "-o", tmp_path / "bundle", "--json"
    )
    assert code == 0, err
    stats = json.loads(out)["steps"][-1]["stats"]
    assert stats["decomposed"] == 1
    assert stats["ms_after"] < stats["ms_before"]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ((), 2, "recipe narrow: low-rank measures layers on the target; name one with -t TARGET"),
        (("-d", "local"), 2, "say with -t"),
        (("-t", "natve"), 2, "Did you mean native"),
        (("-t", "native", "-d", "qemu"), 5, "no emulator"),
    ],
)
def test_compress_does_not_guess_what_is_faster(
    edgepress: Edgepress,
    low_rank: tuple[Path, Path],
    tmp_path: Path,
    options: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    model, recipe = low_rank
    got, _, err = edgepress("compress", model, "-r", recipe, *options, "-o", tmp_path / "a.onnx")
    assert (got, words in err) == (code, True), err
    assert "fix-shapes" not in err, "before any work"
    assert not (tmp_path / "a.onnx").exists()
