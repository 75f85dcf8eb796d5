"""Bundles are installed whole, tried where they run, and can be rolled back."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgepress.pipeline.bundle import Bundle, read_bundle, write_manifest
from edgepress.pipeline.deploy import deploy, rollback
from edgepress.pipeline.output import OutputError
from edgepress.pipeline.signing import SignatureError, sign
from edgepress.pipeline.signing_keys import new_key, read_private_key
from edgepress.targets.base import DeviceFailed, LinkBroken
from edgepress.targets.command_device import CommandDevice
from edgepress.targets.devices.base import open_device
from edgepress.targets.load import load_target
from tests.pipeline.conftest import World


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def bundle(world: World) -> Bundle:
    return read_bundle(world.request.output)


@pytest.fixture
def other(bundle: Bundle, tmp_path: Path) -> Bundle:
    """The same model again, as another build: only its manifest is another one."""
    folder = tmp_path / "other"
    shutil.copytree(bundle.folder, folder)
    (folder / "evidence.json").unlink(missing_ok=True)
    return write_manifest(folder, replace(bundle.manifest, toolchain={"gcc": "another"}))


def test_what_the_board_needs_arrives_unchanged(bundle: Bundle, tmp_path: Path) -> None:
    done = deploy(bundle, "local", destination=tmp_path / "there")
    stays = ("graph.onnx", "evidence.json")
    expected = {p: h for p, h in hashes(bundle.folder).items() if p not in stays}
    installed = hashes(tmp_path / "there")
    sums = (tmp_path / "there" / "SHA256SUMS").read_text().splitlines()
    assert installed.pop("SHA256SUMS")
    assert installed == expected
    assert sums == [f"{expected[path]}  {path}" for path in sorted(expected)]
    assert done.folder == str(tmp_path / "there")
    assert (done.device, done.previous) == ("local", None)
    assert done.golden_samples == bundle.manifest.golden["samples"]
    assert done.size_bytes == sum((bundle.folder / path).stat().st_size for path in expected)
    assert done.sent_bytes >= done.size_bytes
    assert names(tmp_path) == [".edgepress", "there"]
    assert names(tmp_path / ".edgepress") == [done.version]


def test_what_is_there_is_not_sent_again(bundle: Bundle, tmp_path: Path) -> None:
    first = deploy(bundle, "local", destination=tmp_path / "there")
    again = deploy(bundle, "local", destination=tmp_path / "there")
    assert (again.sent_bytes, again.version, again.previous) == (0, first.version, None)


def test_a_new_version_takes_the_place_of_the_old_one_and_back(
    bundle: Bundle, other: Bundle, tmp_path: Path
) -> None:
    place = tmp_path / "there"
    first = deploy(bundle, "local", destination=place)
    with (place / "weights.epw").open("rb") as opened:  # a program that runs meanwhile
        second = deploy(other, "local", destination=place)
        assert second.previous == first.version != second.version
        assert second.sent_bytes == len(other.manifest_bytes)
        assert opened.read() == (bundle.folder / "weights.epw").read_bytes()
    assert json.loads((place / "manifest.json").read_text())["toolchain"] == {"gcc": "another"}
    back = rollback(other, "local", destination=place)
    assert (back.version, back.previous) == (first.version, second.version)
    assert (back.sent_bytes, back.size_bytes) == (0, first.size_bytes)
    assert back.golden_samples == first.golden_samples
    assert (place / "manifest.json").read_bytes() == bundle.manifest_bytes
    assert rollback(other, "local", destination=place).version == second.version


def test_nothing_before_nothing_to_go_back_to(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(DeviceFailed, match="no version before"):
        rollback(bundle, "local", destination=tmp_path / "there")
    deploy(bundle, "local", destination=tmp_path / "there")
    with pytest.raises(DeviceFailed, match="no version before"):
        rollback(bundle, "local", destination=tmp_path / "there")
    assert (tmp_path / "there" / "model").is_file()


def test_what_is_not_ours_is_left_alone(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("not a bundle")
    (tmp_path / "file").write_text("not a bundle")
    (tmp_path / "link").symlink_to("mine")
    for name in ("mine", "file", "link"):
        with pytest.raises(OutputError, match="not a bundle"):
            deploy(bundle, "local", destination=tmp_path / name)
    with pytest.raises(OutputError, match="inside a bundle"):
        deploy(bundle, "local", destination=bundle.folder / "there")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "not a bundle"
    assert names(tmp_path) == ["file", "link", "mine"]


def test_a_failing_selftest_installs_nothing(
    bundle: Bundle, other: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "board" / "there"

    def fails(_device: Any, _folder: Path) -> dict[str, Any]:
        return {"passed": False}

    with monkeypatch.context() as patch:
        patch.setattr(CommandDevice, "selftest", fails)
        with pytest.raises(DeviceFailed, match="not installed"):
            deploy(bundle, "local", destination=place)
        assert not place.parent.exists()
    first = deploy(bundle, "local", destination=place)
    with monkeypatch.context() as patch:
        patch.setattr(CommandDevice, "selftest", fails)
        with pytest.raises(DeviceFailed, match="not installed"):
            deploy(other, "local", destination=place)
    assert (place / "manifest.json").read_bytes() == bundle.manifest_bytes
    assert names(place.parent / ".edgepress") == [first.version]


def test_a_selftest_that_the_link_cut_off_is_no_failing_one(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(_device: Any, _folder: Path) -> dict[str, Any]:
        raise LinkBroken("gone")

    with monkeypatch.context() as patch:
        patch.setattr(CommandDevice, "selftest", breaks)
        with pytest.raises(LinkBroken):
            deploy(bundle, "local", destination=tmp_path / "there")
    assert names(tmp_path) == [".edgepress"]
    assert deploy(bundle, "local", destination=tmp_path / "there").sent_bytes == 0


def test_a_cpu_that_lacks_a_feature_gets_the_executable_only(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = open_device("local", load_target("native")).info(bundle.folder)
    asked = []

    def lacks(_device: Any, folder: Path) -> dict[str, Any]:
        asked.append(names(folder))
        return info | {"features": {"asimd": True, "asimddp": False}, "supported": False}

    monkeypatch.setattr(CommandDevice, "info", lacks)
    with pytest.raises(DeviceFailed, match="lacks asimddp, which the bundle needs"):
        deploy(bundle, "local", destination=tmp_path / "there")
    assert asked == [["model"]]
    assert list(tmp_path.iterdir()) == []


def test_a_rollback_to_what_fails_changes_nothing(
    bundle: Bundle, other: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "there"
    first = deploy(bundle, "local", destination=place)
    deploy(other, "local", destination=place)
    monkeypatch.setattr(CommandDevice, "selftest", lambda _device, _folder: {"passed": False})
    with pytest.raises(DeviceFailed, match=f"{first.version} fails there, so nothing was changed"):
        rollback(other, "local", destination=place)
    assert (place / "manifest.json").read_bytes() == other.manifest_bytes


def test_nothing_is_sent_without_the_signature_that_is_required(
    bundle: Bundle, other: Bundle, tmp_path: Path
) -> None:
    place = tmp_path / "board" / "there"
    private = {name: tmp_path / f"{name}.pem" for name in ("mine", "another")}
    public = {name: new_key(path) for name, path in private.items()}
    for refused in (bundle, sign(other, read_private_key(private["another"]))):
        with pytest.raises(SignatureError):
            deploy(refused, "local", destination=place, trusted_keys=[public["mine"]])
        assert not place.parent.exists()
    signed = sign(other, read_private_key(private["mine"]))
    deploy(signed, "local", destination=place, trusted_keys=[public["mine"]])
    assert (place / "manifest.sig").read_bytes() == signed.signature


def test_a_byte_that_changed_after_reading_is_refused(
    bundle: Bundle, other: Bundle, tmp_path: Path
) -> None:
    place = tmp_path / "board" / "there"
    deploy(bundle, "local", destination=place)
    data = bytearray((other.folder / "model").read_bytes())
    data[-1] ^= 1
    (other.folder / "weights.epw").write_bytes(data)
    (other.folder / "manifest.json").write_bytes(other.manifest_bytes + b" ")
    with pytest.raises(DeviceFailed, match="is not what it was"):
        deploy(other, "local", destination=place)
    assert (place / "manifest.json").read_bytes() == bundle.manifest_bytes


def test_the_default_place_is_in_the_home_folder(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert deploy(bundle, None).folder == str(tmp_path / "edgepress" / bundle.manifest.name)


def test_devices_toml_names_another_place(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = tmp_path / "devices.toml"
    devices.write_text(f'here = {{ connect = "local", folder = "{tmp_path}/models" }}')
    monkeypatch.setenv("EDGEPRESS_DEVICES", str(devices))
    done = deploy(bundle, "here")
    assert (done.device, done.folder) == ("here", f"{tmp_path}/models/{bundle.manifest.name}")


def test_an_installation_of_an_older_edgepress_becomes_a_version(
    bundle: Bundle, other: Bundle, tmp_path: Path
) -> None:
    place = tmp_path / "there"
    stays = shutil.ignore_patterns("graph.onnx", "evidence.json")
    shutil.copytree(bundle.folder, place, ignore=stays)
    done = deploy(other, "local", destination=place)
    assert place.is_symlink()
    assert done.sent_bytes > len(other.manifest_bytes)
    back = rollback(other, "local", destination=place)
    assert back.version == done.previous
    assert (place / "manifest.json").read_bytes() == bundle.manifest_bytes
