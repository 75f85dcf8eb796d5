# ruff: noqa: ARG001, ARG002 - what stands in for others keeps the names of their arguments
"""The search for tiles, on a device that makes its figures up and once for real."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgepress.pipeline import tile_search, tuning
from edgepress.pipeline.cache import Cache
from edgepress.pipeline.progress import Progress
from edgepress.pipeline.tile_search import Found, Site, best_of, find_sites, tiles_to_try
from edgepress.pipeline.tuned_tiles import TunedTiles, known_tiles, tuned_tiles
from edgepress.pipeline.tuning import by_promise, tune
from edgepress.targets.base import DeviceFailed, Measurement, Target
from edgepress.targets.command_device import CommandDevice
from edgepress.targets.devices.base import open_device
from edgepress.targets.load import load_target
from edgepress.targets.schedules.conv import Tile
from tests.graphs import net, random
from tests.targets.qdq import shaped

NATIVE = load_target("native")
SILENT = Progress(shown=False)


def model() -> ir.Model:
    """Two equal layers of 16 channels, a wide one, and a product."""
    body = (
        "a = Conv <pads=[1,0,1,0]> (x, w) b = Conv <pads=[1,0,1,0]> (a, w) c = Conv (b, v) "
        "d = GlobalAveragePool (c) e = Flatten (d) y = Gemm <transB=1> (e, u)"
    )
    weights = {"w": random(16, 16, 3, 1), "v": random(96, 16, 1, 1), "u": random(10, 96)}
    return shaped(net("(float[1,16,12,12] x) => (float y)", body, weights))


@pytest.fixture(scope="module")
def sites() -> list[Site]:
    return find_sites(model(), NATIVE, {})


def test_equal_layers_are_one_site(sites: list[Site]) -> None:
    assert [(site.count, site.layer.key) for site in sites] == [
        (2, "conv float32 3x1 16 > 16, 12x12"),
        (1, "conv float32 1x1 16 > 96, 1x144"),
        (1, "conv float32 1x1 96 > 10, 1x1"),
    ]


def test_a_site_knows_the_tile_that_was_tuned(sites: list[Site]) -> None:
    key = sites[1].layer.key
    (site,) = [s for s in find_sites(model(), NATIVE, {key: (2, 1)}) if s.layer.key == key]
    assert site.tile == Tile(2, 1)
    assert tiles_to_try(site)[0] == Tile(2, 1)


@pytest.mark.parametrize(
    ("costs", "best"),
    [
        ([[2.0, 1.0, 3.0]], 1),
        ([[1.0, 1.0]], 0),
        ([[1.0, 0.99]], 0),  # not worth it
        ([[1.0, 0.97]], 1),
        ([[1.0, 0.9]] * 4 + [[1.0, 1.1]], 1),
        ([[1.0, 0.9]] * 3 + [[1.0, 1.1]] * 2, 0),  # not sure
        ([[5.0, 0.9]] + [[1.0, 1.1]] * 4, 0),
    ],
)
def test_another_tile_must_be_better_and_surely_so(costs: list[list[float]], best: int) -> None:
    assert best_of(np.array(costs)) == best


def test_layers_that_could_gain_most_come_first(sites: list[Site]) -> None:
    work = [site.layer.shape.macs for site in sites]
    costs = [work[0] / 100, work[1] / 50, work[2] / 100]  # the second is half as fast as the rest
    assert by_promise(sites, costs)[0] is sites[1]
    costs = [work[0] / 10, work[1] / 50, work[2] / 100]
    assert by_promise(sites, costs)[0] is sites[0]
    assert len(by_promise(sites, [0.0] * len(sites))) == len(sites)


def found(site: Site, factor: float) -> Found:
    tile = Tile(9, 9) if factor < 1 else site.tile
    return Found(site, tile, 8.0, 8.0 * factor)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Searches that find tiles twice as fast; returns the keys that were searched."""
    searched: list[str] = []

    def search(site: Site, target: Target, device: Any) -> Found:
        searched.append(site.layer.key)
        return found(site, 0.5 if len(searched) < 3 else 1.0)

    monkeypatch.setattr(tuning, "site_costs", lambda sites, *_: [1.0] * len(sites))
    monkeypatch.setattr(tuning, "search_site", search)
    return searched


def local() -> Any:
    return open_device("local", NATIVE)


