"""torch, for tests of passes that train. Tests import this first, and are skipped without torch.

EDGEPRESS_REQUIRE_TORCH makes a missing torch a failure.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest

_REQUIRED = bool(os.environ.get("EDGEPRESS_REQUIRE_TORCH"))
torch: Any = importlib.import_module("torch") if _REQUIRED else pytest.importorskip("torch")
torch.set_num_threads(1)
