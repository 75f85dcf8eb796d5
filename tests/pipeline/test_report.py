import dataclasses
import io
import re
from xml.etree import ElementTree

from rich.console import Console

from edgepress.pipeline import report
from edgepress.pipeline.driver import Equivalence, StepRecord
from edgepress.pipeline.html_report import html_report
from tests.pipeline.conftest import World


def printed(world: World, width: int = 160) -> str:
    screen = Console(width=width, file=io.StringIO(), record=True)
    report.show_result(world.result, screen)
    return screen.export_text()


def test_the_table_has_every_pass_and_its_figures(world: World) -> None:
    text = printed(world)
    for step in world.result.steps:
        assert step.pass_name in text
    (row,) = (line for line in text.splitlines() if "quantize-int8" in line)
    assert " dB" in row
    assert re.search(r"\d s ", row)


def test_notes_gates_and_sizes_are_printed(world: World) -> None:
    text = printed(world)
    assert "the batch was dynamic and is now 1" in text
    assert "size_bytes" in text
    assert "top-1" in text
    assert re.search(r"ms( \[.*\])? median|latency +refused: .* ms\)", text)
    assert re.search(r"for activations; all of the process at its peak [\d.]+ MB", text)


def coded(world: World) -> World:
    """The same with weights that claim to be coded."""
    bundle = world.result.bundle
    weights = [{**row, "codec": "coded"} for row in bundle.manifest.weights]
    manifest = dataclasses.replace(bundle.manifest, weights=weights)
    result = dataclasses.replace(
        world.result, bundle=dataclasses.replace(bundle, manifest=manifest)
    )
    return dataclasses.replace(world, result=result)


def test_the_ledger_is_printed_where_weights_are_coded(world: World) -> None:
    assert "all weights" not in printed(world)
    text = printed(coded(world))
    (row,) = (line for line in text.splitlines() if "all weights" in line)
    total = world.result.bundle.manifest.ledger["total"]
    assert f"{total['ratio']:.1f}×" in row
    assert f"{total['ratio']:.1f} times smaller than their float32" in text


def test_json_has_the_same_steps(world: World) -> None:
    data = report.result_json(world.result)
    assert [step["pass_name"] for step in data["steps"]] == [
        step.pass_name for step in world.result.steps
    ]
    assert data["deployed_bytes"] == world.result.bundle.deployed_bytes
    assert data["ledger"] == world.result.bundle.manifest.ledger


def test_words_for_steps() -> None:
    step = StepRecord(pass_name="p", options={}, modified=False)
    assert report.changes(step) == "nothing"
    assert report.comparison(step.equivalence) == "same"
    step = dataclasses.replace(step, modified=True, stats={"folded": 3}, skipped=[("a", "b")])
    assert report.changes(step) == "folded 3, skipped 1"
    assert report.comparison(Equivalence(metric="sqnr_db", value=32.14)) == "32.1 dB"


def test_quantities() -> None:
    words = [report.quantity(n) for n in (0, 999, 1000, 999_600, 390_000_000, 4e15)]
    assert words == ["0", "999", "1 k", "1 M", "390 M", "4e+03 T"]
    assert [report.size(n) for n in (12, 300_000)] == ["12 B", "300 kB"]


def test_the_page_is_whole_and_loads_nothing(world: World) -> None:
    assert world.result.evidence is not None
    page = html_report(world.result.bundle, world.result.evidence.to_json())
    assert "<script" not in page
    assert not re.search(r"(src|href)=", page)
    body = page.partition("<body>")[2].partition("</body>")[0]
    drawings = re.findall(r"<svg.*?</svg>", body, re.DOTALL)
    assert len(drawings) == 5
    for drawing in drawings:
        ElementTree.fromstring(drawing)


def test_the_page_of_an_old_bundle_has_no_ledger(world: World) -> None:
    bundle = world.result.bundle
    page = html_report(bundle, None)
    assert '<td class="">all weights</td>' in page
    assert "weights.epw, Conv_0: " in page
    old = dataclasses.replace(bundle.manifest, ledger={})
    page = html_report(dataclasses.replace(bundle, manifest=old), None)
    assert "stage by stage" not in page


def test_names_are_escaped_in_the_page(world: World) -> None:
    manifest = dataclasses.replace(
        world.result.bundle.manifest,
        name="<b>",
        recipe={"name": "x", "text": "</pre><script>alert(1)</script>"},
    )
    page = html_report(dataclasses.replace(world.result.bundle, manifest=manifest), None)
    assert "<script" not in page
    assert "<h1>&lt;b&gt;" in page
