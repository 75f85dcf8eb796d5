"""Length-limited canonical Huffman codes, and the streams of `docs/format.md`, with NumPy only.

`runtime/decode.c` decodes the same streams on the board.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgepress.targets.weight_rules import BrokenRule, Rule

Bytes = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]

MAX_BITS = 12
BLOCK = 16384  # symbols of a block
PARTS = 4  # symbol i of a block belongs to part i mod 4
SIZES = struct.Struct(f"<{PARTS}H")

_SHORT_BITS = 11  # a decoding table of this many bits is faster: it takes half the cache
_WORTH = 0.0005  # part of the size that codes of 12 bits must save to be taken

_SLOT_BITS = np.arange(1 << MAX_BITS)[:, None] >> np.arange(MAX_BITS) & 1
_REVERSED: npt.NDArray[np.int64] = _SLOT_BITS @ (1 << np.arange(MAX_BITS)[::-1])

Entries = npt.NDArray[np.uint32]  # codes in the lower 24 bits, their length above
_LENGTH_AT = 24

_PAIRS_FROM = 1 << 18  # symbols from which a table of all pairs pays for itself
_BLOCKS_ENCODED = 8  # at a time: what is in flight stays in the cache
_BLOCKS_DECODED = 4
_DOUBLINGS = 3  # 2^3 symbols are skipped at a time; more or fewer were slower


def code_lengths(counts: npt.ArrayLike, limit: int = MAX_BITS) -> Bytes:
    """Return the lengths of an optimal prefix code whose codes have at most `limit` bits.

    Package-merge: Larmore and Hirschberg, "A fast algorithm for optimal length-limited Huffman
    codes", 1990, in the form of a list per length. Of equal counts, earlier symbols come first, so
    the result is the same everywhere.

    Args:
        counts: how often each symbol occurs, `[symbols]`.
        limit: most bits of a code; 2^limit must not be less than the symbols that occur.

    Returns:
        `[symbols]`; 0 for a symbol that does not occur, 1 for one that occurs alone.

    Raises:
        ValueError: no symbol occurs, or too many for the limit.
    """
    return _lengths(np.asarray(counts, np.int64), (limit,))[0]


def good_lengths(counts: npt.ArrayLike) -> Bytes:
    """Return code lengths of at most 11 bits, or 12 where that saves more than 0.05 %."""
    counts = np.asarray(counts, np.int64)
    short, best = _lengths(counts, (_SHORT_BITS, MAX_BITS))
    saved = int(counts @ short.astype(np.int64)) - int(counts @ best.astype(np.int64))
    return best if saved > _WORTH * int(counts @ short.astype(np.int64)) else short


def _lengths(counts: Counts, limits: tuple[int, ...]) -> list[Bytes]:
    """Code lengths for each of several limits, in ascending order: they share most of the work."""
    symbols = np.flatnonzero(counts)
    order = symbols[np.argsort(counts[symbols], kind="stable")]
    if not order.size or order.size > 1 << limits[0]:
        raise ValueError(f"{order.size} symbols have no code of at most {limits[0]} bits")
    found: list[Bytes] = []
    if order.size == 1:
        lengths = np.zeros(counts.size, np.uint8)
        lengths[order] = 1
        return [lengths] * len(limits)

    leaves = counts[order]
    items, is_leaf = leaves, [np.ones(leaves.size, np.bool_)]
    for limit in limits:
        while len(is_leaf) < limit:
            even = items[: items.size & ~1]
            both = np.concatenate([leaves, even[0::2] + even[1::2]])
            merged = np.argsort(both, kind="stable")
            items = both[merged]
            is_leaf.append(merged < leaves.size)
        # A code's length is how often its symbol is among the cheapest items of all lists, from
        # the last list back: packages that are taken say how many items of the list before are.
        taken = 2 * leaves.size - 2
        by_rank = np.zeros(leaves.size + 1, np.int64)
        for flags in reversed(is_leaf):
            used = int(np.count_nonzero(flags[:taken]))
            by_rank[used] += 1
            taken = 2 * (taken - used)
        lengths = np.zeros(counts.size, np.uint8)
        lengths[order] = np.cumsum(by_rank[::-1])[::-1][1:]
        found.append(lengths)
        if int(lengths.max()) < limit:  # the limit does not bind: a higher one changes nothing
            return found + [lengths] * (len(limits) - len(found))
    return found


def check_lengths(lengths: Bytes) -> None:
    """Raise `BrokenRule` where code lengths are not those of exactly one complete code."""
    used = lengths[lengths > 0]
    if used.size == 1:
        if used[0] != 1:
            raise BrokenRule(Rule.CODE, f"the only code has {used[0]} bits, not 1")
        return
    if not used.size or int(used.max()) > MAX_BITS:
        raise BrokenRule(Rule.CODE, f"{used.size} codes, {int(lengths.max(initial=0))} bits")
    space = int((1 << (MAX_BITS - used.astype(np.int64))).sum())
    if space != 1 << MAX_BITS:
        raise BrokenRule(Rule.CODE, f"the codes use {space} of {1 << MAX_BITS} patterns")


def _by_slot(lengths: Bytes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Symbols in the order of their codes, and how many of the 4096 patterns each takes."""
    symbols = np.flatnonzero(lengths)
    symbols = symbols[np.argsort(lengths[symbols], kind="stable")]
    return symbols, 1 << (MAX_BITS - lengths[symbols].astype(np.int64))


