"""`edgepress verify` on many boards: exit codes, what is printed, and what stays in the bundle."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgepress.pipeline import verify
from edgepress.pipeline.bundle import read_bundle
from edgepress.pipeline.recipe import Budget
from edgepress.targets.base import Target
from edgepress.targets.devices.base import Device, open_device
from tests.pipeline.conftest import Edgepress, World

Verify = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bundle(world: World, tmp_path: Path) -> Path:
    """A bundle of its own: evidence is written into it."""
    shutil.copytree(world.request.output, tmp_path / "bundle")
    (tmp_path / "bundle/evidence.json").unlink()
    return tmp_path / "bundle"


@pytest.fixture
def call(
    edgepress: Edgepress,
    bundle: Path,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Verify:
    """Verify on boards of a devices.toml: `one` and `two` work, `none` has no emulator."""
    lines = ['one = { connect = "local" }', 'none = { connect = "qemu" }']
    (tmp_path / "devices.toml").write_text("\n".join([*lines, 'two = { connect = "local" }']))
    monkeypatch.setenv("EDGEPRESS_DEVICES", str(tmp_path / "devices.toml"))

    def call(*options: object) -> tuple[int, str, str]:
        samples = ("--eval", world.samples, "--model", world.model)
        return edgepress("verify", bundle, *samples, *options)

    return call


def test_boards_that_all_pass(call: Verify, bundle: Path, tmp_path: Path) -> None:
    code, out, err = call("-d", "two", "-d", "one", "--json", "--html", tmp_path / "page.html")
    document = json.loads(out)
    assert (code, document["passed"]) == (0, True)
    assert [entry["device"] for entry in document["fleet"]] == ["two", "one"]
    assert document["device"]["spec"] == "two"
    kept = read_bundle(bundle).evidence
    assert kept is not None
    assert [entry["error"] for entry in kept["fleet"]] == [None, None]
    assert re.search(r"(?m)^two: selftest: \d+\.\d s$", err)
    assert re.search(r"(?m)^one: pass \(\d+\.\d s\)$", err)
    assert "<summary>one</summary>" in (tmp_path / "page.html").read_text()


def test_a_board_that_fails_is_a_row_and_exit_code_5(call: Verify, bundle: Path) -> None:
    code, out, err = call("--all")
    assert code == 5
    assert "boards: 2 pass, 1 error" in out
    assert "has no emulator" in out
    assert re.search(r"(?m)^none: error: the target \S+ has no emulator", err)
    kept = read_bundle(bundle).evidence
    assert kept is not None
    assert kept["passed"] is False
    assert [entry["evidence"] is None for entry in kept["fleet"]] == [False, True, False]


def test_a_gate_that_fails_on_one_is_exit_code_6(
    call: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested = verify.verify

    def worse(expected: Any, device: Device, **options: Any) -> Any:
        if device.name == "two":
            options["budget"] = Budget(size_bytes=1)
        return tested(expected, device, **options)

    monkeypatch.setattr(verify, "verify", worse)
    code, out, _ = call("-d", "one", "-d", "two")
    assert code == 6
    assert "boards: 1 pass, 1 fail" in out
    assert "size_bytes" in out


def test_boards_that_all_fail_leave_no_evidence(call: Verify, bundle: Path) -> None:
    code, out, _ = call("-d", "none", "-d", "ssh:-x", "--json")
    document = json.loads(out)
    assert (code, document["passed"]) == (5, False)
    assert [entry["evidence"] for entry in document["fleet"]] == [None, None]
    assert read_bundle(bundle).evidence is None


def test_a_bug_on_one_board_hides_nothing_of_the_others(
    call: Verify, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(name: str, target: Target) -> Device:
        if name == "none":
            raise AssertionError("impossible")
        return open_device(name, target)

    monkeypatch.setattr(verify, "open_device", opened)
    code, out, err = call("--all")
    assert code == 1
    assert "boards: 2 pass, 1 error" in out
    assert "this is a bug in edgepress: AssertionError: impossible" in err
    assert "It happened with the board none." in err
    kept = read_bundle(bundle).evidence
    assert kept is not None
    assert kept["fleet"][1]["error"] == "impossible"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-d", "one", "-d", "one"), "one is given twice"),
        (("--all", "-d", "one"), "--all is for every board"),
    ],
)
def test_what_is_asked_twice_is_a_mistake(
    call: Verify, options: tuple[str, ...], words: str
) -> None:
    code, _, err = call(*options)
    assert code == 2
    assert words in err
