from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.targets.cuda.gemm import gemm, pack_weights
from edgepress.targets.cuda.gemm_shape import ELEMENTS, GemmShape
from edgepress.targets.cuda.gemm_tile import GemmLayer, GemmTile
from edgepress.targets.program import Array
from edgepress.targets.schedules.epilogue import Added, Clip, Epilogue, Requantise, Shift
from tests.cuda.emulation import emulate_kernel

PRODUCTS = ("float32", "tf32", "float16", "int8")
SMALL = GemmTile(32, 32, 64, (1, 2, 1), 3)


def conv_shape(
    size: tuple[int, int],
    channels: int,
    outputs: int,
    kernel: tuple[int, int] = (1, 1),
    *,
    batch: int = 1,
    strides: tuple[int, int] = (1, 1),
    dilations: tuple[int, int] = (1, 1),
    pads: tuple[int, int] = (0, 0),
    fill: int = 0,
) -> GemmShape:
    """A convolution whose border is as wide on the other sides."""
    out = [
        (n + 2 * pad - (taps - 1) * dilation - 1) // stride + 1
        for n, taps, stride, dilation, pad in zip(
            size, kernel, strides, dilations, pads, strict=True
        )
    ]
    return GemmShape(
        batch=batch,
        height=size[0],
        width=size[1],
        channels=channels,
        out_height=out[0],
        out_width=out[1],
        out_channels=outputs,
        kernel=kernel,
        strides=strides,
        dilations=dilations,
        pads=pads,
        fill=fill,
    )


def windows(x: Array, shape: GemmShape) -> Array:
    """The matrix of windows that no kernel makes: [rows, kh * kw * channels]."""
    top, left = shape.pads
    reach = [
        (out - 1) * stride + (taps - 1) * dilation + 1
        for out, stride, taps, dilation in zip(
            (shape.out_height, shape.out_width),
            shape.strides,
            shape.kernel,
            shape.dilations,
            strict=True,
        )
    ]
    below, right = reach[0] - top - shape.height, reach[1] - left - shape.width
    border = ((0, 0), (top, max(below, 0)), (left, max(right, 0)), (0, 0))
    padded = np.pad(x, border, constant_values=shape.fill)
    taps = [
        padded[
            :,
            y * shape.dilations[0] :: shape.strides[0],
            x0 * shape.dilations[1] :: shape.strides[1],
        ][:, : shape.out_height, : shape.out_width]
        for y in range(shape.kernel[0])
        for x0 in range(shape.kernel[1])
    ]
    return np.stack(taps, axis=3).reshape(shape.rows, -1)


def operands(shape: GemmShape, product: str, seed: int) -> tuple[Array, Array, Array]:
    """Pixels, weights [out, in, kh, kw] and bias."""
    rng = np.random.default_rng(seed)
    x_shape = (shape.batch, shape.height, shape.width, shape.channels)
    w_shape = (shape.out_channels, shape.channels, *shape.kernel)
    if product == "int8":
        return (
            rng.integers(-128, 128, x_shape).astype(np.int8),
            rng.integers(-128, 128, w_shape).astype(np.int8),
            rng.integers(-1000, 1000, shape.out_channels).astype(np.int32),
        )
    x, w = rng.standard_normal(x_shape), rng.standard_normal(w_shape)
    return (
        x.astype(ELEMENTS[product]),
        w.astype(np.float32),
        rng.standard_normal(shape.out_channels).astype(np.float32),
    )


def sums(shape: GemmShape, product: str, x: Array, weights: Array, bias: Array) -> Array:
    """Accumulators [rows, out], exact: int64 or float64 of the operands as they are stored."""
    kind = np.int64 if product == "int8" else np.float64
    stored = weights.astype(ELEMENTS[product]).astype(kind)
    matrix = stored.transpose(0, 2, 3, 1).reshape(shape.out_channels, -1)
    return np.asarray(windows(x, shape).astype(kind) @ matrix.T + bias)