def codes(lengths: Bytes) -> npt.NDArray[np.uint32]:
    """Return the canonical codes, first bit lowest; 0 where a symbol has none."""
    symbols, patterns = _by_slot(lengths)
    result = np.zeros(lengths.size, np.uint32)
    result[symbols] = _REVERSED[np.cumsum(patterns) - patterns]
    return result


def decoding_table(lengths: Bytes) -> npt.NDArray[np.uint16]:
    """Return symbol + 256 × length for each 12 bits that may come next, `[4096]`."""
    symbols, patterns = _by_slot(lengths)
    entries = symbols + (lengths[symbols].astype(np.int64) << 8)
    return np.repeat(entries, patterns)[_REVERSED].astype(np.uint16)


def entropy_bits(counts: Counts) -> float:
    """Return the zero-order Shannon bound of symbols that occur so often: bits for all of them."""
    used = counts[counts > 0]
    return float(used @ np.log2(used.sum() / used))


def stream_bytes(counts: Counts, lengths: Bytes) -> int:
    """Return the size of a stream, at most 2 bytes per part less or more than it will be."""
    if np.count_nonzero(lengths) < 2:
        return 0
    blocks = -(-int(counts.sum()) // BLOCK)
    bits = int(counts @ lengths.astype(np.int64))
    return bits // 8 + blocks * (SIZES.size + PARTS // 2)


def encode_stream(symbols: Bytes, lengths: Bytes) -> bytes:
    """Encode symbols, each of which must have a code."""
    if np.count_nonzero(lengths) < 2:
        return b""
    single = np.zeros(256, np.uint32)
    single[: lengths.size] = codes(lengths) | lengths.astype(np.uint32) << _LENGTH_AT
    pairs: Entries | None = None
    if symbols.size >= _PAIRS_FROM:
        first, second = np.broadcast_arrays(single[None, :], single[:, None])
        pairs = _joined(np.stack([first, second], axis=2).ravel())
    whole = symbols.size - symbols.size % BLOCK
    chunks: list[bytes] = []
    for at in range(0, whole, _BLOCKS_ENCODED * BLOCK):
        blocks = symbols[at : min(at + _BLOCKS_ENCODED * BLOCK, whole)]
        parts = np.ascontiguousarray(blocks.reshape(-1, BLOCK // PARTS, PARTS).swapaxes(1, 2))
        parts = parts.reshape(-1, BLOCK // PARTS)
        two = _joined(single.take(parts)) if pairs is None else pairs.take(parts.view("<u2"))
        chunks += _pack(two)
    if whole < symbols.size:
        size = symbols.size - whole
        rest = np.zeros(-(-size // 16) * 16, np.uint32)  # no codes make up the last quadruples
        rest[:size] = single.take(symbols[whole:])
        chunks += _pack(_joined(np.ascontiguousarray(rest.reshape(-1, PARTS).T)))
    return b"".join(chunks)


def _two(entries: Entries) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Codes and lengths of each two entries behind each other, `[…, n]` to `[…, n / 2]`."""
    both = entries.view("<u8")
    bits = both >> np.uint64(_LENGTH_AT) & np.uint64(0xFF)
    code = both & np.uint64(0xFFFFFF) | (both >> np.uint64(32) & np.uint64(0xFFFFFF)) << bits
    return code, bits + (both >> np.uint64(32 + _LENGTH_AT))


def _joined(entries: Entries) -> Entries:
    """One entry for each two of symbols, `[…, n]` to `[…, n / 2]`."""
    code, bits = _two(entries)
    return (code | bits << np.uint64(_LENGTH_AT)).astype(np.uint32)


def _pack(pairs: Entries) -> list[bytes]:
    """Sizes and parts of some blocks from the codes of their parts, `[4 × blocks, n]`.

    Two pairs make a code of up to 48 bits. So in every 64-bit word of a part at least one begins,
    and only the last of those can reach into the next word.
    """
    code, lengths = _two(pairs)
    bits = lengths.view(np.int64)
    at = np.cumsum(bits, axis=1)
    lane_bits = at[:, -1].copy()
    lane_words = (lane_bits + 63) >> 6
    first_word = np.cumsum(lane_words) - lane_words
    at -= bits
    at += (first_word << 6)[:, None]
    at = at.ravel()
    code, word, shift = code.ravel(), at >> 6, (at & 63).view(np.uint64)
    starts = np.append(0, np.flatnonzero(word[1:] != word[:-1]) + 1)
    last = np.append(starts[1:], word.size) - 1
    packed = np.zeros(int(lane_words.sum()) + 2, "<u8")
    packed[word[starts]] = np.bitwise_or.reduceat(code << shift, starts)
    packed[word[last] + 1] |= code[last] >> np.uint64(1) >> (np.uint64(63) - shift[last])

    data, sizes = packed.tobytes(), (lane_bits + 7) >> 3
    chunks: list[bytes] = []
    for lane, (word_at, size) in enumerate(zip(first_word.tolist(), sizes.tolist(), strict=True)):
        if lane % PARTS == 0:
            chunks.append(SIZES.pack(*sizes[lane : lane + PARTS].tolist()))
        chunks.append(data[8 * word_at : 8 * word_at + size])
    return chunks


class Frame(NamedTuple):
    """Where the parts of a stream lie.

    Attributes:
        spans: begin and end of each part, `[blocks, 4, 2]`; no blocks where only one symbol occurs.
        end: where the stream ends.
    """

    spans: npt.NDArray[np.int64]
    end: int


def frame_stream(data: Bytes, at: int, count: int, lengths: Bytes) -> Frame:
    """Find the parts of a stream of `count` symbols that begins at `at`, without decoding them.

    Args:
        data: what holds the stream, and nothing that does not belong to its section.
        at: where it begins.
        count: symbols of the stream.
        lengths: code lengths that `check_lengths` allows.

    Raises:
        BrokenRule: SECTION_SIZE where it does not fit into `data`.
    """
    spans: list[int] = []
    blocks = -(-count // BLOCK) if np.count_nonzero(lengths) > 1 else 0
    for block in range(blocks):
        sizes = SIZES.unpack_from(data.data, at) if at + SIZES.size <= data.size else (data.size,)
        if at + SIZES.size + sum(sizes) > data.size:
            raise BrokenRule(Rule.SECTION_SIZE, f"block {block} of a stream is cut")
        at += SIZES.size
        for size in sizes:
            spans += [at, at + size]
            at += size
    return Frame(np.array(spans, np.int64).reshape(-1, PARTS, 2), at)


def decode_stream(data: Bytes, frame: Frame, count: int, lengths: Bytes) -> Bytes:
    """Return the symbols `[count]` of a stream, given what `frame_stream` found.

    Raises:
        BrokenRule: STREAM where a part does not end with its last code.
    """
    if not frame.spans.size:
        return np.full(count, np.flatnonzero(lengths)[0], np.uint8)
    table = decoding_table(lengths)
    return np.concatenate(
        [
            _decode_blocks(
                data, frame.spans[first : first + _BLOCKS_DECODED], count - first * BLOCK, table
            )
            for first in range(0, len(frame.spans), _BLOCKS_DECODED)
        ]
    )


def _decode_blocks(
    data: Bytes, spans: npt.NDArray[np.int64], count: int, table: npt.NDArray[np.uint16]
) -> Bytes:
    """Decode some blocks; `count` symbols are left in the stream, `spans` is `[blocks, 4, 2]`.

    Where a code begins depends on all before it. So that NumPy can work on many at once, every bit
    of the blocks is first taken for the beginning of a code, which tells where the next one would
    begin. Following that 2^3 times gives longer jumps, which then lead through all parts at once.
    """
    count = min(count, len(spans) * BLOCK)
    low, high = int(spans[0, 0, 0]), int(spans[-1, -1, 1])
    padded = np.zeros(high - low + 4, np.uint32)  # a code that ends beyond is seen as too long
    padded[:-4] = data[low:high]
    windows = padded[:-2] | padded[1:-1] << np.uint32(8) | padded[2:] << np.uint32(16)
    shifted = windows[:, None] >> np.arange(8, dtype=np.uint32)
    entries = table.take((shifted & np.uint32((1 << MAX_BITS) - 1)).ravel())
    following = (entries >> 8).astype(np.int32) + np.arange(entries.size, dtype=np.int32)
    jumps = [np.minimum(following, entries.size - 1)]
    for _ in range(_DOUBLINGS):
        jumps.append(jumps[-1].take(jumps[-1]))

    longest = -(-min(count, BLOCK) // PARTS) + 1  # positions in a part, its end included
    at = (8 * (spans[..., 0] - low)).astype(np.int32).ravel()
    places = np.empty((-(-longest >> _DOUBLINGS), at.size), np.int32)
    for row in places:
        row[:] = at
        at = jumps[-1].take(at)
    for jump in jumps[-2::-1]:
        places = np.stack([places, jump.take(places)], axis=1).reshape(-1, at.size)

    blocks = np.minimum(count - np.arange(len(spans)) * BLOCK, BLOCK)
    in_part = (blocks[:, None] + (PARTS - 1 - np.arange(PARTS))) // PARTS
    ends = np.take_along_axis(places, in_part.reshape(1, -1), axis=0).reshape(in_part.shape)
    rest = np.append(data[low:high], np.uint8(0))[ends.clip(0, 8 * (high - low)) >> 3]
    used = (ends + 7) >> 3
    if (used != spans[..., 1] - low).any() or ((rest >> (ends & 7)) * (ends & 7)).any():
        raise BrokenRule(Rule.STREAM)
    by_part = entries.take(places[: longest - 1]).reshape(-1, len(spans), PARTS)
    symbols: Bytes = by_part.swapaxes(0, 1).astype(np.uint8).reshape(-1)
    return symbols[:count]
