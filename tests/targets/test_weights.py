import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.targets.program import DTYPES, Array
from edgepress.targets.weights import (
    MAGIC,
    Rule,
    WeightsError,
    header_checksum,
    read_weights,
    write_weights,
)
from tests.targets.test_sections import BROKEN_SECTIONS, section


def example(path: Path) -> bytes:
    """Two tensors of different bytes and one that shares a payload."""
    write_weights(
        path,
        {
            "w": np.array([[1.5, -2.0]], np.float32),
            "a": np.array([1, 0, 1], np.bool_),
            "b": np.array([1, 0, 1], np.int8),
        },
    )
    return path.read_bytes()


def test_golden_bytes(tmp_path: Path) -> None:
    path = tmp_path / "weights.epw"
    table = write_weights(path, {"b": np.array(-2, np.int16), "a": np.array([1, 2], np.uint8)})
    header = bytes.fromhex(
        "894550570d0a1a0a"  # magic
        "01000000"  # version 1
        "02000000"  # 2 tensors
        "9000000000000000"  # header: 40 + (40 + 8 + 8) + (40 + 0 + 8) = 144 bytes
        "0201000000000000"  # file: 192 + 64 + 2 = 258 bytes
    )
    rest = bytes.fromhex(
        "00000000"
        # a: uint8 [2], codec 0, at 192, 2 bytes
        "01000101 00000000 c000000000000000 0200000000000000 0200000000000000"
        "92 42 cc b6 00000000  0200000000000000 6100000000000000"
        # b: int16 [], codec 0, at 256, 2 bytes
        "01000300 00000000 0001000000000000 0200000000000000 0200000000000000"
        "41 31 e4 e6 00000000  6200000000000000"
    )
    data = path.read_bytes()
    assert data[:32] == header
    assert data[36:144] == rest
    assert data[144:] == bytes(48) + b"\x01\x02" + bytes(62) + b"\xfe\xff"
    assert data[32:36] == struct.pack("<I", zlib.crc32(header + bytes(4) + rest))
    assert [(row["name"], row["offset"]) for row in table] == [("a", 192), ("b", 256)]
    assert header_checksum(path) == struct.unpack("<I", data[32:36])[0]


def test_equal_bytes_are_stored_once(tmp_path: Path) -> None:
    data = example(tmp_path / "weights.epw")
    weights = read_weights(tmp_path / "weights.epw")
    assert {name: (str(a.dtype), a.tolist()) for name, a in weights.items()} == {
        "a": ("bool", [True, False, True]),
        "b": ("int8", [1, 0, 1]),
        "w": ("float32", [[1.5, -2.0]]),
    }
    assert data.count(b"\1\0\1") == 1
    assert len(data) == 320 + 8


def coded_example(path: Path) -> bytes:
    """A tensor of each coding, and one that shares a payload."""
    random = np.random.default_rng(0)
    codebook = random.normal(size=8).astype(np.float32)
    sparse = np.zeros(3000, np.int8)
    sparse[random.integers(0, 3000, 40)] = 7
    constants: dict[str, Array] = {
        "huffman": np.round(random.normal(size=300)).astype(np.int8),
        "planes": random.normal(size=(5, 30)).astype(np.float32),
        "raw": np.arange(-4, 5, dtype=np.int16),
        "same": sparse.view(np.uint8),
        "shared": random.choice(codebook, (20, 20)),
        "sparse": sparse,
    }
    rows = write_weights(path, constants, coded=True)
    codings = ["huffman", "planes", "raw", "sparse", "huffman", "sparse"]
    assert [row["coding"] for row in rows] == codings
    return path.read_bytes()