def test_what_is_found_is_kept_for_the_next_build(tmp_path: Path, made_up: list[str]) -> None:
    cache = Cache(tmp_path)
    tuned = tuned_tiles(NATIVE, local(), cache)
    result = tune(model(), NATIVE, local(), tuned, minutes=5, progress=SILENT)
    assert (result.layers, result.searched, result.changed, result.unit) == (3, 3, 2, "ms")
    counts = {site.layer.key: site.count for site in find_sites(model(), NATIVE, {})}
    saved = 4.0 * sum(counts[key] for key in made_up[:2])
    assert result.before - result.after == saved
    assert known_tiles(NATIVE, None, cache) == dict.fromkeys(made_up[:2], (9, 9))
    assert str(result).startswith("2 of 3 layers got other tiles")


def test_time_is_up(made_up: list[str]) -> None:
    result = tune(model(), NATIVE, local(), TunedTiles("x", ""), minutes=0, progress=SILENT)
    assert (result.searched, result.changed, made_up) == (0, 0, [])


def test_an_interrupted_search_keeps_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def search(site: Site, target: Target, device: Any) -> Found:
        if known_tiles(NATIVE, None, Cache(tmp_path)):
            raise KeyboardInterrupt
        return found(site, 0.5)

    monkeypatch.setattr(tuning, "site_costs", lambda sites, *_: [1.0] * len(sites))
    monkeypatch.setattr(tuning, "search_site", search)
    tuned = tuned_tiles(NATIVE, local(), Cache(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        tune(model(), NATIVE, local(), tuned, minutes=5, progress=SILENT)
    assert len(known_tiles(NATIVE, None, Cache(tmp_path))) == 1


def test_tiles_of_another_machine_or_cpu_are_not_taken(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    tuned_tiles(NATIVE, local(), cache).add("a layer", (3, 2))
    assert known_tiles(NATIVE, "local", cache) == {"a layer": (3, 2)}
    for other in ({"cpu": "another"}, {"cores": NATIVE.cores + 1}, {"features": ("+x",)}):
        assert known_tiles(dataclasses.replace(NATIVE, **other), "local", cache) == {}
    assert known_tiles(NATIVE, "no such device", cache) == {}
    assert known_tiles(NATIVE, "local", None) == {}

    class Elsewhere(CommandDevice):
        @property
        def machine(self) -> str:
            return "elsewhere"

    assert tuned_tiles(NATIVE, Elsewhere("local"), cache).tiles == {}


def test_a_damaged_file_counts_as_none_and_is_written_anew(tmp_path: Path) -> None:
    tuned = tuned_tiles(NATIVE, local(), Cache(tmp_path))
    tuned.add("a layer", (3, 2))
    assert tuned.path is not None
    for text in ("", "{", "[]", '{"isa": 1}'):
        tuned.path.write_text(text)
        assert tuned_tiles(NATIVE, local(), Cache(tmp_path)).tiles == {}
    tuned.add("another", (1, 1))
    again = tuned_tiles(NATIVE, local(), Cache(tmp_path))
    assert again.tiles == {"a layer": (3, 2), "another": (1, 1)}


def test_two_processes_add_to_one_file(tmp_path: Path) -> None:
    one, two = (tuned_tiles(NATIVE, local(), Cache(tmp_path)) for _ in range(2))
    one.add("a", (1, 1))
    two.add("b", (2, 2))
    assert known_tiles(NATIVE, "local", Cache(tmp_path)) == {"a": (1, 1), "b": (2, 2)}


def test_without_a_cache_or_a_disk_nothing_is_kept(tmp_path: Path) -> None:
    tuned = tuned_tiles(NATIVE, local(), None)
    tuned.add("a", (1, 1))
    assert tuned.tiles == {"a": (1, 1)}
    (tmp_path / "tiles").write_text("a file in the way")
    tuned = tuned_tiles(NATIVE, local(), Cache(tmp_path))
    tuned.add("a", (1, 1))
    assert tuned.tiles == {"a": (1, 1)}


def test_candidates_are_compiled_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_search, "PROCESSES", 2)
    monkeypatch.setattr(tile_search, "SECONDS", 0.01)
    (site,) = [s for s in find_sites(model(), NATIVE, {}) if "16 > 96" in s.layer.key]
    result = tile_search.search_site(site, NATIVE, local())
    assert result.site is site
    assert 0 < result.after <= result.before
    assert result.tile in tiles_to_try(site)
    costs = tile_search.site_costs([site, site], NATIVE, local(), lambda *_: None)
    assert len(costs) == 2
    assert min(costs) > 0


def test_a_device_that_reports_other_calls_is_wrong(tmp_path: Path) -> None:
    class Short(CommandDevice):
        def profile(self, folder: Path, **_options: Any) -> list[float]:
            return [1.0]

        def bench(self, folder: Path, **_options: Any) -> Measurement:
            raise AssertionError

    bench = tile_search.SideBySide(tmp_path, (None, None, 0), 1, 1)
    with pytest.raises(DeviceFailed, match="should report 3 calls"):
        bench.visit(Short("short"))
