"""The size ledger, against the bytes of the weights file and the elements of the graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepress.passes.base import Context
from edgepress.pipeline.bundle import read_bundle
from edgepress.pipeline.driver import Driver, canonical_passes
from edgepress.pipeline.size_ledger import SUMS, size_ledger
from edgepress.targets.load import load_target
from edgepress.targets.lowering.build import lower
from edgepress.targets.program import Program
from edgepress.targets.weights import write_weights
from tests.graphs import Array, net, random, weight
from tests.pipeline.conftest import World

Ledger = dict[str, Any]


def lowered(
    model: ir.Model, path: Path, *, coded: bool = False
) -> tuple[ir.Model, Program, list[dict[str, Any]]]:
    driver = Driver(model)
    driver.run(canonical_passes(), Context())
    program = lower(driver.model, load_target("native"))
    return driver.model, program, write_weights(path, program.constants, coded=coded)


def ledger_of(model: ir.Model, path: Path, *, coded: bool = False) -> Ledger:
    model, program, weights = lowered(model, path, coded=coded)
    ledger = size_ledger(program, model, weights)
    check(ledger, path)
    return ledger


def check(ledger: Ledger, path: Path) -> None:
    """Every byte of the file is in it once, and the total is the sum."""
    total = ledger["total"]
    assert total["coded_bytes"] + total["container_bytes"] == path.stat().st_size
    for key in SUMS:
        assert total[key] == sum(layer[key] for layer in ledger["layers"])
    assert total["ratio"] == round(total["fp32_bytes"] / path.stat().st_size, 2)


def by_name(ledger: Ledger) -> Mapping[str, dict[str, Any]]:
    named = {layer["name"]: layer for layer in ledger["layers"]}
    assert len(named) == len(ledger["layers"])
    return named


BODY = """c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) d = Conv<pads=[1,1,1,1]>(r, v)
          p = GlobalAveragePool(d) f = Flatten(p) y = Gemm<transB=1>(f, m, n)"""
SIGNATURE = "(float[1,4,8,8] x) => (float[1,10] y)"


def weights() -> dict[str, Array]:
    return {
        "w": random(16, 4, 3, 3),
        "b": random(16),
        "v": random(8, 16, 3, 3),
        "m": random(10, 8),
        "n": random(10),
    }


def test_floats_are_what_they_are(tmp_path: Path) -> None:
    layers = by_name(ledger_of(net(SIGNATURE, BODY, weights()), tmp_path / "w"))
    assert list(layers) == ["Conv_0", "Conv_2", "Gemm_5", "other"]
    for name, count in {"Conv_0": 576 + 16, "Conv_2": 1152, "Gemm_5": 90}.items():
        assert layers[name]["weights"] == count
        assert layers[name]["zeros"] == 0
        for stage in ("fp32_bytes", "pruned_bytes", "shared_bytes"):
            assert layers[name][stage] == 4 * count
        assert layers[name]["coded_bytes"] >= 4 * count
    assert layers["Conv_0"]["operator"] == "Conv"
    assert layers["other"]["weights"] == 0
    assert layers["other"]["container_bytes"] >= 40


def test_pruned_and_shared_stages(tmp_path: Path) -> None:
    tensors = weights()
    rng = np.random.default_rng(0)
    v = np.array([-0.5, 0.25, 1.0, 2.0], np.float32)[rng.integers(0, 4, tensors["v"].shape)]
    tensors["v"] = np.where(rng.random(v.shape) < 0.9, np.float32(0), v)
    tensors["w"] = np.array([0.1, 0.2], np.float32)[rng.integers(0, 2, tensors["w"].shape)]
    layers = by_name(ledger_of(net(SIGNATURE, BODY, tensors), tmp_path / "w"))
    kept = np.count_nonzero(tensors["v"])
    assert layers["Conv_2"]["zeros"] == 1152 - kept
    assert layers["Conv_2"]["pruned_bytes"] == kept * (4 + 1)  # distances below 256: one byte
    assert layers["Conv_2"]["shared_bytes"] == -(-kept * (2 + 8) // 8) + 4 * 4
    assert layers["Conv_0"]["pruned_bytes"] == 4 * (576 + 16)
    assert layers["Conv_0"]["shared_bytes"] == 576 // 8 + 2 * 4 + 4 * 16


def test_coded_payloads_lie_close_and_above_the_bound(tmp_path: Path) -> None:
    tensors = weights()
    rng = np.random.default_rng(0)
    tensors["w"] = np.array([0.1, 0.2], np.float32)[rng.integers(0, 2, tensors["w"].shape)]
    raw, coded = (
        ledger_of(net(SIGNATURE, BODY, tensors), tmp_path / str(coded), coded=coded)
        for coded in (False, True)
    )
    for key in ("weights", "zeros", "fp32_bytes", "pruned_bytes", "shared_bytes"):
        assert raw["total"][key] == coded["total"][key]
    for layer in raw["layers"]:
        assert layer["entropy_bytes"] == layer["coded_bytes"], "what is raw counts in full"
    for before, after in zip(raw["layers"], coded["layers"], strict=True):
        assert after["entropy_bytes"] <= after["coded_bytes"] <= before["coded_bytes"]
    conv = by_name(coded)["Conv_0"]
    # of every weight a bit, of the biases at most all
    assert 576 // 8 < conv["entropy_bytes"] < conv["coded_bytes"] < 576 // 8 + 64 + 60
    assert coded["total"]["ratio"] > raw["total"]["ratio"]


def test_dense_layers_have_shorter_distances(tmp_path: Path) -> None:
    m = np.zeros((40, 100), np.float32)
    m.flat[::40] = np.arange(1, 101)  # 39 zeros between: one filler each, but before the first
    model = net("(float[1,40] x) => (float[1,100] y)", "y = MatMul(x, m)", {"m": m})
    (layer, _) = ledger_of(model, tmp_path / "w")["layers"]
    assert layer["pruned_bytes"] == -(-(100 + 99) * (32 + 5) // 8)


def test_what_layers_share_belongs_to_the_first(tmp_path: Path) -> None:
    body = "a = Conv(x, w) r = Relu(a) y = Conv(r, w)"
    model = net("(float[1,4,5,5] x) => (float[1,4,5,5] y)", body, {"w": random(4, 4, 1, 1)})
    model, program, rows = lowered(model, tmp_path / "w")
    ledger = size_ledger(program, model, rows)
    check(ledger, tmp_path / "w")
    layers = by_name(ledger)
    assert list(layers) == ["Conv_0", "other"]
    assert layers["Conv_0"]["weights"] == 16
    payloads = {row["offset"]: row["encoded_bytes"] for row in rows}
    assert sum(layer["coded_bytes"] for layer in layers.values()) == sum(payloads.values())
    assert layers["Conv_0"]["coded_bytes"] == sum(payloads.values()), "equal bytes are stored once"


def test_constants_of_other_operators_count(tmp_path: Path) -> None:
    body = "a = Conv(x, w) y = Add(a, t)"
    tensors = {"w": random(4, 4, 1, 1), "t": random(1, 4, 5, 5)}
    model = net("(float[1,4,5,5] x) => (float[1,4,5,5] y)", body, tensors)
    layers = by_name(ledger_of(model, tmp_path / "w"))
    assert sum(layer["weights"] for layer in layers.values()) == 16 + 100


def test_a_model_without_weights(tmp_path: Path) -> None:
    model = net("(float[1,4] x) => (float[1,4] y)", "y = Relu(x)")
    model, program, rows = lowered(model, tmp_path / "w")
    ledger = size_ledger(program, model, rows)
    assert ledger["total"]["weights"] == 0
    assert ledger["total"]["ratio"] is None
    assert ledger["total"]["coded_bytes"] + ledger["total"]["container_bytes"] == (
        (tmp_path / "w").stat().st_size
    )


def test_a_quantized_bundle(world: World) -> None:
    bundle = read_bundle(world.request.output)
    ledger = bundle.manifest.ledger
    check(ledger, bundle.folder / "weights.epw")
    layers = by_name(ledger)
    graph = ir.load(bundle.folder / "graph.onnx")
    sizes = {"Conv_0": (216, 8), "Gemm_4": (80, 10)}
    for name, (weights_, biases) in sizes.items():
        layer = layers[name]
        assert layer["weights"] == weights_ + biases
        assert layer["fp32_bytes"] == 4 * (weights_ + biases)
        scales = weight(graph, "w1_scale" if name == "Conv_0" else "w2_scale").size
        assert layer["shared_bytes"] == weights_ + 4 * biases + 4 * scales
        own = [row for row in bundle.manifest.weights if row["name"].startswith(f"{name}.")]
        assert layer["coded_bytes"] == sum(row["encoded_bytes"] for row in own)
    assert ledger["total"]["weights"] == 314