def test_golden_bytes_of_a_coded_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.epw"
    constants: dict[str, Array] = {
        "a": np.full((2, 20), 7, np.uint8),
        "b": np.array(-2, np.int16),
    }
    table = write_weights(path, constants, coded=True)
    header = bytes.fromhex(
        "894550570d0a1a0a"  # magic
        "01000000"  # version 1
        "02000000"  # 2 tensors
        "9800000000000000"  # header: 40 + (40 + 16 + 8) + (40 + 0 + 8) = 152 bytes
        "c200000000000000"  # file: 152 + 15 + 25 + 2 = 194 bytes
    )
    payload = bytes.fromhex(
        "01 01 0000 28000000 03000000"  # huffman, words of 1 byte, 40 words, body of 3 bytes
        "00 01 07"  # last symbol 0, length 1, dictionary; no stream for one symbol
    )
    checksum = struct.pack("<I", zlib.crc32(payload))
    rest = (
        bytes.fromhex(
            "00000000"
            # a: uint8 [2, 20], codec 1, at 152, 15 bytes for 40
            "01000102 01000000 9800000000000000 0f00000000000000 2800000000000000"
        )
        + checksum
        + bytes.fromhex(
            "00000000  0200000000000000 1400000000000000 6100000000000000"
            # b: int16 [], codec 0, at 192, 2 bytes
            "01000300 00000000 c000000000000000 0200000000000000 0200000000000000"
            "41 31 e4 e6 00000000  6200000000000000"
        )
    )
    data = path.read_bytes()
    assert data[:32] == header
    assert data[36:152] == rest
    assert data[152:] == payload + bytes(25) + b"\xfe\xff"
    assert data[32:36] == struct.pack("<I", zlib.crc32(header + bytes(4) + rest))
    columns = ("name", "codec", "coding", "word_bytes", "sections", "encoded_bytes", "offset")
    assert [tuple(row[column] for column in columns) for row in table] == [
        ("a", "coded", "huffman", 1, 1, 15, 152),
        ("b", "raw", "raw", 2, 0, 2, 192),
    ]
    assert [row["entropy_bytes"] for row in table] == [1, 2]  # the dictionary; stored raw
    np.testing.assert_array_equal(read_weights(path)["a"], constants["a"])


def test_coded_equal_bytes_are_stored_once(tmp_path: Path) -> None:
    data = coded_example(tmp_path / "weights.epw")
    weights = read_weights(tmp_path / "weights.epw")
    np.testing.assert_array_equal(weights["same"], weights["sparse"].view(np.uint8))
    write_weights(tmp_path / "raw.epw", weights)
    assert len(data) < (tmp_path / "raw.epw").stat().st_size
    again = write_weights(tmp_path / "again.epw", weights, coded=True)
    assert (tmp_path / "again.epw").read_bytes() == data
    same, sparse = (row for row in again if row["name"] in ("same", "sparse"))
    assert {**same, "name": "sparse", "dtype": "int8"} == sparse


@st.composite
def tensors(draw: st.DrawFn) -> Array:
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=8)))
    seed = draw(st.integers(0, 3))
    return (
        np.random.default_rng(seed)
        .integers(0, 2 if dtype.kind == "b" else 100, shape)
        .astype(dtype)
    )


NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=9)


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(NAMES, tensors(), max_size=6), st.booleans())
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, constants: dict[str, Array], coded: bool
) -> None:
    path = tmp_path_factory.mktemp("weights") / "weights.epw"
    table = write_weights(path, constants, coded=coded)
    back = read_weights(path)
    assert list(back) == [row["name"] for row in table] == sorted(constants, key=str.encode)
    for row in table:
        array = constants[row["name"]]
        assert (row["dtype"], row["shape"]) == (str(array.dtype), list(array.shape))
        assert back[row["name"]].dtype == array.dtype
        np.testing.assert_array_equal(back[row["name"]], array)
        data = path.read_bytes()[row["offset"] : row["offset"] + row["encoded_bytes"]]
        assert row["raw_bytes"] == array.nbytes
        if row["codec"] == "raw":
            assert data == array.tobytes()
            assert row["offset"] % 64 == 0
        else:
            assert coded
            assert 0 < len(data) < array.nbytes


def test_the_file_does_not_depend_on_the_order_or_layout(tmp_path: Path) -> None:
    a, b = np.arange(6.0, dtype=np.float32).reshape(2, 3), np.arange(3)
    write_weights(tmp_path / "1", {"a": a, "b": b})
    write_weights(tmp_path / "2", {"b": b, "a": np.asfortranarray(a)})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.parametrize(
    "constants",
    [
        {"": np.zeros(1, np.int8)},
        {"x" * 65536: np.zeros(1, np.int8)},
        {"a": np.zeros(1, np.float16)},
        {"a": np.zeros([1] * 9, np.int8)},
    ],
)
def test_what_the_format_cannot_hold_is_refused(
    tmp_path: Path, constants: dict[str, Array]
) -> None:
    with pytest.raises(ValueError, match="constant"):
        write_weights(tmp_path / "weights.epw", constants)
    assert not (tmp_path / "weights.epw").exists()


