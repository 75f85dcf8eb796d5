import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.targets.huffman import BLOCK, Bytes, good_lengths
from edgepress.targets.sections import (
    Alphabet,
    gaps_between,
    huffman_section,
    planes_section,
    raw_section,
    read_sections,
    sparse_section,
)
from edgepress.targets.weight_rules import BrokenRule, Rule
from tests.targets.payload_oracle import decode_payload


def bytes_of(values: bytes | list[int]) -> Bytes:
    return np.array(list(values), np.uint8)


RAW = bytes.fromhex(
    "00 01 0000 03000000 03000000"  # raw, words of 1 byte, reserved, 3 words, body of 3 bytes
    "0a 0b 0c"
)
HUFFMAN = bytes.fromhex(
    "01 02 0000 08000000 14000000"  # huffman, words of 2 bytes, reserved, 8 words, 20 bytes
    "02 05"  # last symbol 2, lengths 1 2 2 as 10, 10, 0: codes 0, 10, 11
    "0a00 0b00 0c00"  # dictionary
    "0100 0100 0100 0100"  # sizes of the parts
    "06 01 02 00"  # symbols 0 and 2: 0 11, 1 and 0: 10 0, 0 and 1: 0 10, 0 and 0: 0 0
)
SPARSE = bytes.fromhex(
    "02 01 0000 0c000000 28000000"  # sparse, words of 1 byte, reserved, 12 words, 40 bytes
    "04000000 04000000"  # nonzeros, gaps
    "05 17 0e 2e"  # gaps 0 to 5, lengths 2 2 2 0 0 2 as 1110100, 0, 0, 1110000, 0, 1110100
    "01 01 07 09"  # last symbol 1, lengths 1 1 as 10, 0; dictionary
    "0100 0100 0100 0100 02 00 01 03"  # gaps 1 0 2 5: codes 01, 00, 10, 11
    "0100 0100 0100 0100 00 01 00 00"  # 7 9 7 7: 0, 1, 0, 0
)
PLANES = bytes.fromhex(
    "03 02 0000 05000000 20000000"  # planes, words of 2 bytes, reserved, 5 words, 32 bytes
    "00 01 0000 05000000 05000000"  # raw, 5 bytes
    "01 02 03 04 05"
    "01 01 0000 05000000 03000000"  # huffman, 5 words of 1 byte, 3 bytes
    "00 01 80"  # last symbol 0, length 1 as 10, dictionary: its stream takes no bytes
)
GOLDEN = {
    "raw": (RAW, bytes.fromhex("0a0b0c")),
    "huffman": (HUFFMAN, bytes.fromhex("0a00 0b00 0a00 0a00 0c00 0a00 0b00 0a00")),
    "sparse": (SPARSE, bytes([0, 7, 9, 0, 0, 7, 0, 0, 0, 0, 0, 7])),
    "planes": (PLANES, bytes.fromhex("0180 0280 0380 0480 0580")),
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_golden_sections_are_read(kind: str) -> None:
    payload, tensor = GOLDEN[kind]
    assert decode_payload(payload) == tensor
    assert read_sections(payload, len(tensor)) == tensor


def test_golden_sections_are_written() -> None:
    assert raw_section(bytes_of([10, 11, 12])) == RAW
    alphabet = Alphabet(bytes_of([1, 2, 2]), bytes_of([10, 0, 11, 0, 12, 0]).reshape(3, 2))
    assert huffman_section(bytes_of([0, 1, 0, 0, 2, 0, 1, 0]), alphabet, 2) == HUFFMAN
    gaps = gaps_between(np.array([1, 2, 5, 11]))
    assert gaps.tolist() == [1, 0, 2, 5]
    alphabet = Alphabet(bytes_of([1, 1]), bytes_of([7, 9]).reshape(2, 1))
    gap_alphabet = Alphabet(bytes_of([2, 2, 2, 0, 0, 2]))
    section = sparse_section(12, gaps, gap_alphabet, bytes_of([0, 1, 0, 0]), alphabet, 1)
    assert section == SPARSE
    one = huffman_section(bytes_of([0] * 5), Alphabet(bytes_of([1]), bytes_of([128])[None]), 1)
    assert planes_section(2, 5, [raw_section(bytes_of([1, 2, 3, 4, 5])), one]) == PLANES


def test_an_alphabet_of_all_bytes_needs_no_dictionary() -> None:
    lengths = np.zeros(256, np.uint8)
    lengths[[3, 254, 255]] = [1, 2, 2]
    payload = huffman_section(bytes_of([3, 255, 3, 3, 254]), Alphabet(lengths), 1)
    assert len(payload) == 12 + 1 + 34 + 8 + 4
    # Last symbol 255; 0, 0, 0, 10, 110, 249 zeros, 1110100, 0: 265 bits.
    assert payload[12:14] == b"\xff\x68"
    assert payload[14:44] == bytes(30)
    assert payload[44:47] == b"\0\x2e\0"
    assert Alphabet(lengths).size_bytes == 35
    alphabet = Alphabet(bytes_of([1, 2, 2]), bytes_of([7, 8, 9])[:, None])
    assert alphabet.size_bytes == len(alphabet.pack()) == 5
    assert read_sections(payload, 5) == decode_payload(payload) == bytes([3, 255, 3, 3, 254])


def test_long_gaps() -> None:
    """A gap symbol of 255 stands for 255 zeros and no word."""
    places = np.array([0, 256, 511, 766, 1276])
    gaps = gaps_between(places)
    assert gaps.tolist() == [0, 255, 0, 254, 254, 255, 254]
    gap_alphabet = Alphabet(good_lengths(np.bincount(gaps)))
    alphabet = Alphabet(bytes_of([1]), bytes_of([1, 2, 3, 4])[None])
    payload = sparse_section(1300, gaps, gap_alphabet, bytes_of([0] * 5), alphabet, 4)
    words = np.zeros((1300, 4), np.uint8)
    words[places] = [1, 2, 3, 4]
    assert read_sections(payload, 5200) == decode_payload(payload) == words.tobytes()


def test_a_gap_without_a_word_may_be_the_last() -> None:
    gap_alphabet = Alphabet(np.array([1] + [0] * 254 + [1], np.uint8))
    alphabet = Alphabet(bytes_of([1]), bytes_of([9])[None])
    payload = sparse_section(256, bytes_of([0, 255]), gap_alphabet, bytes_of([0]), alphabet, 1)
    assert read_sections(payload, 256) == decode_payload(payload) == b"\x09" + bytes(255)
    with pytest.raises(BrokenRule, match=r"gaps.*256 of 255"):
        read_sections(payload[:4] + b"\xff\0" + payload[6:], 255)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 3),
    st.sampled_from([1, 2, 4, 8, 16, 32, 64]),
    st.integers(1, 600),
    st.integers(1, 256),
    st.integers(0, 2**32 - 1),
)
def test_sections_behind_each_other(
    before: int, word_bytes: int, words: int, distinct: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    dictionary = random.integers(0, 256, (distinct, word_bytes), np.uint8)
    symbols = random.integers(0, distinct, words).astype(np.uint8)
    lengths = good_lengths(np.bincount(symbols, minlength=distinct))
    if word_bytes == 1 and distinct == 256:
        dictionary = np.arange(256, dtype=np.uint8)[:, None]
    alphabet = Alphabet(lengths, None if word_bytes == 1 and distinct == 256 else dictionary)
    payload = RAW * before + huffman_section(symbols, alphabet, word_bytes)
    tensor = RAW[12:] * before + dictionary[symbols].tobytes()

    places = np.flatnonzero(random.random(3000) < 0.004 + 0.2 * (seed % 2))
    if places.size:
        gaps = gaps_between(places)
        symbols = np.resize(symbols, places.size)
        gap_alphabet = Alphabet(good_lengths(np.bincount(gaps)))
        payload += sparse_section(3000, gaps, gap_alphabet, symbols, alphabet, word_bytes)
        scattered = np.zeros((3000, word_bytes), np.uint8)
        scattered[places] = dictionary[symbols]
        tensor += scattered.tobytes()
    assert read_sections(payload, len(tensor)) == decode_payload(payload) == tensor


def section(kind: int, word_bytes: int, words: int, body: bytes, reserved: int = 0) -> bytes:
    return struct.pack("<BBHII", kind, word_bytes, reserved, words, len(body)) + body


def put(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def huffman(body: bytes) -> bytes:
    return section(1, 2, 8, body)


def sparse(body: bytes) -> bytes:
    return section(2, 1, 12, body)


def planes(*parts: bytes) -> bytes:
    return section(3, 2, 5, b"".join(parts))


H, S = HUFFMAN[12:], SPARSE[12:]
LOW, HIGH = PLANES[12:29], PLANES[29:]
# Two symbols of 1 bit, 5 and 6; three parts of 1 byte where only two symbols are.
TWO, SIZES = bytes.fromhex("01 01 05 06"), bytes.fromhex("0100 0100 0100 0000")
# Two gaps, both 255, for one word.
LONG_GAPS = bytes.fromhex(
    "01000000 02000000 ff 0d" + 31 * "00" + "04  00 01 07  0100 0100 0000 0000"
)
# What is broken, the rule, the payload, and the bytes of its tensor.
BROKEN_SECTIONS: list[tuple[str, Rule, bytes, int]] = [
    ("unknown kind", Rule.SECTION, put(HUFFMAN, 0, b"\4"), 16),
    ("kind 255", Rule.SECTION, put(HUFFMAN, 0, b"\xff"), 16),
    ("words of 0 bytes", Rule.SECTION, put(HUFFMAN, 1, b"\0"), 16),
    ("words of 3 bytes", Rule.SECTION, put(HUFFMAN, 1, b"\3"), 16),
    ("words of 128 bytes", Rule.SECTION, put(HUFFMAN, 1, b"\x80"), 16),
    ("sparse words of 5 bytes", Rule.SECTION, put(SPARSE, 1, b"\5"), 12),
    ("raw words of 2 bytes", Rule.SECTION, put(RAW, 1, b"\2"), 3),
    ("planes of 1 byte", Rule.SECTION, put(PLANES, 1, b"\1"), 10),
    ("planes of 16 bytes", Rule.SECTION, put(PLANES, 1, b"\x10"), 10),
    ("reserved byte 2", Rule.SECTION, put(RAW, 2, b"\1"), 3),
    ("reserved byte 3", Rule.SECTION, put(SPARSE, 3, b"\x80"), 12),
    ("reserved in a plane", Rule.SECTION, put(PLANES, 14, b"\1"), 10),
    ("a sparse plane", Rule.SECTION, put(PLANES, 29, b"\2"), 10),
    ("planes in planes", Rule.SECTION, put(PLANES, 12, b"\3\2"), 10),
    ("a plane of 2 bytes", Rule.SECTION, put(PLANES, 30, b"\2"), 10),
    ("a plane of more words", Rule.SECTION, put(PLANES, 16, b"\6"), 10),
    ("a plane of fewer words", Rule.SECTION, put(PLANES, 33, b"\4"), 10),
    ("a plane of no words", Rule.SECTION, put(PLANES, 33, b"\0"), 10),
    ("cut header", Rule.SECTION_SIZE, RAW[:11], 3),
    ("a header of 1 byte", Rule.SECTION_SIZE, RAW[:1], 3),
    ("body beyond the payload", Rule.SECTION_SIZE, HUFFMAN[:-1], 16),
    ("body of 2^32 - 1 bytes", Rule.SECTION_SIZE, put(HUFFMAN, 8, b"\xff" * 4), 16),
    ("raw body too long", Rule.SECTION_SIZE, section(0, 1, 3, RAW[12:] + b"\1"), 3),
    ("raw body too short", Rule.SECTION_SIZE, section(0, 1, 3, RAW[12:14]), 3),
    ("raw body empty", Rule.SECTION_SIZE, section(0, 1, 3, b""), 3),
    ("bytes behind the last section", Rule.SECTION_SIZE, HUFFMAN + b"\0", 16),
    ("a section too many", Rule.SECTION_SIZE, HUFFMAN + RAW, 16),
    ("huffman body empty", Rule.SECTION_SIZE, huffman(b""), 16),
    ("lengths cut", Rule.SECTION_SIZE, huffman(H[:1]), 16),
    ("dictionary cut", Rule.SECTION_SIZE, huffman(H[:7]), 16),
    ("dictionary missing", Rule.SECTION_SIZE, huffman(H[:2]), 16),
    ("lengths of 256 symbols cut", Rule.SECTION_SIZE, section(1, 1, 5, b"\xff" + bytes(31)), 5),
    ("stream missing", Rule.SECTION_SIZE, huffman(H[:8]), 16),
    ("sizes cut", Rule.SECTION_SIZE, huffman(H[:15]), 16),
    ("parts missing", Rule.SECTION_SIZE, huffman(H[:16]), 16),
    ("last part cut", Rule.SECTION_SIZE, huffman(H[:19]), 16),
    ("a part beyond the body", Rule.SECTION_SIZE, huffman(put(H, 8, b"\xff\xff")), 16),
    ("bytes behind a stream", Rule.SECTION_SIZE, huffman(H + b"\0"), 16),
    ("a stream of one symbol", Rule.SECTION_SIZE, section(1, 1, 5, b"\0\1\7" + bytes(8)), 5),
    ("counts cut", Rule.SECTION_SIZE, sparse(S[:7]), 12),
    ("gap alphabet missing", Rule.SECTION_SIZE, sparse(S[:8]), 12),
    ("gap alphabet cut", Rule.SECTION_SIZE, sparse(S[:11]), 12),
    ("word alphabet cut", Rule.SECTION_SIZE, sparse(S[:15]), 12),
    ("gap stream missing", Rule.SECTION_SIZE, sparse(S[:16]), 12),
    ("gap stream cut", Rule.SECTION_SIZE, sparse(S[:27]), 12),
    ("word stream missing", Rule.SECTION_SIZE, sparse(S[:28]), 12),
    ("word stream cut", Rule.SECTION_SIZE, sparse(S[:39]), 12),
    ("bytes behind the word stream", Rule.SECTION_SIZE, sparse(S + b"\0"), 12),
    ("no planes", Rule.SECTION_SIZE, planes(), 10),
    ("one plane", Rule.SECTION_SIZE, planes(LOW), 10),
    ("three planes", Rule.SECTION_SIZE, planes(LOW, LOW, HIGH), 10),
    ("plane's header cut", Rule.SECTION_SIZE, planes(LOW, HIGH[:11]), 10),
    ("plane cut", Rule.SECTION_SIZE, planes(LOW, HIGH[:-1]), 10),
    ("plane beyond its planes", Rule.SECTION_SIZE, planes(LOW, HIGH[:-1]) + b"\x80" + RAW, 13),
    ("raw plane too short", Rule.SECTION_SIZE, planes(section(0, 1, 5, b"1234"), HIGH), 10),
    ("no words", Rule.WORDS, section(0, 1, 0, b""), 3),
    ("no coded words", Rule.WORDS, put(HUFFMAN, 4, b"\0"), 16),
    ("a word too many", Rule.WORDS, put(HUFFMAN, 4, b"\x09"), 16),
    ("2^32 - 1 words", Rule.WORDS, put(SPARSE, 4, b"\xff" * 4), 12),
    ("more planes than the tensor", Rule.WORDS, PLANES, 9),
    ("payload too short", Rule.WORDS, RAW, 4),
    ("section missing", Rule.WORDS, HUFFMAN, 32),
    ("too many bits", Rule.CODE, huffman(put(H, 1, b"\x6f")), 16),
    ("13 bits beside a whole code", Rule.CODE, huffman(b"\2\x79\3" + H[2:]), 16),
    ("a length below 0", Rule.CODE, huffman(put(H, 1, b"\3")), 16),
    ("codes left over", Rule.CODE, huffman(b"\2\x97\6" + H[2:]), 16),
    ("too many codes", Rule.CODE, huffman(put(H, 1, b"\1")), 16),
    ("bit behind the lengths", Rule.CODE, huffman(put(H, 1, b"\x25")), 16),
    ("one code of 2 bits", Rule.CODE, section(1, 1, 5, b"\0\x17\7"), 5),
    ("one code of 15 bits", Rule.CODE, section(1, 1, 5, b"\0\x7f\7"), 5),
    ("no code", Rule.CODE, section(1, 1, 5, b"\0\0\7"), 5),
    ("no codes", Rule.CODE, section(1, 1, 5, b"\xff" + bytes(32)), 5),
    ("gap lengths", Rule.CODE, sparse(put(S, 9, b"\x0f")), 12),
    ("bit behind the words' lengths", Rule.CODE, sparse(put(S, 13, b"\x09")), 12),
    ("word lengths", Rule.CODE, sparse(put(S, 13, b"\5")), 12),
    ("lengths of a plane", Rule.CODE, put(PLANES, 42, b"\x17"), 10),
    ("bit behind part 0", Rule.STREAM, huffman(put(H, 16, b"\x86")), 16),
    ("bit behind part 3", Rule.STREAM, huffman(put(H, 19, b"\4")), 16),
    ("part too long", Rule.STREAM, huffman(H[:8] + b"\2" + H[9:17] + b"\0" + H[17:]), 16),
    ("part too short", Rule.STREAM, huffman(H[:8] + b"\0" + H[9:16] + H[17:]), 16),
    ("last part too short", Rule.STREAM, huffman(H[:14] + b"\0" + H[15:19]), 16),
    ("last part too long", Rule.STREAM, huffman(H[:14] + b"\2" + H[15:] + b"\0"), 16),
    ("bit behind the gaps", Rule.STREAM, sparse(put(S, 27, b"\7")), 12),
    ("gap part too long", Rule.STREAM, sparse(S[:22] + b"\2" + S[23:28] + b"\0" + S[28:]), 12),
    ("bit behind the words", Rule.STREAM, sparse(put(S, 36, b"\2")), 12),
    ("word part too short", Rule.STREAM, sparse(S[:34] + b"\0" + S[35:39]), 12),
    ("part without symbols", Rule.STREAM, section(1, 1, 2, TWO + SIZES + b"\0\0\0"), 2),
    ("no nonzeros", Rule.GAPS, sparse(put(S, 0, b"\0")), 12),
    ("more nonzeros than words", Rule.GAPS, sparse(put(S, 0, b"\x0d\0\0\0\x0d")), 12),
    ("more nonzeros than gaps", Rule.GAPS, sparse(put(S, 0, b"\5")), 12),
    ("more gaps than words", Rule.GAPS, sparse(put(S, 4, b"\x0d")), 12),
    ("2^32 - 1 gaps", Rule.GAPS, sparse(put(S, 4, b"\xff" * 4)), 12),
    ("gap beyond the last word", Rule.GAPS, sparse(put(S, 24, b"\3")), 12),
    ("fewer nonzeros", Rule.GAPS, sparse(b"\3" + S[1:34] + b"\0" + S[35:39]), 12),
    ("only long gaps", Rule.GAPS, section(2, 1, 600, LONG_GAPS + b"\1\1"), 600),
]


@pytest.mark.parametrize(
    ("rule", "payload", "raw_bytes"),
    [broken[1:] for broken in BROKEN_SECTIONS],
    ids=[broken[0] for broken in BROKEN_SECTIONS],
)
def test_every_broken_rule_is_named(rule: Rule, payload: bytes, raw_bytes: int) -> None:
    with pytest.raises(BrokenRule) as error:
        read_sections(payload, raw_bytes)
    assert error.value.rule is rule
    assert str(error.value).startswith(rule.value)


def test_sizes_are_checked_before_codes() -> None:
    """Nothing is decoded of a section whose streams do not fill its body."""
    lengths = good_lengths([5, 1, 1])
    alphabet = Alphabet(lengths, bytes_of([1, 2, 3])[:, None])
    symbols = np.resize(bytes_of([0, 0, 1, 2]), 2 * BLOCK)
    gaps = Alphabet(bytes_of([1]))
    packed = len(alphabet.pack())
    for payload, sizes in (
        (huffman_section(symbols, alphabet, 1), 12 + packed),
        (
            sparse_section(symbols.size, np.zeros_like(symbols), gaps, symbols, alphabet, 1),
            12 + 8 + 2 + packed,
        ),
    ):
        wrong = put(payload, sizes, bytes([payload[sizes] ^ 1]))
        with pytest.raises(BrokenRule, match=Rule.SECTION_SIZE.value):
            read_sections(wrong, symbols.size)
        first_part = put(payload, sizes + 8, bytes([payload[sizes + 8] ^ 1]))
        cut = put(first_part[:-1], 8, struct.pack("<I", len(payload) - 13))
        with pytest.raises(BrokenRule, match=Rule.SECTION_SIZE.value):
            read_sections(cut, symbols.size)


def test_no_change_of_a_payload_does_anything_else() -> None:
    """Flipped, cut and random bytes are refused or decoded, and always to the same size."""
    random = np.random.default_rng(0)
    good = b"".join(payload for payload, _ in GOLDEN.values())
    size = sum(len(tensor) for _, tensor in GOLDEN.values())
    rules = set()
    for _ in range(2500):
        changed = bytearray(good)
        for at in random.integers(0, len(good), random.integers(1, 4)):
            value = int(random.integers(0, 256))
            changed[at] = value if random.random() < 0.3 else changed[at] ^ 1 << value % 8
        payload = bytes(changed[: len(good) - int(random.integers(0, 2) * random.integers(0, 40))])
        try:
            tensor = read_sections(payload, size)
        except BrokenRule as error:
            rules.add(error.rule)
        else:
            assert tensor == decode_payload(payload)
            assert len(tensor) == size
    assert len(rules) == 6
