"""Which tile a layer gets: measured ones first, then the model's."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.targets import tiling
from edgepress.targets.isa.base import load_isa
from edgepress.targets.load import load_target, target_names
from edgepress.targets.lowering.build import lower
from edgepress.targets.schedules.conv import ConvShape, Tile, choose_tile, tile_costs
from edgepress.targets.tile_files import format_tiles, parse_tiles, shipped_tiles
from edgepress.targets.tiling import Layer, Tiles
from tests.graphs import net, random
from tests.targets.qdq import shaped

AVX512 = load_isa("avx512_vnni")
SHAPE = ConvShape(1, 30, 30, 64, 28, 28, 128, (3, 3))


def layer(kind: str = "conv", quantized: bool = True, **changes: object) -> Layer:
    fields: dict[str, object] = {
        "batch": 1, "height": 30, "width": 30, "channels": 64, "out_height": 28, "out_width": 28,
        "out_channels": 128, "kernel": (3, 3),
    }  # fmt: skip
    return Layer(kind, ConvShape(**{**fields, **changes}), AVX512, quantized)  # type: ignore[arg-type]


def test_a_key_reads_like_the_layer() -> None:
    assert layer().key == "conv int8 3x3 64 > 128, 28x28"
    odd = layer(batch=2, strides=(2, 1), dilations=(1, 3), groups=4, quantized=False)
    assert odd.key == (
        "conv float32 3x3 64 > 128, 28x28, batch 2, strides 2x1, dilations 1x3, groups 4"
    )
    wide = Layer("rows", SHAPE, AVX512.for_operands("int16"), True)
    assert wide.key == "rows int16 3x3 64 > 128, 28x28"


def test_a_1x1_convolution_has_the_key_of_the_product_that_it_is() -> None:
    image = ConvShape(2, 7, 7, 64, 7, 7, 128)
    product = ConvShape(1, 1, 98, 64, 1, 98, 128)
    keys = {Layer("conv", shape, AVX512, True).key for shape in (image, product)}
    assert keys == {"conv int8 1x1 64 > 128, 1x98"}


@pytest.mark.parametrize(
    "change",
    [
        {"quantized": False},
        {"kind": "rows"},
        {"channels": 60},
        {"out_channels": 127},
        {"out_height": 27},
        {"out_width": 27},
        {"batch": 2},
        {"kernel": (3, 1)},
        {"strides": (1, 2)},
        {"dilations": (2, 1)},
        {"groups": 2},
    ],
)
def test_whatever_decides_a_tile_is_in_the_key(change: dict[str, object]) -> None:
    assert layer(**change).key != layer().key  # type: ignore[arg-type]


def test_what_was_tuned_goes_before_what_ships_before_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = layer().key
    model = choose_tile(SHAPE, AVX512, True)
    monkeypatch.setattr(tiling, "shipped_tiles", lambda _isa: {})
    assert Tiles().choose("conv", SHAPE, AVX512, True) == model
    monkeypatch.setattr(
        tiling, "shipped_tiles", lambda isa: {key: (3, 2)} if isa == "avx512_vnni" else {}
    )
    assert Tiles().choose("conv", SHAPE, AVX512, True) == Tile(3, 2)
    assert Tiles().choose("rows", SHAPE, AVX512, True) == model
    assert Tiles({key: (5, 1)}).choose("conv", SHAPE, AVX512, True) == Tile(5, 1)


def test_who_asked_is_remembered_and_so_is_what_was_used() -> None:
    tiles = Tiles({layer().key: (5, 1), "another layer": (1, 1)})
    tiles.choose("conv", SHAPE, AVX512, True)
    tiles.choose("conv", ConvShape(1, 1, 9, 8, 1, 9, 16), AVX512, False)
    assert list(tiles.asked) == [layer().key, "conv float32 1x1 8 > 16, 1x9"]
    assert tiles.asked[layer().key] == layer()
    assert tiles.used() == {layer().key: (5, 1)}


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["avx2", "avx512", "avx512_vnni", "neon", "neon_dotprod", "neon_armv7"]),
    st.booleans(),
    st.integers(1, 70),
    st.integers(1, 200),
)
def test_candidates_fit_the_registers_and_hold_the_models_choice(
    isa_name: str, quantized: bool, width: int, channels: int
) -> None:
    isa = load_isa(isa_name)
    shape = ConvShape(1, width, width, 16, width, width, channels)
    found = Layer("conv", shape, isa, quantized).candidates()
    assert len(set(found)) == len(found) <= 8
    assert choose_tile(shape, isa, quantized) in found
    assert set(found) <= tile_costs(shape, isa, quantized).keys()


def test_a_file_is_read_as_it_was_written() -> None:
    tiles = {"b": (6, 4), "a": (14, 2)}
    text = format_tiles("avx2", "somewhere", tiles)
    assert parse_tiles(text, "avx2") == tiles
    assert text.splitlines()[3:6] == [' "tiles": {', '  "a": [14, 2],', '  "b": [6, 4]']
    assert parse_tiles(format_tiles("avx2", "", {}), "avx2") == {}


@pytest.mark.parametrize(
    "document",
    [
        [],
        {},
        {"isa": "avx2", "measured": "", "tiles": {}, "more": 1},
        {"isa": "avx512", "measured": "", "tiles": {}},
        {"isa": "avx2", "measured": "", "tiles": []},
        *(
            {"isa": "avx2", "measured": "", "tiles": {"a": tile}}
            for tile in ([1], [1, 2, 3], [0, 1], [1, -1], [1.0, 2], [True, 1], "12", None)
        ),
    ],
)
def test_a_damaged_file_is_refused(document: object) -> None:
    with pytest.raises(ValueError, match="tile"):
        parse_tiles(json.dumps(document), "avx2")


@pytest.mark.parametrize("isa", sorted({load_target(name).isa for name in target_names()}))
def test_what_ships_is_sorted_and_fits_the_registers(isa: str) -> None:
    tiles = shipped_tiles(isa)
    assert list(tiles) == sorted(tiles)
    for rows, columns in tiles.values():
        assert rows * columns + columns <= load_isa(isa).vector_registers


def test_a_tuned_tile_reaches_the_kernel_of_every_kind_of_layer() -> None:
    body = "a = Conv (x, w) b = Relu (a) c = Flatten (b) y = Gemm <transB=1> (c, v)"
    weights = {"w": random(20, 3, 3, 3), "v": random(40, 320)}
    model = shaped(net("(float[1,3,6,6] x) => (float y)", body, weights))
    target = load_target("x86-64-v3")
    plain = Tiles()
    before = lower(model, target, tiles=plain)
    assert len(plain.asked) == 2
    tuned = Tiles(dict.fromkeys(plain.asked, (2, 1)))
    after = lower(model, target, tiles=tuned)
    assert tuned.used() == tuned.tuned
    for kernel in before.kernels:
        if kernel.startswith(("conv", "gemm")):
            assert str(before.kernels[kernel]) != str(after.kernels[kernel])


def test_winograd_has_a_tile_of_outputs_too() -> None:
    weights = {"w": random(32, 32, 3, 3)}
    body = "y = Conv <pads=[1,1,1,1]> (x, w)"
    model = shaped(net("(float[1,32,28,28] x) => (float y)", body, weights))
    target, key = load_target("x86-64-v4"), "winograd float32 3x3 32 > 32, 28x28"
    kinds = {}
    for side in (1, 2, 4):
        tiles = Tiles({key: (side, side)})
        kernels = lower(model, target, tiles=tiles).kernels
        kinds[side] = [name.partition("_")[0] for name in kernels]
        assert tiles.answers[key] == Tile(side, side)
        assert tiles.asked[key].candidates() == [Tile(1, 1), Tile(2, 2), Tile(4, 4)]
    assert "winograd" in kinds[2]
    assert "winograd" in kinds[4]
    assert "conv" in kinds[1]
    assert "winograd" not in kinds[1]


def test_what_is_searched_for_the_files_does_not_see_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "shipped_tiles", lambda _isa: {layer().key: (3, 2)})
    model = choose_tile(SHAPE, AVX512, True)
    assert Tiles(shipped=False).choose("conv", SHAPE, AVX512, True) == model
