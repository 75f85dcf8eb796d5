"""The pipeline for a GPU, from an ONNX file to verdicts; the GPU is emulated behind a driver."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.pipeline._layer_programs import side_by_side
from edgepress.pipeline.cli import main
from edgepress.pipeline.tile_search import (
    compile_side_by_side,
    find_sites,
    site_program,
    tiles_to_try,
)
from edgepress.targets.compile import compile_kernels
from edgepress.targets.cuda.gemm_tile import GemmLayer
from edgepress.targets.devices.base import open_device
from edgepress.targets.load import load_target
from edgepress.targets.lowering.build import lower
from edgepress.targets.program import Array
from tests.cuda.stub_driver import stub_driver, write_nvml
from tests.graphs import net, random
from tests.targets.qdq import shaped

TARGET = load_target("cuda-sm90")
RECIPES = {
    "int8": '[[pass]]\nname = "calibrate"\n[[pass]]\nname = "quantize-int8"\n',
    "float16": '[[pass]]\nname = "float-format"\n[budget]\nsqnr_db = 40\n',
    "float16, coded": '[[pass]]\nname = "float-format"\n[[pass]]\nname = "encode-huffman"\n',
}


def network() -> ir.Model:
    weights: dict[str, Array] = {
        "w0": random(16, 3, 3, 3) / 5,
        "b0": random(16),
        "w1": random(16, 1, 3, 3) / 3,
        "w2": random(24, 16, 1, 1) / 4,
        "w3": random(24, 24, 3, 3) / 15,
        "m": random(24, 10) / 5,
    }
    body = """a = Conv <pads=[1,1,1,1], strides=[2,2]> (x, w0, b0) r = Relu(a)
        d = Conv <pads=[1,1,1,1], group=16> (r, w1) e = Relu(d)
        f = Conv(e, w2) g = Relu(f) h = Conv <pads=[1,1,1,1]> (g, w3) s = Add(f, h)
        p = GlobalAveragePool(s) q = Flatten(p) y = MatMul(q, m)"""
    return net("(float[1,3,12,12] x) => (float[1,10] y)", body, weights)


def edgepress(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_bundle_is_built_without_a_gpu_and_verified_on_one(
    recipe: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("EDGEPRESS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))  # no driver, whatever machine this is
    model, data, bundle = tmp_path / "m.onnx", tmp_path / "d.npz", tmp_path / "bundle"
    ir.save(network(), model)
    np.savez(data, x=random(8, 3, 12, 12))
    (tmp_path / "r.toml").write_text("schema = 1\n" + recipe)
    code = edgepress(
        "run", model, "-t", "cuda-sm90", "-r", tmp_path / "r.toml", "--calib", data,
        "--eval", data, "-o", bundle,
    )  # fmt: skip
    assert code == 5
    assert "no NVIDIA driver" in capsys.readouterr().err
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["target"]["gpu_arch"] == "sm_90"
    assert manifest["toolchain"]["cuda"].startswith("nv")

    program = lower(ir.load(bundle / "graph.onnx"), TARGET)
    for name, value in stub_driver(tmp_path / "driver", program).items():
        monkeypatch.setenv(name, value)
    write_nvml(tmp_path / "driver")
    code = edgepress("verify", bundle, "--eval", data, "--model", model, "--json")
    printed = capsys.readouterr()
    assert code == 0, printed
    evidence = json.loads(printed.out)
    verdicts = {each["gate"]: each for each in evidence["verdicts"]}
    assert evidence["passed"]
    if "quantize-int8" in recipe:
        assert verdicts["outputs"]["value"] == 0  # bits
    assert evidence["latency"]["device"]["gpu"]["compute_capability"] == "9.0"


def test_tiles_are_searched_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = find_sites(shaped(network()), TARGET, {}, shipped=False)
    assert all(isinstance(site.layer, GemmLayer) for site in sites)
    assert [site.layer.key.split(",")[0] for site in sites] == [
        "conv float32 3x3 4 > 16",
        "gemm float32 1x1 16 > 24",
        "conv float32 3x3 24 > 24",
        "gemm float32 1x1 24 > 10",
    ]
    tiles = tiles_to_try(sites[2])[:3]
    programs = [site_program(sites[2], tile, TARGET) for tile in tiles]
    joined = side_by_side(dict(enumerate(programs)), TARGET)
    bench = compile_side_by_side(programs, TARGET, tmp_path / "layers")
    for name, value in stub_driver(tmp_path / "driver", joined.program).items():
        monkeypatch.setenv(name, value)
    write_nvml(tmp_path / "driver")
    costs = bench.visit(open_device("local", TARGET))
    assert len(costs) == len(tiles) == 3
    assert all(np.isfinite(costs))


@pytest.mark.parametrize("architecture", ["sm_86", "sm_89", "sm_90a"])
def test_gpus_that_no_board_file_names(architecture: str) -> None:
    target = dataclasses.replace(TARGET, gpu_arch=architecture, gpu_multiprocessors=46)
    program = lower(shaped(network()), target)
    limit = 99 if architecture != "sm_90a" else 227
    assert all(kernel.shared_bytes <= limit * 1024 for kernel in program.kernels.values())
    assert compile_kernels(program, target)