def run(
    shape: GemmShape,
    product: str,
    tile: GemmTile,
    epilogue: Epilogue,
    stored: tuple[str, str],
    arguments: list[Array],
    order: str = "alternating",
) -> Array:
    kernel = gemm("product", shape, product, tile, epilogue, stored)
    extra = []
    if tile.split > 1:
        size = math.prod(kernel.grid) * tile.rows * tile.columns
        extra.append(np.zeros(size, np.int32 if product == "int8" else np.float32))
    y = np.zeros((shape.rows, shape.out_channels), stored[0])
    emulate_kernel(kernel, [*arguments, *extra, y], order=order)
    return y


# Of the norm of the sums of magnitudes; float32 by the worst single product (decision 31), and the
# last step of float16 is rounding to it.
LIMITS = {"float32": 2e-6, "tf32": 1e-3, "float16": 1e-3}


def check(
    shape: GemmShape, product: str, tile: GemmTile, seed: int = 0, order: str = "alternating"
) -> None:
    x, weights, bias = operands(shape, product, seed)
    packed = pack_weights(weights, shape, product)
    exact = sums(shape, product, x, weights, bias)
    if product == "int8":
        factors = np.random.default_rng(seed).uniform(1e-4, 1e-2, shape.out_channels)
        factors = factors.astype(np.float32)
        epilogue = Requantise("int8", 3, -100, 127)
        y = run(
            shape, product, tile, epilogue, ("int8", "float32"), [x, packed, bias, factors], order
        )
        scaled = exact.astype(np.int32).astype(np.float32) * factors
        wanted = np.rint(np.clip(scaled, np.float32(-103), np.float32(124))).astype(np.int32) + 3
        np.testing.assert_array_equal(y, wanted.astype(np.int8))
        return
    element = ELEMENTS[product]
    y = run(shape, product, tile, Clip(), (element, element), [x, packed, bias], order)
    scale = np.linalg.norm(sums(shape, product, abs(x), abs(weights), abs(bias)))
    error = np.linalg.norm(y.astype(np.float64) - exact) / scale
    assert error < LIMITS[product], error


SHAPES = {
    "product": conv_shape((1, 50), 72, 40),
    "3x3": conv_shape((7, 9), 16, 24, (3, 3), pads=(1, 1)),
    "strides": conv_shape((9, 8), 32, 8, (3, 3), strides=(2, 2), pads=(1, 1), batch=2),
    "dilations": conv_shape((11, 10), 16, 17, (3, 2), dilations=(2, 3), pads=(2, 0)),
    "four channels": conv_shape((12, 12), 4, 33, (5, 5), strides=(2, 2)),
    "one row": conv_shape((1, 1), 260, 100),
}
TILES = {
    "plain": SMALL,
    "wide slices": GemmTile(64, 64, 128, (2, 2, 1), 4),
    "warps along K": GemmTile(32, 32, 128, (1, 2, 4), 3),
    "split": GemmTile(32, 64, 64, (1, 4, 1), 2, 3),
    "all": GemmTile(16, 64, 128, (1, 2, 2), 2, 2),
    "one column": GemmTile(32, 32, 128, (2, 4, 1), 3),
}


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_geometry(product: str, shape: GemmShape) -> None:
    check(shape, product, SMALL)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize("order", ["alternating", "shuffled"])
def test_every_tile(product: str, tile: GemmTile, order: str) -> None:
    check(SHAPES["3x3"], product, tile, order=order)
    check(SHAPES["product"], product, tile, order=order)


@pytest.mark.parametrize("channels", [4, 8, 12, 16])
def test_a_border_of_a_zero_point(channels: int) -> None:
    check(conv_shape((5, 6), channels, 9, (3, 3), pads=(1, 1), fill=-7), "int8", SMALL)


