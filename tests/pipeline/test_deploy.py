import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest

from edgepress.pipeline.bundle import read_bundle
from edgepress.pipeline.deploy import deploy
from edgepress.pipeline.output import OutputError
from edgepress.targets.base import DeviceFailed
from tests.pipeline.conftest import World


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_what_the_board_needs_arrives_unchanged(world: World, tmp_path: Path) -> None:
    source = world.request.output
    done = deploy(read_bundle(source), "local", destination=tmp_path / "there")
    expected = {p: h for p, h in files(source).items() if p not in ("graph.onnx", "evidence.json")}
    assert files(tmp_path / "there") == expected
    assert done.golden_samples > 0
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_it_replaces_an_older_bundle_but_nothing_else(world: World, tmp_path: Path) -> None:
    bundle = read_bundle(world.request.output)
    deploy(bundle, "local", destination=tmp_path / "there")
    deploy(bundle, "local", destination=tmp_path / "there")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("not a bundle")
    with pytest.raises(OutputError, match="not a bundle"):
        deploy(bundle, "local", destination=tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "not a bundle"


def test_a_failing_selftest_installs_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_device: Any, _folder: Path) -> dict[str, Any]:
        return {"passed": False}

    monkeypatch.setattr("edgepress.targets.command_device.CommandDevice.selftest", fails)
    with pytest.raises(DeviceFailed, match="not installed"):
        deploy(read_bundle(world.request.output), "local", destination=tmp_path / "there")
    assert list(tmp_path.iterdir()) == []


def test_the_default_place_is_in_the_home_folder(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    bundle = read_bundle(world.request.output)
    assert deploy(bundle, None).folder == tmp_path / "edgepress" / bundle.manifest.name
    shutil.rmtree(tmp_path / "edgepress")
