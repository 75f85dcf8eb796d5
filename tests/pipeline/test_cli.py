"""The command line: exit codes, one paragraph per error, one JSON document on stdout."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from edgepress.passes.base import pass_names
from edgepress.pipeline.cli import EXIT_CODES, cli
from edgepress.pipeline.oracle import Oracle
from edgepress.targets.base import CompileFailed, DeviceFailed
from edgepress.targets.load import target_names
from tests.pipeline.conftest import Edgepress, World

COMMANDS = sorted(cli.commands)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_an_example_json_and_debug(command: str) -> None:
    result = CliRunner().invoke(cli, [command, "--help"])
    assert result.exit_code == 0
    assert f"Example:\n    edgepress {command}" in result.output
    assert "--json" in result.output
    assert "--debug" in result.output


def test_the_commands_are_those_of_the_design() -> None:
    pipeline = ["run", "compress", "compile", "deploy", "verify", "infer", "bench", "unpack"]
    lists = ["inspect", "explain", "passes", "targets", "devices", "doctor"]
    around = ["keygen", "sign", "image"]
    assert sorted(pipeline + lists + around) == COMMANDS


def test_help_and_mistakes_import_nothing_heavy() -> None:
    script = (
        "import sys\nfrom edgepress.pipeline import cli\n"
        "for words, code in ((['--help'], 0), (['run', '--no-such-option'], 2)):\n"
        "    try:\n        cli.main(words)\n"
        "    except SystemExit as stop:\n        assert stop.code == code\n"
        "heavy = {'tvm', 'onnx', 'onnx_ir', 'onnxruntime', 'numpy', 'rich', 'cryptography'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Try `edgepress run --help`" in done.stderr


def test_every_mapped_error_exists() -> None:
    for name in EXIT_CODES:
        module, _, cls = name.rpartition(".")
        assert issubclass(getattr(__import__(module, fromlist=[cls]), cls), Exception)


def nan_model(path: Path) -> None:
    model = onnx.load(path)
    weights = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    weights.flat[0] = np.nan
    name = model.graph.initializer[0].name
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights, name))
    onnx.save(model, path)


def damage(folder: Path, kind: str) -> dict[str, object]:
    """Make one bad input; return the arguments that it changes."""
    bad = folder / "bad"
    match kind:
        case "not a model":
            bad.write_bytes(b"hello")
        case "truncated":
            bad.write_bytes((folder / "net.onnx").read_bytes()[:-100])
        case "nan":
            bad.write_bytes((folder / "net.onnx").read_bytes())
            nan_model(bad)
        case "wrong input name":
            np.savez(folder / "bad.npz", X=np.zeros((1, 3, 8, 8), np.float32))
            return {"--calib": folder / "bad.npz"}
        case "wrong shape":
            np.savez(folder / "bad.npz", x=np.zeros((1, 3, 9, 9), np.float32))
            return {"--eval": folder / "bad.npz"}
        case "nan sample":
            np.savez(folder / "bad.npz", x=np.full((1, 3, 8, 8), np.nan, np.float32))
            return {"--calib": folder / "bad.npz"}
        case "existing output":
            (folder / "out").mkdir()
            return {}
        case "unwritable output":
            (folder / "file").write_text("")
            return {"-o": folder / "file/out"}
        case "recipe":
            (folder / "bad.toml").write_text("schema = 1\n[budgt]\n")
            return {"-r": folder / "bad.toml"}
        case "target":
            return {"-t": "raspbery-pi-4"}
        case "device":
            return {"-d": "qemo"}
        case "input shape":
            return {"--input-shape": "x:1x3x8x9"}
        case _:
            return {}
    return {"MODEL": bad}


@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        ("not a model", 3, "not an ONNX model"),
        ("truncated", 3, "truncated"),
        ("nan", 3, "NaN"),
        ("missing", 3, "No such file"),
        ("wrong input name", 2, "'X'"),
        ("wrong shape", 2, "[n, 3, 8, 8]"),
        ("nan sample", 2, "NaN"),
        ("existing output", 2, "--overwrite"),
        ("unwritable output", 2, "cannot write"),
        ("recipe", 2, "bad.toml:2: unknown key 'budgt'; did you mean 'budget'?"),
        ("target", 2, "Did you mean raspberry-pi-4"),
        ("device", 5, "Did you mean qemu"),
        ("input shape", 3, "axis 3 is fixed"),
    ],
)
def test_bad_input_is_one_paragraph(
    edgepress: Edgepress, world: World, tmp_path: Path, kind: str, code: int, words: str
) -> None:
    (tmp_path / "net.onnx").write_bytes(world.model.read_bytes())
    options: dict[str, object] = {"-t": "native", "--calib": world.samples, "-o": tmp_path / "out"}
    model = tmp_path / ("missing.onnx" if kind == "missing" else "net.onnx")
    options |= {"MODEL": model} | damage(tmp_path, kind)
    model = Path(str(options.pop("MODEL")))
    flat = [part for option in options.items() for part in option]
    got, out, err = edgepress("run", model, *flat, "--json")
    assert got == code, err
    assert words in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("edgepress: ")
    assert "Traceback" not in err
    assert json.loads(out)["error"] == {
        "code": code,
        "kind": json.loads(out)["error"]["kind"],
        "message": last.removeprefix("edgepress: "),
    }
    if kind != "existing output":
        assert not (tmp_path / "out").exists()


def test_a_bug_says_so(edgepress: Edgepress, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("edgepress.pipeline.commands.inspect", fail)
    code, _, err = edgepress("inspect", world.model)
    assert code == 1
    assert "this is a bug in edgepress: ZeroDivisionError" in err
    assert "Traceback" not in err
    code, _, err = edgepress("inspect", world.model, "--debug")
    assert code == 1
    assert "Traceback" in err


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "/x"),
        CompileFailed("gcc failed", "x.s: No space left on device"),
    ],
)
def test_a_full_disk_is_no_bug(
    edgepress: Edgepress, world: World, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr("edgepress.pipeline.commands.inspect", fail)
    code, _, err = edgepress("inspect", world.model)
    assert code == 2
    assert "free some space" in err
    assert err.count("\n") == 1


def test_an_interrupt_is_one_line(
    edgepress: Edgepress, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgepress.pipeline.commands.inspect", stop)
    code, out, err = edgepress("inspect", world.model)
    assert (code, out) == (130, "")
    assert err.strip() == "edgepress: interrupted; what had not finished is as it was."


def test_run_and_verify(edgepress: Edgepress, world: World, tmp_path: Path) -> None:
    arguments = ("run", world.model, "-t", "native", "--calib", world.samples, "-o", tmp_path / "b")
    options = ("--json", "--threads", "1", "--html", tmp_path / "report.html")
    code, out, _ = edgepress(*arguments, *options)
    document = json.loads(out)
    assert (code, document["passed"]) == (0, True)
    assert document["evidence"]["latency"]["threads"] == 1
    assert [step["pass_name"] for step in document["steps"]][-2:] == ["calibrate", "quantize-int8"]
    assert "quantize-int8" in (tmp_path / "report.html").read_text()
    code, out, _ = edgepress(
        "verify", tmp_path / "b", "--eval", world.samples, "--max-latency-ms", "1e-7"
    )
    assert code == 6
    assert "latency_ms" in out
    code, out, _ = edgepress("verify", tmp_path / "b", "--threads", "2", "--json")
    assert (code, json.loads(out)["latency"]["threads"]) == (0, 2)
    (tmp_path / "b/model").write_bytes(b"not a program")
    code, _, err = edgepress("verify", tmp_path / "b")
    assert code == 2
    assert "model has another size" in err


def test_nothing_can_verify_is_code_5(
    edgepress: Edgepress, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(_spec: object, _target: object) -> None:
        raise DeviceFailed("qemu-aarch64 is not installed")

    monkeypatch.setattr("edgepress.pipeline.run.open_device", none)
    arguments = ("run", world.model, "-t", "native", "-r", "none", "-o", tmp_path / "b", "--json")
    code, out, err = edgepress(*arguments)
    assert code == 5
    assert "is built, but nothing verified it: qemu-aarch64 is not installed" in err
    document = json.loads(out)
    assert (document["evidence"], document["passed"]) == (None, False)
    assert (tmp_path / "b/manifest.json").is_file()


def test_compile_infer_unpack_agree(edgepress: Edgepress, world: World, tmp_path: Path) -> None:
    assert edgepress("compile", world.model, "-t", "native", "-o", tmp_path / "b")[0] == 0
    answers, model = tmp_path / "a.npz", tmp_path / "m.onnx"
    assert edgepress("infer", tmp_path / "b", "--data", world.samples, "-o", answers)[0] == 0
    assert edgepress("unpack", tmp_path / "b", "-o", model)[0] == 0
    with np.load(world.samples) as samples, np.load(answers) as got:
        oracle = Oracle(model.read_bytes())
        expected = [oracle.run({"x": x[None]})["y"][0] for x in samples["x"]]
        np.testing.assert_allclose(got["y"], expected, rtol=1e-4, atol=1e-5)
    code, _, err = edgepress("infer", tmp_path / "b", "--data", world.samples, "-o", answers)
    assert code == 2
    assert "--overwrite" in err


def test_compress_writes_an_onnx_model(edgepress: Edgepress, world: World, tmp_path: Path) -> None:
    path = tmp_path / "small.onnx"
    code, out, _ = edgepress(
        "compress", world.model, "--calib", world.samples, "-o", path, "--json"
    )
    assert code == 0
    assert json.loads(out)["steps"][-1]["pass_name"] == "quantize-int8"
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load(path).graph.node)


def test_inspect(edgepress: Edgepress, world: World) -> None:
    model = json.loads(edgepress("inspect", world.model, "--json")[1])
    assert model["inputs"][0]["shape"] == [1, 3, 8, 8]
    assert model["operators"]["Conv"] == 1
    assert model["macs"] == 8 * 64 * 27 + 80
    bundle = json.loads(edgepress("inspect", world.request.output, "--json")[1])
    assert bundle["float_islands"] == []
    assert bundle["parameters"] == model["parameters"]
    assert "Conv" in edgepress("inspect", world.request.output)[1]


def test_lists(edgepress: Edgepress) -> None:
    def listed(kind: str) -> list[dict[str, Any]]:
        code, out, _ = edgepress(kind, "--json")
        assert code == 0
        rows: list[dict[str, Any]] = json.loads(out)[kind]
        return rows

    assert sorted(row["name"] for row in listed("passes")) == pass_names()
    assert [row["name"] for row in listed("targets")] == target_names()
    devices = {row["name"]: row["targets"] for row in listed("devices")}
    assert "native" in devices["local"]
    assert "native" not in devices["qemu"]


def test_doctor_names_what_to_do(edgepress: Edgepress, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _name: None)
    code, out, _ = edgepress("doctor", "--json")
    assert code == 4
    missing = [check for check in json.loads(out)["checks"] if not check["ok"]]
    assert any("qemu-aarch64" in check["what"] for check in missing)
    assert any(check["fix"] == "apt-get install openssh-client" for check in missing)
    assert all(check["fix"] for check in missing)


def test_bench_is_a_race(
    edgepress: Edgepress, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgepress.pipeline.race.VISIT_SECONDS", 0.02)
    arguments = ("bench", world.request.output, "--against", "onnxruntime", "--rounds", "2")
    code, out, _ = edgepress(*arguments, "--model", world.model, "--json")
    assert code == 0
    race = json.loads(out)
    assert set(race["medians_ms"]) == {
        "edgepress",
        "onnxruntime int8",
        "onnxruntime fp32",
        "onnxruntime int8 static",
    }
    assert set(race["sqnr_db"]) == set(race["medians_ms"])
    assert race["sqnr_db"]["onnxruntime fp32"] > 100
    assert list(race["skipped"]) == ["onnxruntime int8 dynamic"]
    assert race["notes"]  # samples to calibrate on were not given
    for name, ratio in race["our_time_over_theirs"].items():
        assert ratio["min"] <= ratio["median"] <= ratio["max"]
        shares = [
            ours / theirs
            for ours, theirs in zip(
                race["medians_ms"]["edgepress"], race["medians_ms"][name], strict=True
            )
        ]
        assert ratio["max"] == max(shares)


def test_the_target_may_come_from_the_devices_file(
    edgepress: Edgepress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = tmp_path / "boards.toml"
    devices.write_text(
        'bench = { connect = "local", target = "no-such-board" }\nbare = { connect = "local" }\n'
    )
    monkeypatch.setenv("EDGEPRESS_DEVICES", str(devices))
    asked = ["run", "model.onnx", "-o", str(tmp_path / "out"), "-d"]
    assert "no target is called 'no-such-board'" in edgepress(*asked, "bench")[2]
    for device in ("bare", "local"):
        code, _, err = edgepress(*asked, device)
        assert (code, "say with -t what board" in err) == (2, True)
