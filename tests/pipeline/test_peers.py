"""The peers that ship: what their files may import, what they say is missing."""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from pathlib import Path

import click
import pytest

import edgepress.pipeline.peers
from edgepress.pipeline.cli import bench
from edgepress.pipeline.peer_process import WORKER, find_peer, peer_names
from edgepress.pipeline.peers import base
from edgepress.pipeline.peers.base import CannotRun, find_tool, run_tool
from edgepress.pipeline.prepare import UsageError

FOLDER = Path(edgepress.pipeline.peers.__file__).parent


def test_the_command_line_knows_all_peers() -> None:
    (against,) = (option for option in bench.params if option.name == "against")
    assert isinstance(against.type, click.Choice)
    assert list(against.type.choices) == peer_names()
    assert peer_names() == ["litert", "ncnn", "onnxruntime", "openvino"]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_files_of_peers_need_no_edgepress(path: Path) -> None:
    """Another Python runs them, which has neither edgepress nor what it depends on."""
    modules = set[str]()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module or "")
    allowed = {"edgepress.pipeline.peers.base", "numpy", "numpy.typing"}
    assert {m for m in modules - allowed if m.split(".")[0] not in sys.stdlib_module_names} == (
        set()
    )


def test_onnxruntime_is_always_here() -> None:
    found = find_peer("onnxruntime")
    assert found.python == sys.executable
    assert found.precisions == ["fp32", "int8 static", "int8 dynamic"]
    assert set(found.versions) == {"onnxruntime"}


def test_what_is_missing_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, package in (("openvino", "nncf"), ("ncnn", "pnnx"), ("litert", "ai-edge-litert")):
        peer = __import__(f"edgepress.pipeline.peers.{name}", fromlist=["PEER"]).PEER
        monkeypatch.setattr(importlib.util, "find_spec", lambda _module: None)
        missing = peer.available()
        assert package in missing
        assert f"edgepress[{name}]" in missing
        assert "--peer-python" in missing
    # installed, but its converter is not
    monkeypatch.setattr(importlib.util, "find_spec", lambda _module: object())
    monkeypatch.setenv("EDGEPRESS_ONNX2TF", str(tmp_path / "nothing"))
    assert "EDGEPRESS_ONNX2TF" in peer.available()


def test_every_extra_is_in_the_project_file() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8")
    for name in set(peer_names()) - {"onnxruntime"}:
        assert f"\n{name} = [" in text


def test_tools_are_found_by_name_variable_and_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "bin" / "sometool"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho one\necho this is an Error\necho done\nexit 3\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", os.environ["PATH"])
    assert find_tool("sometool") is None
    with pytest.raises(CannotRun, match="sometool is missing"):
        run_tool("sometool", folder=tmp_path)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    assert find_tool("sometool") == str(tool)
    other = tmp_path / "other"
    other.write_text("#!/bin/sh\nsleep 60\n")
    other.chmod(0o755)
    monkeypatch.setenv("EDGEPRESS_SOMETOOL", str(other))
    assert find_tool("sometool") == str(other)
    monkeypatch.setattr(base, "CONVERSION_S", 0.2)
    with pytest.raises(CannotRun, match="does not finish"):
        run_tool("sometool", folder=tmp_path)
    monkeypatch.delenv("EDGEPRESS_SOMETOOL")
    with pytest.raises(CannotRun, match="sometool fails: this is an Error"):
        run_tool("sometool", folder=tmp_path)


def test_an_interpreter_that_is_none_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be started"):
        find_peer("openvino", str(tmp_path / "python"))
    assert WORKER.is_file()
