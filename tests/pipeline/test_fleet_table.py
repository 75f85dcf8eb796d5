"""A row per board: what it measured, and what went wrong there."""

from __future__ import annotations

import io
import re
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from edgepress.pipeline import report
from edgepress.pipeline.evidence import Evidence, fleet_evidence
from edgepress.pipeline.fleet import Outcome
from edgepress.pipeline.fleet_table import HEADINGS, board_cells, fleet_summary
from edgepress.pipeline.gates import judge
from edgepress.pipeline.html_report import html_report
from edgepress.targets.base import DeviceFailed
from tests.pipeline.test_evidence import evidence, latency

ACCURACY = {"samples": 8, "top1": 97.25, "agreement": 99.0, "sqnr_db": 30.0}


def entry(found: Evidence | None = None, error: str | None = None) -> dict[str, Any]:
    data = None if found is None else found.to_json()
    return {"device": "pi4-lab", "error": error, "evidence": data}


def row(found: Evidence | None = None, error: str | None = None) -> dict[str, str]:
    return dict(zip(HEADINGS, board_cells(entry(found, error)), strict=True))


def fleet() -> list[Outcome[Evidence]]:
    curve = [{"at_s": 60.0 * i, "p50_ms": 2.0 + i, "p90_ms": 3.0 + i} for i in range(1, 5)]
    return [
        Outcome(device="pi4-lab", value=evidence(latency=latency(windows_ms=[1.0] * 10))),
        Outcome(device="jetson-3", error=DeviceFailed("no route to\nhost [bold]")),
        Outcome(device="pi5", value=evidence(1.0, latency=latency(sustained=curve))),
        Outcome(device="<b>", value=evidence(latency=None)),
    ]


def test_a_board_that_passed() -> None:
    device = {"spec": "pi", "peak_memory_bytes": 12_300_000}
    assert row(evidence(device=device, accuracy=ACCURACY)) == {
        "board": "pi4-lab",
        "verdict": "pass",
        "median latency": "2 ms [1–3]",
        "peak memory": "12.3 MB",
        "temperature": "61 °C",
        "accuracy": "top-1 97.25 %",
        "what": "",
    }


def test_what_was_not_measured_is_a_dash() -> None:
    cells = row(evidence(latency=latency(conditions={"hottest_celsius": None})))
    assert [cells[h] for h in ("peak memory", "temperature", "accuracy")] == ["–"] * 3
    assert row(evidence(latency=None))["median latency"] == "–"
    warm = {"hottest_celsius": "warm"}
    assert row(evidence(latency=latency(conditions=warm)))["temperature"] == "–"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top1": None}, "99 % as fp32"),
        ({"top1": None, "agreement": None}, "30 dB"),
        ({"top1": None, "agreement": None, "sqnr_db": None}, "–"),
    ],
)
def test_accuracy_is_told_as_it_is_known(changes: dict[str, Any], words: str) -> None:
    assert row(evidence(accuracy=ACCURACY | changes))["accuracy"] == words


def test_a_gate_that_failed_says_why() -> None:
    verdicts = [judge("golden", 0.0, 0.0, ""), judge("latency_ms", 12.3456, 10.0, "median of 9")]
    cells = row(evidence(verdicts=verdicts))
    assert cells["verdict"] == "fail"
    assert cells["what"] == "latency_ms 12.35, limit 10: median of 9"


def test_refused_figures_say_why_once() -> None:
    refused = latency(p50_ms=None, p90_ms=None, p99_ms=None, refused=["throttled", "drifting"])
    cells = row(evidence(latency=refused))
    assert (cells["median latency"], cells["verdict"]) == ("refused", "pass")
    assert cells["what"] == "latency refused: throttled (and 1 more)"
    wanted = row(evidence(latency=latency(refused=["throttled"])))
    assert (wanted["median latency"], wanted["what"]) == (
        "2 ms [1–3]",
        "latency not defended: throttled",
    )
    verdicts = [judge("latency_ms", None, 10.0, "no figure: throttled; drifting")]
    cells = row(evidence(latency=refused, verdicts=verdicts))
    assert cells["verdict"] == "unverified"
    assert cells["what"] == "latency_ms, limit 10: no figure: throttled; drifting"


def test_an_error_is_one_line() -> None:
    cells = row(error="pi4-lab: broken\n\x1b[2Jpipe")
    assert (cells["verdict"], cells["what"]) == ("error", "broken ?[2Jpipe")


def test_boards_are_counted() -> None:
    entries = fleet_evidence(fleet())["fleet"]
    assert fleet_summary(entries) == "2 pass, 1 fail, 1 error"


def shown(data: dict[str, Any], bundle: Any) -> str:
    screen = Console(width=160, file=io.StringIO(), record=True)
    report.show_bundle(bundle, data, screen)
    return screen.export_text()


def test_the_terminal_shows_every_board(world: Any) -> None:
    text = shown(fleet_evidence(fleet()), world.result.bundle)
    assert "boards: 2 pass, 1 fail, 1 error" in text
    assert "no route to host [bold]" in text
    assert "on 4 boards: 2 pass" in text
    for name in ("pi4-lab", "jetson-3", "pi5", "<b>"):
        assert name in text


def test_columns_that_say_nothing_are_left_out(world: Any) -> None:
    text = shown(fleet_evidence(fleet()), world.result.bundle)
    assert "temperature" in text
    assert "peak memory" not in text
    text = shown(fleet_evidence([fleet()[3]] * 2), world.result.bundle)
    assert not any(heading in text for heading in HEADINGS[2:6])


def test_a_fleet_that_did_not_answer_is_shown_too(world: Any) -> None:
    data = fleet_evidence([fleet()[1]])
    assert "boards: 1 error" in shown(data, world.result.bundle)
    page = html_report(world.result.bundle, data)
    assert "no route to host [bold]" in page


def test_the_page_has_every_board_with_its_pictures(world: Any) -> None:
    page = html_report(world.result.bundle, fleet_evidence(fleet()))
    assert "<h2>Boards</h2>" in page
    assert page.count("<details>") == 3
    assert "<summary>&lt;b&gt;</summary>" in page
    assert page.count("Medians of consecutive tenths") == 1
    assert page.count("<h2>Sustained") == 2
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(drawing)
