"""The one JSON document that a command prints with `--json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any


def print_json(document: Mapping[str, Any]) -> None:
    """Print a document on stdout; what JSON does not know, such as a path, as its text."""
    json.dump(document, sys.stdout, indent=1, allow_nan=False, default=str)
    print()
