import heapq
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.targets.huffman import (
    BLOCK,
    MAX_BITS,
    Bytes,
    check_lengths,
    code_lengths,
    codes,
    decode_stream,
    encode_stream,
    entropy_bits,
    frame_stream,
    good_lengths,
    stream_bytes,
)
from edgepress.targets.weight_rules import BrokenRule, Rule
from tests.targets.payload_oracle import canonical, stream


def cost(counts: list[int], lengths: Bytes) -> int:
    return sum(count * int(length) for count, length in zip(counts, lengths, strict=True))


def huffman_cost(counts: list[int]) -> int:
    """Bits of an unlimited Huffman code: Huffman, 1952."""
    heap = [count for count in counts if count]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        total += both
        heapq.heappush(heap, both)
    return total


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=6), st.integers(3, 5))
def test_no_other_lengths_within_the_limit_cost_less(counts: list[int], limit: int) -> None:
    possible = itertools.product(range(1, limit + 1), repeat=len(counts))
    best = min(
        sum(count * bits for count, bits in zip(counts, lengths, strict=True))
        for lengths in possible
        if sum(2.0**-bits for bits in lengths) <= 1
    )
    lengths = code_lengths(counts, limit)
    assert cost(counts, lengths) == best
    assert max(lengths) <= limit
    assert sum(2.0 ** -float(bits) for bits in lengths) == 1


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=256), st.integers(0, 2))
def test_a_limit_that_does_not_bind_gives_a_huffman_code(counts: list[int], skew: int) -> None:
    counts = [count >> (skew * i % 20) for i, count in enumerate(counts)]
    if sum(map(bool, counts)) > 1:
        lengths = code_lengths(counts, len(counts))
        assert cost(counts, lengths) == huffman_cost(counts)
        assert [bool(length) for length in lengths] == [bool(count) for count in counts]


def test_fibonacci_counts_need_the_limit() -> None:
    counts = [1, 1]
    while len(counts) < 20:
        counts.append(counts[-1] + counts[-2])
    assert max(code_lengths(counts, 19)) == 19
    limited = code_lengths(counts, MAX_BITS)
    assert max(limited) == MAX_BITS
    check_lengths(limited)
    assert cost(counts, limited) > huffman_cost(counts)


def test_lengths_of_few_symbols() -> None:
    assert code_lengths([0, 7, 0]).tolist() == [0, 1, 0]
    assert code_lengths([5, 0, 5]).tolist() == [1, 0, 1]
    assert code_lengths([1] * 256).tolist() == [8] * 256
    # Equal counts: the first symbol gets the shorter code.
    assert code_lengths([1, 1, 1]).tolist() == [2, 2, 1]
    for counts in ([], [0, 0]):
        with pytest.raises(ValueError, match="0 symbols"):
            code_lengths(counts)
    with pytest.raises(ValueError, match="9 symbols have no code of at most 3 bits"):
        code_lengths([1] * 9, 3)


def test_twelve_bits_only_where_they_are_worth_it() -> None:
    # 256 symbols of which 192 occur once: in 11 bits they crowd out the others.
    steep = [1] * 192 + [200] * 64
    assert cost(steep, code_lengths(steep, 11)) > 1.001 * cost(steep, code_lengths(steep, 12))
    assert good_lengths(steep).tolist() == code_lengths(steep, 12).tolist()
    rare = [1, *(1 << i for i in range(12))]
    assert max(code_lengths(rare, 12)) == 12
    assert good_lengths(rare).tolist() == code_lengths(rare, 11).tolist()


def test_codes_are_those_of_rfc_1951() -> None:
    """The example of section 3.2.2, A to H; the first bit is the lowest here."""
    lengths = np.array([3, 3, 3, 3, 3, 2, 4, 4], np.uint8)
    text = ["010", "011", "100", "101", "110", "00", "1110", "1111"]
    assert codes(lengths).tolist() == [int(code[::-1], 2) for code in text]
    assert list(canonical(lengths.tolist())) == ["00", *text[:5], *text[6:]]


@pytest.mark.parametrize(
    "lengths",
    [
        [],
        [0, 0],
        [2],
        [0, 12],
        [1, 0, 2],
        [1, 1, 1],
        [1, 2, 3, 4],
        [13, 13],
        [1, 2, 13, 13],
        [15],
        [*range(1, 13), 12, 13],
    ],
)
def test_lengths_that_make_no_code_are_refused(lengths: list[int]) -> None:
    with pytest.raises(BrokenRule) as error:
        check_lengths(np.array(lengths, np.uint8))
    assert error.value.rule is Rule.CODE


@pytest.mark.parametrize(
    "lengths", [[1], [0, 1], [1, 1], [2, 1, 2], [8] * 256, [*range(1, 13), 12]], ids=str
)
def test_complete_codes_pass(lengths: list[int]) -> None:
    check_lengths(np.array(lengths, np.uint8))