def test_a_residual_of_floats_and_an_activation() -> None:
    shape = SHAPES["3x3"]
    x, weights, bias = operands(shape, "float16", 1)
    residual = np.random.default_rng(2).standard_normal((shape.rows, 24)).astype(np.float16)
    epilogue = Added(Clip(), Clip(0.0, 6.0))
    packed = pack_weights(weights, shape, "float16")
    y = run(shape, "float16", SMALL, epilogue, ("float16", "float16"), [x, packed, bias, residual])
    exact = sums(shape, "float16", x, weights, bias) + residual
    np.testing.assert_allclose(y, np.clip(exact, 0, 6), rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("split", [1, 2])
def test_a_residual_of_integers(split: int) -> None:
    shape = SHAPES["3x3"]
    x, weights, bias = operands(shape, "int8", 1)
    rng = np.random.default_rng(2)
    residual = rng.integers(-128, 128, (shape.rows, 24)).astype(np.int8)
    places = rng.integers(7, 10, 24).astype(np.int32)
    epilogue = Added(
        Shift("int8", 1, -128, 127), Shift("int8", -2, -128, 127), "int8", 5, (3, 2), 2.0
    )
    tile = dataclasses.replace(SMALL, split=split)
    arguments = [x, pack_weights(weights, shape, "int8"), bias, places, residual]
    y = run(shape, "int8", tile, epilogue, ("int8", "int8"), arguments)
    exact = sums(shape, "int8", x, weights, bias)
    own = np.clip(np.rint(exact / 2.0**places), -129, 126).astype(np.int64)
    total = own * 3 + (residual.astype(np.int64) - 5) * 2
    wanted = np.clip(np.rint(total / 4.0), -126, 129) - 2
    np.testing.assert_array_equal(y, wanted.astype(np.int8))


@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    channels=st.sampled_from([4, 8, 12, 20, 64]),
    outputs=st.integers(1, 70),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    product=st.sampled_from(PRODUCTS),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=12)
def test_any_shape_with_the_tile_that_it_gets(
    size: tuple[int, int],
    channels: int,
    outputs: int,
    kernel: tuple[int, int],
    strides: tuple[int, int],
    product: str,
    seed: int,
) -> None:
    size = (max(size[0], kernel[0]), max(size[1], kernel[1]))
    shape = conv_shape(
        size, channels, outputs, kernel, strides=strides, pads=(kernel[0] // 2, kernel[1] // 2)
    )
    layer = GemmLayer(shape, product, 16, 87)
    check(shape, product, layer.choose(), seed)


def test_the_model_cuts_a_small_product_into_many_blocks() -> None:
    shape = conv_shape((7, 7), 512, 512, (3, 3), pads=(1, 1))
    tile = GemmLayer(shape, "float16", 132, 90).choose()
    blocks = -(-49 // tile.rows) * -(-512 // tile.columns) * tile.split
    assert 66 <= blocks <= 264
    large = GemmLayer(dataclasses.replace(shape, batch=256), "float16", 132, 90).choose()
    assert large.rows * large.columns >= 64 * 64
    assert large.split == 1


def test_candidates_hold_the_choice_and_fit() -> None:
    layer = GemmLayer(SHAPES["3x3"], "int8", 8, 87)
    found = layer.candidates()
    assert layer.choose() in found
    assert all(tile.shared_bytes <= 163 * 1024 for tile in found)
    small = GemmLayer(SHAPES["product"], "float32", 46, 89)
    assert all(tile.shared_bytes <= 99 * 1024 for tile in small.candidates())
    assert all(GemmTile.of_sizes(tile.sizes) == tile for tile in found)
    assert layer.key == "conv int8 3x3 16 > 24, 7x9"


@pytest.mark.parametrize("product", PRODUCTS)
def test_every_small_product_has_a_tile(product: str) -> None:
    for rows in (1, 16, 40):
        for channels in (4, 16, 36):
            for outputs in (1, 8, 16, 33, 700):
                layer = GemmLayer(conv_shape((1, rows), channels, outputs), product, 8, 87)
                assert layer.choose() in layer.candidates()
