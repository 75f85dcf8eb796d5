"""Fixtures of the tests for GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cuda.bundles import Bundle
from tests.cuda.stub_driver import stub_driver, write_nvml
from tests.cuda.tiny import export_tiny_cuda, tiny_cuda_program


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Build a stand-in of the driver that runs the tiny program; the environment that finds it."""
    return stub_driver(tmp_path_factory.mktemp("stub") / "driver", tiny_cuda_program())


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny program's bundle; not to be damaged."""
    return export_tiny_cuda(tmp_path_factory.mktemp("tiny") / "bundle").folder


@pytest.fixture
def bundle(exported: Path, driver: dict[str, str], tmp_path: Path) -> Bundle:
    """The bundle, and a GPU that is at rest."""
    write_nvml(Path(driver["NVML_STUB"]).parent)
    return Bundle(exported, driver, tmp_path / "log")
