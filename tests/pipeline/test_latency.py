"""Which figures of a measurement are given, and what a limit makes of them."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.pipeline.latency import MOST_WAITED_SHARE, gated_latency, latency_figures
from edgepress.pipeline.latency_picture import sustained_picture, windows_picture
from edgepress.pipeline.latency_words import latency_facts, median
from edgepress.targets.base import Measurement

LOAD = "other load: a thread waited for a core 40 % of the time"
RUNTIME = Path(__file__).parents[2] / "targets/runtime"
times = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=50)


def figures(anyway: bool = False, **changes: Any) -> dict[str, Any]:
    measured: dict[str, Any] = {
        "samples_ms": tuple(float(i) for i in range(100, 0, -1)),
        "threads": 1,
        "intervals_ms": {"p50": (40.0, 61.0), "p90": (84.0, 95.0), "p99": (95.0, None)},
        "windows_ms": tuple(95.5 - 10 * i for i in range(10)),
    }
    found = latency_figures(Measurement(**measured | changes), anyway=anyway)
    assert found is not None
    return found


def point(at_s: float, p50_ms: float, **more: Any) -> dict[str, Any]:
    return {"at_s": at_s, "p50_ms": p50_ms, "p90_ms": p50_ms + 1, "throttled": None, **more}


def test_percentiles_are_those_of_all_samples() -> None:
    found = figures()
    assert found["samples_ms"] == [float(i) for i in range(100, 0, -1)]
    cuts = [found[key] for key in ("min_ms", "p50_ms", "p90_ms", "p99_ms")]
    assert cuts == pytest.approx([1, 50.5, 90.1, 99.01])
    assert found["intervals_ms"]["p99"] == [95.0, None]


def test_no_times_are_no_figures() -> None:
    assert latency_figures(Measurement(samples_ms=(), threads=1)) is None


def test_refused_figures_are_null_and_the_samples_stay() -> None:
    found = figures(refused=(LOAD,))
    keys = ("p50_ms", "p90_ms", "p99_ms")
    assert [found[key] for key in keys] == [None] * 3
    assert found["intervals_ms"] == {"p50": None, "p90": None, "p99": None}
    assert (found["min_ms"], len(found["samples_ms"]), found["refused"]) == (1.0, 100, [LOAD])
    wanted = figures(refused=(LOAD,), anyway=True)
    assert wanted["p50_ms"] == 50.5
    assert wanted["intervals_ms"]["p50"] == [40.0, 61.0]
    assert wanted["refused"] == [LOAD]


def test_figures_that_stand_are_held_by_their_median() -> None:
    assert gated_latency(figures(), 51, "pi") == (50.5, "median of 100 runs on pi")
    assert gated_latency(figures(), 1, "pi")[0] == 50.5, "above the limit, and said so"
    assert gated_latency(figures(), None, "pi")[0] == 50.5


@pytest.mark.parametrize("anyway", [False, True])
def test_a_disturbed_measurement_passes_by_its_slowest_window_or_not_at_all(anyway: bool) -> None:
    found = figures(refused=(LOAD, "drifting"), anyway=anyway)
    assert gated_latency(found, 95.5, "pi") == (95.5, "even the slowest tenth of 100 runs on pi")
    value, detail = gated_latency(found, 95.4, "pi")
    assert value is None
    assert detail == f"no figure that can be defended: {LOAD}; drifting"


def test_few_disturbed_runs_pass_by_the_slowest_of_them() -> None:
    found = figures(samples_ms=(1.0, 9.0, 2.0), windows_ms=(), refused=(LOAD,))
    assert gated_latency(found, 9, "pi")[0] == 9.0
    assert gated_latency(found, 8.9, "pi")[0] is None


@given(samples=times, limit=st.floats(1e-3, 1e3), disturbed=st.booleans())
@settings(deadline=None, max_examples=60)
def test_no_limit_is_held_that_the_median_does_not_hold(
    samples: list[float], limit: float, disturbed: bool
) -> None:
    refused = (LOAD,) if disturbed else ()
    found = figures(samples_ms=tuple(samples), windows_ms=(), refused=refused)
    value, _ = gated_latency(found, limit, "pi")
    holds = value is not None and value <= limit
    assert not holds or np.median(np.round(samples, 6)) <= limit
    assert value is not None or disturbed


def test_a_sustained_measurement_is_held_by_its_last_quarter() -> None:
    curve = [point(60 * (i + 1), ms) for i, ms in enumerate((30, 3, 3, 3, 9, 9, 4, 5))]
    found = figures(sustained=curve, refused=(LOAD,))
    value, detail = gated_latency(found, 5, "pi")
    assert (value, detail) == (5, "slowest window in the last quarter of 8 min on pi")
    assert gated_latency(found, 4.9, "pi")[0] == 5, "throttling is what the board does"
    assert gated_latency(figures(sustained=curve[:1]), 30, "pi")[0] == 30


def test_a_window_that_waited_for_others_is_not_held_against_the_board() -> None:
    late = [point(10, 4, waited_share=0.01), point(20, 9, waited_share=MOST_WAITED_SHARE + 0.01)]
    found = figures(sustained=[point(1, 1)] * 6 + late)
    assert gated_latency(found, 9, "pi")[0] == 9
    value, detail = gated_latency(found, 5, "pi")
    assert value is None
    assert "other programs" in detail
    assert gated_latency(found, 3, "pi")[0] == 4, "the other window fails on its own"


def test_the_share_is_that_of_the_runtime() -> None:
    text = (RUNTIME / "judgement.c").read_text(encoding="utf-8")
    found = re.search(r"MOST_WAITED = ([\d.]+);", text)
    assert found is not None
    assert float(found[1]) == MOST_WAITED_SHARE


def test_an_emulator_holds_no_limit() -> None:
    value, detail = gated_latency(None, 1e9, "qemu")
    assert value is None
    assert "emulator" in detail


def test_words_for_figures() -> None:
    assert median(figures()) == "50.5 ms [40–61]"
    assert median(figures(refused=(LOAD,))) == "refused"
    assert latency_facts(figures()) == [
        (
            "latency",
            "50.5 ms [40–61] median (min 1, p90 90.1 [84–95], p99 99 [95–]; 100 runs, 1 thread)",
        )
    ]
    none: dict[str, None] = {"p50": None, "p90": None, "p99": None}
    (row,) = latency_facts(figures(intervals_ms=none, threads=4))
    assert row[1] == "50.5 ms median (min 1, p90 90.1, p99 99; 100 runs, 4 threads)"


def test_words_for_refused_figures() -> None:
    (row,) = latency_facts(figures(refused=(LOAD, "drifting")))
    assert row[1] == f"refused: {LOAD}; drifting (fastest of 100 runs, 1 thread: 1 ms)"
    (row,) = latency_facts(figures(refused=(LOAD,), anyway=True))
    assert row[1].startswith("50.5 ms")
    assert row[1].endswith(f"not defended: {LOAD}")


def test_words_for_the_curve() -> None:
    curve = [point(60, 3), point(120, 6, throttled=True), point(180, 5, throttled=True)]
    rows = dict(latency_facts(figures(sustained=curve)))
    assert rows["sustained"] == (
        "3 ms median at first, 5 ms after 3 min, slowest 6 ms after 2 min; throttled after 2 min"
    )
    rows = dict(latency_facts(figures(sustained=[point(6, 3, throttled=False)])))
    assert "throttled" not in rows["sustained"]


def test_words_for_mlperf() -> None:
    rule: dict[str, Any] = {"queries": 70000, "duration_s": 600.2, "refused": []}
    rows = dict(latency_facts(figures(mlperf=rule | {"early_stopping_p90_ms": 8.51})))
    assert rows["MLPerf"] == "single-stream: 8.51 ms at 90 % (70000 queries in 600 s)"
    rule["early_stopping_p90_ms"] = None
    rows = dict(latency_facts(figures(mlperf=rule)))
    assert rows["MLPerf"] == "single-stream: refused: too few queries (70000 queries in 600 s)"
    rows = dict(latency_facts(figures(mlperf=rule | {"refused": [LOAD]})))
    assert f"refused: {LOAD} (" in rows["MLPerf"]


def drawn(picture: str, tag: str) -> list[ElementTree.Element]:
    return ElementTree.fromstring(picture).findall(tag)


def test_windows_are_drawn_from_zero() -> None:
    picture = windows_picture(figures(windows_ms=(2.0, 4.0, 1.0)))
    (line,) = drawn(picture, "polyline")
    heights = [float(pair.split(",")[1]) for pair in line.attrib["points"].split()]
    top, bottom = heights[1], heights[1] + 2 * (heights[0] - heights[1])
    assert heights[1] < heights[0] < heights[2], "the y axis of a picture points down"
    assert heights[2] == pytest.approx(top + 0.75 * (bottom - top))
    assert len(drawn(picture, "circle")) == 3
    assert "4 ms" in [text.text for text in drawn(picture, "text")]
    assert windows_picture(figures(windows_ms=())) == ""


def test_the_curve_is_drawn_with_its_tail_and_throttling() -> None:
    curve = [point(60, 3), point(120, 6, throttled=True), point(180, 5, p90_ms=None)]
    picture = sustained_picture(figures(sustained=curve))
    tail, middle = drawn(picture, "polyline")
    assert [len(line.attrib["points"].split()) for line in (tail, middle)] == [2, 3]
    (dot,) = drawn(picture, "circle")
    assert f"{dot.attrib['cx']},{dot.attrib['cy']}" in middle.attrib["points"]
    assert "7 ms" in [text.text for text in drawn(picture, "text")], "the p90 of the second"
    assert sustained_picture(figures()) == ""


def test_a_single_point_and_zero_can_be_drawn() -> None:
    picture = sustained_picture(figures(sustained=[point(0, 0, p90_ms=0)]))
    for line in drawn(picture, "polyline"):
        numbers = [float(n) for n in re.split("[ ,]", line.attrib["points"])]
        assert all(map(math.isfinite, numbers))