def refused(path: Path, data: bytes) -> Rule | None:
    path.write_bytes(data)
    try:
        read_weights(path)
    except WeightsError as error:
        return error.rule if error.rule.value in str(error) else None
    return None


def signed(data: bytes) -> bytes:
    """Give a changed file the checksum that its header should have."""
    (header_bytes,) = struct.unpack_from("<Q", data, 16)
    header = data[:32] + bytes(4) + data[36:header_bytes]
    return data[:32] + struct.pack("<I", zlib.crc32(header)) + data[36:]


def resealed(data: bytes) -> bytes:
    """Give a changed file all the checksums that it should have; its table must be valid."""
    changed = bytearray(data)
    at = 40
    for _ in range(*struct.unpack_from("<I", data, 12)):
        name_bytes, rank = struct.unpack_from("<HxB", data, at)
        offset, encoded_bytes = struct.unpack_from("<QQ", data, at + 8)
        checksum = zlib.crc32(data[offset : offset + encoded_bytes])
        struct.pack_into("<I", changed, at + 32, checksum)
        at += 40 + 8 * rank + -(-name_bytes // 8) * 8
    return signed(bytes(changed))


def coded_file(payload: bytes, raw_bytes: int) -> bytes:
    """A file of one tensor, uint8 `[raw_bytes]`, whose payload says that it is coded."""
    fixed = struct.pack("<HBBIQQQII", 1, 1, 1, 1, 96, len(payload), raw_bytes, 0, 0)
    table = fixed + struct.pack("<Q8s", raw_bytes, b"t")
    header = struct.pack("<8sIIQQII", MAGIC, 1, 1, 96, 96 + len(payload), 0, 0)
    return resealed(header + table + payload)


# 1000 zeros in 15 bytes, so that a coded payload is smaller than its tensor.
ZEROS = section(1, 1, 1000, b"\0\1\0")


def broken_section(payload: bytes, raw_bytes: int) -> Callable[[bytes], bytes]:
    return lambda _: coded_file(ZEROS + payload, 1000 + raw_bytes)


def recoded(codec: int, encoded_bytes: int) -> Callable[[bytes], bytes]:
    """The example with another codec and encoded size of `a`."""
    return lambda data: put(A + 16, struct.pack("<Q", encoded_bytes))(
        put(A + 4, bytes([codec]))(data)
    )


def put(at: int, new: bytes) -> Callable[[bytes], bytes]:
    return lambda data: signed(data[:at] + new + data[at + len(new) :])


# Where the entries of the example begin. They end at 216; a and b have their payload at 256.
A, B, W = 40, 96, 152
BROKEN: list[tuple[str, Rule, Callable[[bytes], bytes]]] = [
    ("empty", Rule.MAGIC, lambda _: b""),
    ("other file", Rule.MAGIC, lambda _: b"\x7fELF" + bytes(60)),
    ("text mode", Rule.MAGIC, lambda data: data.replace(b"\r\n", b"\n")),
    ("cut header", Rule.TRUNCATED, lambda data: data[:39]),
    ("cut magic", Rule.TRUNCATED, lambda _: MAGIC[:5]),
    ("cut payload", Rule.TRUNCATED, lambda data: data[:-1]),
    ("longer", Rule.TRAILING, lambda data: data + b"\0"),
    ("version 0", Rule.VERSION, put(8, b"\0")),
    ("version 2", Rule.VERSION, put(8, b"\2")),
    ("short header", Rule.HEADER_SIZE, put(16, struct.pack("<Q", 39))),
    ("header over the end", Rule.HEADER_SIZE, put(16, struct.pack("<Q", 1 << 63))),
    ("more tensors", Rule.HEADER_SIZE, put(12, b"\4")),
    ("fewer tensors", Rule.HEADER_SIZE, put(12, b"\2")),
    ("2^32 - 1 tensors", Rule.HEADER_SIZE, put(12, b"\xff\xff\xff\xff")),
    ("unsigned", Rule.HEADER_CHECKSUM, lambda data: data[:33] + b"\0" + data[34:]),
    ("reserved in header", Rule.RESERVED, put(36, b"\1")),
    ("reserved in entry", Rule.RESERVED, put(A + 36, b"\1")),
    ("padded name", Rule.RESERVED, put(A + 49, b"\1")),
    ("padding", Rule.RESERVED, put(220, b"\1")),
    ("no name", Rule.NAME, put(A, b"\0\0")),
    ("same name", Rule.NAME, put(B + 48, b"a")),
    ("no UTF-8", Rule.NAME, put(W + 56, b"\xff")),
    ("names descend", Rule.NAME, put(W + 56, b"A")),
    ("dtype", Rule.DTYPE, put(A + 2, b"\7")),
    ("nine axes", Rule.SHAPE, put(A + 3, b"\x09")),
    ("2^63 elements", Rule.SHAPE, put(A + 40, struct.pack("<Q", 1 << 63))),
    ("product overflows", Rule.SHAPE, put(W + 40, struct.pack("<QQ", 1 << 32, 1 << 32))),
    ("another shape", Rule.RAW_SIZE, put(A + 40, b"\4")),
    ("another dtype", Rule.RAW_SIZE, put(W + 2, b"\5")),
    ("codec", Rule.CODEC, put(A + 4, b"\2")),
    ("codec 2^32 - 1", Rule.CODEC, put(A + 4, b"\xff\xff\xff\xff")),
    ("encoded size", Rule.ENCODED_SIZE, put(A + 16, b"\2")),
    ("coded as large as raw", Rule.ENCODED_SIZE, recoded(1, 3)),
    ("coded larger than raw", Rule.ENCODED_SIZE, recoded(1, 4)),
    ("coded to nothing", Rule.ENCODED_SIZE, recoded(1, 0)),
    ("coded and aligned", Rule.OFFSET, recoded(1, 2)),
    ("offset", Rule.OFFSET, put(A + 8, b"\x40")),
    ("offset over the end", Rule.OFFSET, put(W + 8, struct.pack("<Q", (1 << 64) - 64))),
    ("overlap", Rule.OFFSET, put(B + 32, b"\0")),
    ("payload", Rule.CHECKSUM, lambda data: data[:-1] + b"\1"),
    ("stated checksum", Rule.CHECKSUM, put(W + 32, b"\0")),
]
# The same for files that have nothing to do with the example.
BROKEN_CODED: list[tuple[str, Rule, Callable[[bytes], bytes]]] = [
    (f"section: {name}", rule, broken_section(payload, raw_bytes))
    for name, rule, payload, raw_bytes in BROKEN_SECTIONS
]


@pytest.mark.parametrize(
    ("rule", "corrupt"),
    [broken[1:] for broken in BROKEN + BROKEN_CODED],
    ids=[broken[0] for broken in BROKEN + BROKEN_CODED],
)
def test_every_broken_rule_is_named(
    tmp_path: Path, rule: Rule, corrupt: Callable[[bytes], bytes]
) -> None:
    assert refused(tmp_path / "bad.epw", corrupt(example(tmp_path / "good.epw"))) is rule


def test_every_rule_has_a_file_that_breaks_it() -> None:
    assert {rule for _, rule, _ in BROKEN + BROKEN_CODED} == set(Rule)


def test_no_flipped_or_missing_byte_passes(tmp_path: Path) -> None:
    data = example(tmp_path / "good.epw")
    for at in range(len(data)):
        assert refused(tmp_path / "cut.epw", data[:at]), at
        for bit in (1, 128):
            flipped = data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
            assert refused(tmp_path / "flipped.epw", flipped), at


def test_no_flipped_or_missing_byte_of_a_coded_file_passes(tmp_path: Path) -> None:
    data = coded_example(tmp_path / "good.epw")
    random = np.random.default_rng(0)
    for at in random.integers(0, len(data), 150).tolist():
        assert refused(tmp_path / "cut.epw", data[:at]), at
        flipped = data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]
        assert refused(tmp_path / "flipped.epw", flipped), at


def test_changed_payloads_with_right_checksums_never_do_anything_else(tmp_path: Path) -> None:
    """What the checksums cannot tell is refused by name, or decoded to as many bytes."""
    data = coded_example(tmp_path / "good.epw")
    header_bytes = struct.unpack_from("<Q", data, 16)[0]
    random = np.random.default_rng(0)
    rules: set[Rule | None] = set()
    for _ in range(700):
        changed = bytearray(data)
        for at in random.integers(header_bytes, len(data), random.integers(1, 4)):
            changed[at] ^= 1 << int(random.integers(0, 8))
        rules.add(refused(tmp_path / "bad.epw", resealed(bytes(changed))))
    assert {Rule.CODE, Rule.STREAM, Rule.GAPS, Rule.WORDS, Rule.SECTION_SIZE} < rules
