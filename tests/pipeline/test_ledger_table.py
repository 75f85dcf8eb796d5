"""The size ledger as a table and as a picture."""

from __future__ import annotations

import io
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from edgepress.pipeline.ledger_table import (
    FEW_LAYERS,
    HEADINGS,
    cells,
    ledger_picture,
    ledger_table,
    shortened,
)
from edgepress.pipeline.size_ledger import SUMS

Entry = dict[str, Any]


def entry(name: str, weights: int, coded: int) -> Entry:
    figures = (weights, weights // 2, 4 * weights, 3 * weights, 2 * weights, coded, 56, coded - 1)
    ratio = round(4 * weights / (coded + 56), 2) if weights else None
    return {"name": name, "operator": "Conv", **dict(zip(SUMS, figures, strict=True)),
            "ratio": ratio}  # fmt: skip


def ledger(layers: int) -> Entry:
    """Layers of which every second is large."""
    entries = [entry(f"c{i}", 1000, 100 + i + 10_000 * (i % 2)) for i in range(layers)]
    entries.append(entry("other", 0, 24))
    total: Entry = {key: sum(e[key] for e in entries) for key in SUMS}
    real = total["coded_bytes"] + total["container_bytes"]
    return {"layers": entries, "total": {**total, "ratio": round(total["fp32_bytes"] / real, 2)}}


def printed(found: Entry, most: int | None = None) -> list[list[str]]:
    screen = Console(width=120, file=io.StringIO(), record=True)
    screen.print(ledger_table(found, most))
    lines = [line for line in screen.export_text().splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_a_row_has_every_figure() -> None:
    assert cells(entry("conv", 1000, 500)) == [
        "conv", "1 k", "50 %", "4 kB", "3 kB", "2 kB", "500 B", "56 B", "499 B", "4.00", "7.2×",
    ]  # fmt: skip
    assert len(HEADINGS) == len(cells(entry("conv", 1000, 500)))
    assert cells(entry("other", 0, 24))[1:3] == ["–", "–"]
    assert cells(entry("other", 0, 24))[-2:] == ["–", "–"]


def test_the_table_ends_with_the_total() -> None:
    rows = printed(ledger(3))
    assert [row[0] for row in rows] == ["c0", "c1", "c2", "other", "all weights"]
    assert rows[-1][1] == "3 k"


def test_names_that_look_like_markup_stay() -> None:
    found = ledger(1)
    found["layers"][0]["name"] = "[red]/conv"
    assert printed(found)[0][0] == "[red]/conv"


def test_of_many_layers_the_largest_are_shown() -> None:
    found = ledger(30)
    rows = printed(found, FEW_LAYERS)
    largest = [f"c{i}" for i in range(11, 30, 2)]
    assert len(largest) == FEW_LAYERS
    assert [row[0] for row in rows] == [*largest, "20 smaller layers", "other", "all weights"]
    for key in SUMS:
        assert sum(e[key] for e in shortened(found["layers"], FEW_LAYERS)) == found["total"][key]
    (rest,) = (e for e in shortened(found["layers"], FEW_LAYERS) if "smaller" in e["name"])
    assert rest["ratio"] == 4 * rest["weights"] / (rest["coded_bytes"] + rest["container_bytes"])


@pytest.mark.parametrize("layers", [FEW_LAYERS, FEW_LAYERS + 1])
def test_no_row_stands_for_a_single_layer(layers: int) -> None:
    found = ledger(layers)["layers"]
    assert shortened(found, FEW_LAYERS) == found
    assert shortened(found, None) == found


@pytest.mark.parametrize("layers", [1, 3, 40])
def test_the_picture_has_a_bar_per_stage(layers: int) -> None:
    found = ledger(layers)
    found["layers"][0]["name"] = "<&>"
    picture = ElementTree.fromstring(ledger_picture(found))
    widths: dict[str, float] = {}
    fills: dict[str, str] = {}
    for mark in picture.iter("rect"):
        title = mark[0].text or ""
        stage = title.partition(",")[0]
        start = widths.get(stage, 0.0)
        assert float(mark.attrib["x"]) == pytest.approx(90 + start, abs=0.2)
        name = title.partition(", ")[2].partition(":")[0]
        assert fills.setdefault(name, mark.attrib["fill"]) == mark.attrib["fill"]
        widths[stage] = start + float(mark.attrib["width"])
    total = found["total"]
    real = total["coded_bytes"] + total["container_bytes"]
    sizes = {"fp32": total["fp32_bytes"], "pruned": total["pruned_bytes"],
             "shared": total["shared_bytes"], "weights.epw": real}  # fmt: skip
    assert list(widths) == list(sizes)
    for stage, size in sizes.items():
        want = 420 * size / max(sizes.values())
        assert widths[stage] == pytest.approx(want, abs=0.5)
    labels = [text.text for text in picture.iter("text")][2 * len(sizes) :]
    keys = [mark.attrib["fill"] for mark in picture.iter("circle")]
    assert dict(zip(labels, keys, strict=True)).items() >= fills.items()
    assert len(set(fills.values())) == min(layers + 1, 7) + 1


def test_an_empty_ledger_is_drawn() -> None:
    figures = {**dict.fromkeys(SUMS, 0), "ratio": None}
    found = {"layers": [{"name": "other", "operator": "", **figures}], "total": figures}
    assert "<rect" not in ledger_picture(found)
    assert printed(found)[-1][0] == "all weights"
