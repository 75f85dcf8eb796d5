import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.targets._word_index import index_words
from edgepress.targets.program import DTYPES, Array
from edgepress.targets.sections import read_sections
from edgepress.targets.weight_coding import Coded, encode
from tests.targets.payload_oracle import decode_payload


def coded(array: Array) -> Coded:
    """Encode, and check all that must hold for every tensor."""
    raw = array.tobytes()
    result = encode(raw, array.itemsize)
    if result.codec == "raw":
        assert (result.payload, result.coding, result.sections) == (raw, "raw", 0)
        assert result.entropy_bytes == len(raw)
    else:
        assert 0 < len(result.payload) < len(raw)
        assert read_sections(result.payload, len(raw)) == raw
        assert result.entropy_bytes <= len(result.payload)
        assert result.sections >= 1
    return result


def entropy_bytes(symbols: Array) -> float:
    """The zero-order Shannon bound."""
    _, counts = np.unique(symbols, return_counts=True, axis=0)
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


Make = Callable[[np.random.Generator, int], Array]
DISTRIBUTIONS: dict[str, Make] = {
    "one symbol": lambda random, size: np.full(size, random.integers(-100, 100)),
    "two symbols": lambda random, size: random.choice([-3, 100], size),
    "uniform": lambda random, size: random.integers(-(2**62), 2**62, size),
    "geometric": lambda random, size: random.geometric(0.4, size) - 3,
    "sparse": lambda random, size: random.geometric(0.4, size) * (random.random(size) < 0.05),
    "shared": lambda random, size: random.integers(-(2**62), 2**62, 16)[
        random.integers(0, 16, size)
    ],
    "vectors": lambda random, size: random.integers(-(2**62), 2**62, (8, 4))[
        random.integers(0, 8, size // 4)
    ],
    "blocks": lambda random, size: np.concatenate(
        [random.integers(-(2**62), 2**62, 4)[random.integers(0, 4, size // 3)] for _ in range(3)]
    ),
}


def cast(values: Array, dtype: str) -> Array:
    """The lowest bytes of integers as another dtype; bools are 0 or 1."""
    wide = np.ascontiguousarray(values, np.int64)
    if dtype == "bool":
        return np.equal(wide % 2, 1)
    lowest = wide.view(np.uint8).reshape(*wide.shape, 8)[..., : np.dtype(dtype).itemsize]
    return np.ascontiguousarray(lowest).view(dtype)[..., 0]


@settings(deadline=None, max_examples=120)
@given(
    st.sampled_from(sorted(DISTRIBUTIONS)),
    st.sampled_from(DTYPES),
    st.integers(0, 3000),
    st.integers(0, 2**32 - 1),
)
def test_every_tensor_comes_back_bit_for_bit(
    distribution: str, dtype: str, size: int, seed: int
) -> None:
    values = DISTRIBUTIONS[distribution](np.random.default_rng(seed), size)
    result = coded(cast(values, dtype))
    if result.codec == "coded":
        assert decode_payload(result.payload) == cast(values, dtype).tobytes()


def test_all_bits_of_floats_come_back() -> None:
    """Signed zeros, infinities, NaNs with payloads and subnormal numbers, mostly zeros."""
    bits = np.zeros(4000, np.uint32)
    bits[::37] = np.resize(
        np.array([1 << 31, 0x7F800000, 0xFF800000, 0x7FC00001, 0xFFFFFFFF, 1, 0x80000001]), 109
    )
    assert coded(bits.view(np.float32)).coding == "sparse"


@pytest.mark.parametrize("size", [0, 1, 2, 3, 11, 12, 13, 15, 16, 17])
def test_tiny_tensors(size: int) -> None:
    """A section has a header of 12 bytes, and one symbol an alphabet of 3."""
    result = coded(np.zeros(size, np.int8))
    assert len(result.payload) == min(size, 15)


def test_int8_takes_one_code_of_its_bytes() -> None:
    random = np.random.default_rng(0)
    weights = np.clip(np.round(random.normal(size=200_000) * 20), -127, 127).astype(np.int8)
    result = coded(weights)
    assert (result.coding, result.word_bytes, result.sections) == ("huffman", 1, 1)
    assert result.entropy_bytes == pytest.approx(entropy_bytes(weights))
    assert len(result.payload) <= 1.01 * result.entropy_bytes


def test_noise_stays_raw() -> None:
    random = np.random.default_rng(0)
    for dtype in ("int8", "int32", "int64"):
        weights = np.frombuffer(random.bytes(80_000), dtype)
        assert coded(weights).codec == "raw"


@pytest.mark.parametrize("dtype", ["int16", "int32", "int64", "float32"])
def test_shared_weights_are_words(dtype: str) -> None:
    random = np.random.default_rng(0)
    codebook = np.frombuffer(random.bytes(32 * np.dtype(dtype).itemsize), dtype)
    weights = codebook[np.minimum(random.geometric(0.2, 30_000), 32) - 1]
    result = coded(weights)
    item = np.dtype(dtype).itemsize
    assert (result.coding, result.word_bytes, result.sections) == ("huffman", item, 1)
    assert result.entropy_bytes == pytest.approx(entropy_bytes(weights) + 32 * item)
    assert len(result.payload) <= 1.02 * result.entropy_bytes


@pytest.mark.parametrize("elements", [2, 4, 8, 16])
@pytest.mark.parametrize("rest", [0, 1])
def test_shared_vectors_are_words(elements: int, rest: int) -> None:
    random = np.random.default_rng(0)
    codebook = random.normal(size=(256, elements)).astype(np.float32)
    weights = codebook[random.integers(0, 256, 20_000)].ravel()
    weights = np.append(weights, weights[:rest])
    result = coded(weights)
    assert (result.word_bytes, result.sections) == (4 * elements, 1 + rest)
    assert result.coding == ("huffman+raw" if rest else "huffman")
    assert len(result.payload) < 20_000 + 256 * 4 * elements + 300


def test_pruned_shared_weights_are_sparse() -> None:
    random = np.random.default_rng(0)
    weights = random.normal(size=15).astype(np.float32)[random.integers(0, 15, 100_000)]
    weights[random.random(100_000) < 0.92] = 0
    result = coded(weights)
    assert (result.coding, result.word_bytes, result.sections) == ("sparse", 4, 1)
    nonzero = np.flatnonzero(weights)
    gaps = np.diff(nonzero, prepend=-1) - 1  # none is longer than 254
    bound = entropy_bytes(gaps) + entropy_bytes(weights[nonzero]) + 4 * 15
    assert result.entropy_bytes == pytest.approx(bound)
    assert len(result.payload) <= 1.02 * bound


def test_pruned_unshared_weights_are_sparse_bytes() -> None:
    random = np.random.default_rng(0)
    weights = random.normal(size=50_000).astype(np.float32)
    weights[random.random(50_000) < 0.9] = 0
    result = coded(weights)
    assert (result.coding, result.word_bytes) == ("sparse", 1)
    assert len(result.payload) < 0.13 * weights.nbytes


def test_floats_are_planes() -> None:
    weights = np.random.default_rng(0).normal(size=50_000).astype(np.float32) / 8
    result = coded(weights)
    assert (result.coding, result.word_bytes, result.sections) == ("planes", 4, 1)
    planes = weights.view(np.uint8).reshape(-1, 4)
    assert result.entropy_bytes <= sum(entropy_bytes(planes[:, byte]) for byte in range(4)) * 1.002
    assert len(result.payload) < 0.85 * weights.nbytes


def test_groups_of_channels_have_codebooks_of_their_own() -> None:
    """The cuts are found where they are, however many groups there are and however long."""
    random = np.random.default_rng(0)
    for groups, size in ((3, 2_000), (20, 3_777), (64, 2_000)):
        codebooks = random.normal(size=(groups, 16)).astype(np.float32)
        weights = np.concatenate([random.choice(codebook, size) for codebook in codebooks])
        result = coded(weights)
        assert (result.coding, result.word_bytes) == ("huffman", 4)
        assert result.sections == groups
        assert len(result.payload) < groups * (size / 2 + 4 * 16) * 1.06


def test_blocks_of_int8_have_codes_of_their_own() -> None:
    random = np.random.default_rng(0)
    parts = [
        np.round(random.normal(size=size) * scale).clip(-127, 127).astype(np.int8)
        for size, scale in ((30_000, 3), (50_001, 40), (20_003, 10))
    ]
    result = coded(np.concatenate(parts))
    assert result.sections == 3
    assert len(result.payload) <= 1.012 * sum(entropy_bytes(part) for part in parts)


def test_a_run_of_noise_stays_raw_within_codes() -> None:
    random = np.random.default_rng(0)
    quiet = np.round(random.normal(size=(2, 30_000)) * 3).astype(np.int8)
    noise = np.frombuffer(random.bytes(30_000), np.int8)
    result = coded(np.concatenate([quiet[0], noise, quiet[1]]))
    assert (result.coding, result.sections) == ("huffman+raw", 3)


def test_the_result_depends_on_the_bytes_only() -> None:
    weights = np.round(np.random.default_rng(0).normal(size=5_000) * 9).astype(np.int8)
    assert coded(weights) == coded(weights.view(np.uint8)) == coded(weights.copy())


def many(size: int) -> dict[str, Array]:
    random = np.random.default_rng(0)
    geometric = np.resize((random.geometric(0.3, 999_983) - 1).clip(0, 99), size).astype(np.uint8)
    keep = np.resize(random.random(999_979) < 0.03, size)
    return {
        "one symbol": np.full(size, 77, np.int8),
        "two symbols": geometric > 1,
        "uniform": np.resize(np.frombuffer(random.bytes(999_999), np.int8), size),
        "geometric": geometric,
        "sparse": geometric * keep,
        "shared": random.normal(size=100).astype(np.float32)[geometric],
    }


@pytest.mark.parametrize("distribution", many(1))
def test_ten_million_elements(distribution: str) -> None:
    weights = many(10_000_000)[distribution]
    assert weights.shape == (10_000_000,)
    result = encode(weights.tobytes(), weights.itemsize)
    assert result.coding == {"uniform": "raw", "sparse": "sparse"}.get(distribution, "huffman")
    if result.codec == "coded":
        decoded = read_sections(result.payload, weights.nbytes)
        assert zlib.crc32(decoded) == zlib.crc32(weights.tobytes())


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64])
def test_distinct_words_are_numbered_in_their_order(dtype: type[np.unsignedinteger[Any]]) -> None:
    """Rare words, which no sample has, and words that want the same slot are found as well."""
    random = np.random.default_rng(0)
    most = np.iinfo(dtype).max
    distinct = np.unique(random.integers(0, most, 2_000, dtype, endpoint=True))
    keys = np.append(random.choice(distinct[:100], 200_000), distinct)
    wanted, numbers = np.unique(keys, return_inverse=True)
    indexed = index_words(keys)
    assert indexed
    np.testing.assert_array_equal(indexed[0], numbers)
    np.testing.assert_array_equal(indexed[1], wanted)
    assert index_words(keys, distinct.size) is not None
    assert index_words(keys, distinct.size - 1) is None  # only later rounds tell
    assert index_words(distinct, distinct.size - 1) is None
    assert index_words(distinct[:100], 99) is None
