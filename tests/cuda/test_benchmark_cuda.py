"""What the race on a GPU is given, and the tables that it ends in; needs no GPU."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgepress.pipeline.recipe import parse_recipe
from tests.cuda.benchmark_scripts import Load, a_row, fake_bundle, scripts


@pytest.fixture(scope="module")
def load() -> Iterator[Load]:
    with scripts() as load_script:
        yield load_script


# Building and packing --------------------------------------------------------------------------


def test_the_important_rows_come_first(load: Load) -> None:
    rows = load("build").configurations()
    assert len(rows) == 32
    assert [row.name for row in rows[:5]] == [
        "resnet18-float16-b1",
        "mobilenetv2-float16-b1",
        "efficientnet-lite0-float16-b1",
        "minilm-float16-b1",
        "resnet18-int8-b1",
    ]
    assert [row.batch for row in rows] == [1] * 16 + [32] * 16
    only = load("build").configurations(["minilm-*-b1", "*-tf32-b32"])
    assert len(only) == 4 + 4


def test_every_precision_has_a_recipe(load: Load) -> None:
    names = {}
    for row in load("build").configurations(["*-b1"]):
        recipe = parse_recipe(row.recipe, row.precision)
        names[row.network.name, row.precision] = [step.name for step in recipe.passes]
    assert names["resnet18", "float32"] == ["encode-huffman"]
    assert names["resnet18", "int8"] == ["calibrate", "quantize-int8", "encode-huffman"]
    assert names["minilm", "int8"] == ["quantize-dynamic", "encode-huffman"]
    assert names["minilm", "float16"] == ["float-format", "encode-huffman"]
    assert names["minilm", "tf32"] == ["float-format", "encode-huffman"]


def test_weights_are_rounded_to_few_values(load: Load) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "table": rng.normal(3, 1, (64, 32)).astype(np.float32),
        "weight": rng.normal(0, 0.1, (32, 64)).astype(np.float32),
        "bias": rng.normal(0, 0.1, 64).astype(np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["table", "index"], ["row"]),
        helper.make_node("MatMul", ["row", "weight"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "lookup",
        [helper.make_tensor_value_info("index", onnx.TensorProto.INT64, [4])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4, 64])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = load("build").rounded(helper.make_model(graph), 4)
    after = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert {name: len(np.unique(array)) for name, array in after.items()} == {
        "table": 2,
        "weight": 4,
        "bias": 64,
    }
    np.testing.assert_array_equal(after["bias"], arrays["bias"])
    for name in ("table", "weight"):
        assert after[name].mean() == pytest.approx(arrays[name].mean(), rel=1e-3, abs=1e-4)
        assert np.corrcoef(after[name].ravel(), arrays[name].ravel())[0, 1] > 0.75


@pytest.mark.parametrize(("batch", "shape"), [(1, (3, 2)), (2, (1, 2, 2)), (8, (1, 8, 2))])
def test_samples_come_in_batches(
    load: Load, tmp_path: Path, batch: int, shape: tuple[int, ...]
) -> None:
    build = load("build")
    np.savez(tmp_path / "net_calib.npz", x=np.arange(6.0).reshape(3, 2), labels=np.arange(3))
    found = build.samples(build.Network("net", {"x": (2,)}), tmp_path, batch)
    assert {name: array.shape for name, array in found.items()} == {"x": shape}
    assert found["x"].ravel()[:4].tolist() == [0, 1, 2, 3]
    if batch == 8:  # from the start again, as often as it takes
        assert found["x"].ravel()[6:10].tolist() == [0, 1, 2, 3]


def test_a_pack_holds_equal_files_once(load: Load, tmp_path: Path) -> None:
    pack = load("pack")
    bundles = tmp_path / "bundles"
    noise = np.random.default_rng(0).bytes(100_000)
    fake_bundle(bundles / "a", "#!/bin/sh\necho a\n", noise)
    fake_bundle(bundles / "b", "#!/bin/sh\necho b\n", noise)
    rows = [{"name": "a", "macs": 1}, {"name": "b", "macs": 2}]
    size = pack.pack(bundles, rows, tmp_path / "pack.tar.xz")
    assert 100_000 < size < 110_000
    found = pack.unpack(tmp_path / "pack.tar.xz", tmp_path / "there")
    assert [(row["name"], row["macs"]) for row in found] == [("a", 1), ("b", 2)]
    assert pack.read_index(tmp_path / "there") == found
    for name in "ab":
        there = tmp_path / "there" / name
        assert (there / "model").read_text().endswith(f"echo {name}\n")
        assert (there / "model").stat().st_mode & stat.S_IXUSR
        assert (there / "weights.epw").read_bytes() == noise
        assert (there / "golden/0.in").read_bytes() == b"in"
        assert not (there / "graph.onnx").exists()
    inodes = {(tmp_path / "there" / name / "weights.epw").stat().st_ino for name in "ab"}
    assert len(inodes) == 1
    pack.unpack(tmp_path / "pack.tar.xz", tmp_path / "there")  # over what is there


def test_the_gpu_is_asked_for_its_state(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = load("machine")
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho P0, 1980, 3201, 41, 300.5, 0x0000000000000005\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    state = machine.momentary()
    assert state["clocks.sm"] == "1980"
    assert machine.throttled(state) == ["power cap"]
    assert machine.throttled({"clocks_event_reasons.active": "[N/A]"}) == []
    assert machine.constant() == {}  # another number of answers than questions
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert machine.momentary() == {}


def test_what_pytorch_compiled_travels_back_as_far_as_it_fits(
    load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_device, said = load("on_device"), list[str]()
    random = np.random.default_rng(0)
    made = {name: random.bytes(size) for name, size in (("a", 9000), ("b", 3000), ("c", 5000))}
    (tmp_path / "made").mkdir()
    for name, data in made.items():
        (tmp_path / "made" / name).write_bytes(data)
    monkeypatch.setattr(on_device, "MOST_ARTIFACT_BYTES", 10_000)
    on_device.keep_artifacts(tmp_path / "made", tmp_path / "artifacts.tar.xz", said.append)
    assert (tmp_path / "artifacts.tar.xz").stat().st_size <= 10_000
    on_device.load_artifacts(tmp_path / "artifacts.tar.xz", tmp_path / "there")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()}
    assert kept == {name: made[name] for name in "bc"}
    on_device.keep_artifacts(tmp_path / "nothing", tmp_path / "none.tar.xz", said.append)
    assert not (tmp_path / "none.tar.xz").exists()


@pytest.mark.parametrize("passes", [True, False])
def test_a_bundle_that_fails_its_selftest_is_not_timed(
    load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, passes: bool
) -> None:
    calls = '[{"node": "conv", "midmean_ms": 0.5}]'
    wrong = "false" if not passes else "true"
    bad = (
        f"case $1 in --selftest) echo '{{\"passed\": {wrong}}}'; exit {int(not passes)};; "
        f"*) echo '{{\"calls\": {calls}}}';; esac"
    )
    good = bad.replace("false", "true").replace("exit 1", "exit 0")
    for name, script in (("good", good), ("bad", bad)):
        fake_bundle(tmp_path / "bundles" / name, f"#!/bin/sh\n{script}\n")
    rows = [{"name": name, "macs": 1} for name in ("good", "bad")]
    load("pack").pack(tmp_path / "bundles", rows, tmp_path / "pack.tar.xz")
    out, work = tmp_path / "out", tmp_path / "work"
    words = ["on_device", str(tmp_path / "pack.tar.xz"), "-o", str(out), "--work", str(work)]
    monkeypatch.setattr("sys.argv", [*words, "--phases", "selftest,profile"])
    assert load("on_device").main() == (0 if passes else 1)
    timed = json.loads((out / "profile.json").read_text())
    assert set(timed) == ({"good", "bad"} if passes else {"good"})
    assert json.loads((out / "selftest.json").read_text())["bad"]["passed"] is passes
    assert "not measured" in (out / "table.md").read_text()


# Tables ----------------------------------------------------------------------------------------


def times(p50: float) -> dict[str, Any]:
    return {"rounds": [p50, p50 * 1.1], "q1": p50 * 0.9, "p50": p50, "q3": p50 * 1.2, "count": 9}


def a_result(name: str, ours: float, **theirs: float) -> dict[str, Any]:
    row = a_row(name, 1, 10**9)
    contenders: dict[str, Any] = {"edgepress": {"events_ms": times(ours)}}
    contenders |= {n: {"events_ms": times(t), "queued_ms": t / 2} for n, t in theirs.items()}
    state = {"clocks.sm": "1980", "clocks_event_reasons.active": "0x4"}
    return {
        "kind": "row", **row, "peer_precision": "float16", "contenders": contenders,
        "skipped": {"graph": "it broke"}, "torch_mode": "reduce-overhead",
        "state": {"before": {}, "after": state},
    }  # fmt: skip


RESULTS = [
    {"kind": "machine", "gpu": {"name": "GPU X", "clocks.max.sm": "2000"}, "torch": "2.11.0"},
    {"kind": "peak", "copy_gb_per_s": 4300.4, "float16": 800.0, "int8": None},
    a_result("resnet18-float16", 0.1, eager=1.0, compiled=0.2),
    a_result("minilm-int8", 0.4, eager=0.3),
    {"kind": "left out", "name": "resnet18-tf32-b1", "why": "the time was over"},
]


def test_the_table_says_who_is_faster(load: Load) -> None:
    text = load("table").report(RESULTS)
    assert (
        "| ResNet-18 | float16 | 0.1 (0.09–0.12) | 1 | – | 0.2 | 0.50 (0.50–0.50) compiled | 2.5 |"
        in text
    )
    slower = "0.4 (0.36–0.48) | 0.3 | – | – | 1.33 (1.33–1.33) eager"
    assert f"| MiniLM 64 | int8 / float16 | {slower} | – |" in text
    assert "float16 0.50 (of 1), int8 1.33 (of 1), all 0.82 (of 2)" in text
    assert "GPU: GPU X, driver –; PyTorch 2.11.0" in text
    assert "clocks between rows 1980–1980 of 2000 MHz; held down by: power cap." in text
    assert "copy 4300 GB/s; products, TOP/s: float16 800." in text
    assert "resnet18-float16-b1: eager 0.5, compiled 0.1" in text
    assert "Compiled: torch.compile, reduce-overhead." in text
    assert "minilm-int8-b1 graph: it broke" in text
    assert "Not measured: resnet18-tf32-b1." in text


def test_the_last_result_of_a_row_counts(load: Load, tmp_path: Path) -> None:
    again = a_result("resnet18-float16", 0.3, eager=1.0)
    late = {"kind": "left out", "name": "minilm-int8-b1", "why": "the time was over"}
    path = tmp_path / "race.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*RESULTS, again, late]))
    rows = {row.get("name") or row["kind"]: row for row in load("table").read(path)}
    assert len(rows) == len(RESULTS)
    assert rows["resnet18-float16-b1"]["contenders"]["edgepress"]["events_ms"]["p50"] == 0.3
    assert rows["minilm-int8-b1"]["kind"] == "row"


def test_a_table_of_nothing_is_no_error(load: Load) -> None:
    assert "not known" in load("table").report([])
