"""The table of mixed precision names what each step raised and lowered, and what it cost."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from edgepress.pipeline.precision_table import precision_table


def trial(
    int16: str = "", floats: str = "", *, chosen: bool = False, sqnr_db: float | None = 20.0
) -> dict[str, Any]:
    return {
        "int16": int16.split(),
        "float": floats.split(),
        "sqnr_db": sqnr_db,
        "drop": 0.5,
        "agreement": 99.0,
        "top1": None,
        "holds": chosen,
        "size_bytes": 2_000_000,
        "chosen": chosen,
    }


def written(trials: list[dict[str, Any]], costs: list[dict[str, Any]] | None) -> list[str]:
    text = io.StringIO()
    Console(width=140, file=text).print(precision_table(trials, costs))
    return [line for line in text.getvalue().splitlines() if line.startswith("│")]


def test_each_step_says_what_changed() -> None:
    trials = [trial(), trial("a b c d"), trial("a b", "c", chosen=True)]
    first, second, third = written(trials, None)
    assert "nothing" in first
    assert "+int16 a, b, c and 1 more" in second
    assert "−int16 c, d; +float c" in third
    assert "kept" in third
    assert "kept" not in first + second
    assert "20.0 dB" in first
    assert " – " in first, "no device measured a latency"
    assert "2 MB" in first


def test_latency_and_size_come_from_the_device() -> None:
    costs: list[dict[str, Any]] = [
        {"latency_ms": 1.2345, "deployed_bytes": 600_000, "detail": ""},
        {"latency_ms": None, "deployed_bytes": None, "detail": "not built"},
    ]
    first, second = written([trial(), trial("a", chosen=True, sqnr_db=None)], costs)
    assert "1.23 ms" in first
    assert "600 kB" in first
    assert "ms" not in second
    assert "2 MB" in second
