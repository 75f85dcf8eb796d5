"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.loopback import Lab, boards


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """One board that ssh reaches, and the environment in which edgepress finds it."""
    with boards(1) as made:
        for name, value in made.environment.items():
            monkeypatch.setenv(name, value)
        yield made