SIZES = [1, 2, 3, 4, 5, 15, 16, 17, 31, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 6, 5 * BLOCK + 9]


def symbols_of(distribution: str, size: int) -> Bytes:
    random = np.random.default_rng(size)
    if distribution == "two":
        return random.choice([7, 200], size).astype(np.uint8)
    if distribution == "uniform":
        return random.integers(0, 256, size).astype(np.uint8)
    return np.minimum(random.geometric(0.3, size) - 1, 255).astype(np.uint8)


@pytest.mark.parametrize("distribution", ["two", "uniform", "geometric"])
@pytest.mark.parametrize("size", SIZES)
def test_streams_follow_the_specification(distribution: str, size: int) -> None:
    symbols = symbols_of(distribution, size)
    counts = np.bincount(symbols)
    lengths = good_lengths(counts)
    data = encode_stream(symbols, lengths)
    wanted, end = stream(data, 0, size, canonical(lengths.tolist()))
    assert (wanted, end) == (symbols.tolist(), len(data))
    assert abs(stream_bytes(counts, lengths) - len(data)) <= 8 * -(-size // BLOCK)
    assert len(data) >= entropy_bits(counts) / 8

    padded = np.frombuffer(b"..." + data + b"\xff\xff", np.uint8)
    frame = frame_stream(padded, 3, size, lengths)
    assert frame.end == 3 + len(data)
    assert decode_stream(padded, frame, size, lengths).tolist() == symbols.tolist()


def test_many_symbols_are_coded_in_pairs() -> None:
    """Large streams take another way to the same bytes, block by block."""
    symbols = symbols_of("geometric", 2**18 + 3 * BLOCK // 2)
    lengths = good_lengths(np.bincount(symbols, minlength=256))
    blocks = np.split(symbols, range(BLOCK, symbols.size, BLOCK))
    data = encode_stream(symbols, lengths)
    assert data == b"".join(encode_stream(block, lengths) for block in blocks)
    array = np.frombuffer(data, np.uint8)
    frame = frame_stream(array, 0, symbols.size, lengths)
    np.testing.assert_array_equal(decode_stream(array, frame, symbols.size, lengths), symbols)


def test_one_symbol_takes_no_bytes() -> None:
    lengths = np.array([0, 0, 1], np.uint8)
    assert encode_stream(np.full(99999, 2, np.uint8), lengths) == b""
    assert stream_bytes(np.array([0, 0, 99999]), lengths) == 0
    frame = frame_stream(np.zeros(0, np.uint8), 0, 5, lengths)
    assert (frame.end, frame.spans.size) == (0, 0)
    assert decode_stream(np.zeros(0, np.uint8), frame, 5, lengths).tolist() == [2] * 5


def broken_rule(data: bytes, count: int, lengths: Bytes) -> Rule | None:
    array = np.frombuffer(data, np.uint8)
    try:
        decode_stream(array, frame_stream(array, 0, count, lengths), count, lengths)
    except BrokenRule as error:
        return error.rule
    return None


def test_every_way_to_break_a_stream() -> None:
    lengths = np.array([1, 2, 3, 3], np.uint8)
    symbols = np.array([0, 1, 2, 3] * 4 + [0], np.uint8)  # codes 0, 10, 110, 111
    data = encode_stream(symbols, lengths)
    # sizes; 5 x 0; 4 x 10; 4 x 110; 4 x 111
    assert data == bytes.fromhex("0100 0100 0200 0200 00 55 db06 ff0f")
    assert broken_rule(data, 17, lengths) is None
    for cut in range(len(data)):
        assert broken_rule(data[:cut], 17, lengths) is Rule.SECTION_SIZE, cut
    changed = {
        "a bit behind the first part's end": data[:8] + b"\x20" + data[9:],
        "a bit behind the last part's end": data[:-1] + b"\x1f",
        "a code that leads over the part's end": data[:9] + b"\xd5" + data[10:],
        "a part with a byte more": b"\2" + data[1:9] + b"\0" + data[9:],
        "a part with a byte less": data[:4] + b"\1" + data[5:11] + data[12:],
        "the last part with a byte less": data[:6] + b"\1\0" + data[8:-1],
        "a part with no bytes": b"\0" + data[1:8] + data[9:],
    }
    for what, broken in changed.items():
        assert broken_rule(broken, 17, lengths) is Rule.STREAM, what
    # One symbol less or more for the same bytes.
    assert broken_rule(data, 16, lengths) is None  # the first part's last 0 is one of its padding
    assert broken_rule(data, 15, lengths) is Rule.STREAM
    assert broken_rule(data, 18, lengths) is Rule.STREAM
