"""Decodes the payloads of `docs/format.md` bit by bit, as the specification reads; no checks."""


def decode_payload(payload: bytes) -> bytes:
    """All sections of a payload."""
    tensor, at = b"", 0
    while at < len(payload):
        section, at = decode_section(payload, at)
        tensor += section
    return tensor


def decode_section(data: bytes, at: int) -> tuple[bytes, int]:
    kind, word_bytes = data[at], data[at + 1]
    words, body_bytes = number(data, at + 4, 4), number(data, at + 8, 4)
    at, end = at + 12, at + 12 + body_bytes
    if kind == 0:
        return data[at:end], end
    if kind == 1:
        codes, dictionary, at = alphabet(data, at, word_bytes)
        symbols, at = stream(data, at, words, codes)
        decoded = [dictionary[symbol] for symbol in symbols]
    elif kind == 2:
        nonzeros, gap_count = number(data, at, 4), number(data, at + 4, 4)
        gap_codes, _, at = alphabet(data, at + 8, 0)
        codes, dictionary, at = alphabet(data, at, word_bytes)
        gaps, at = stream(data, at, gap_count, gap_codes)
        symbols, at = stream(data, at, nonzeros, codes)
        decoded, following = [], iter(symbols)
        for gap in gaps:
            decoded += [bytes(word_bytes)] * gap
            decoded += [dictionary[next(following)]] if gap < 255 else []
        decoded += [bytes(word_bytes)] * (words - len(decoded))
    else:
        planes = []
        for _ in range(word_bytes):
            plane, at = decode_section(data, at)
            planes.append(plane)
        decoded = [bytes(word) for word in zip(*planes, strict=True)]
    assert (at, len(decoded)) == (end, words)
    return b"".join(decoded), end


def number(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "little")


def alphabet(data: bytes, at: int, word_bytes: int) -> tuple[dict[str, int], list[bytes], int]:
    """Codes as text to symbols, the words of the symbols, and where the alphabet ends."""
    last = data[at]
    bits = "".join(f"{byte:08b}"[::-1] for byte in data[at + 1 : at + 226])
    lengths, length, used = [], 0, 0
    for _ in range(last + 1):
        if bits[used] == "0":
            used += 1
        elif bits[used : used + 2] == "10":
            length, used = length + 1, used + 2
        elif bits[used : used + 3] == "110":
            length, used = length - 1, used + 3
        else:
            length, used = int(bits[used + 3 : used + 7][::-1], 2), used + 7
        lengths.append(length)
    at += 1 + -(-used // 8)
    if word_bytes == 0 or (word_bytes == 1 and last == 255):
        dictionary = [bytes([symbol]) for symbol in range(256)]
    else:
        dictionary = [data[at + i * word_bytes :][:word_bytes] for i in range(last + 1)]
        at += (last + 1) * word_bytes
    return canonical(lengths), dictionary, at


def canonical(lengths: list[int]) -> dict[str, int]:
    """RFC 1951, 3.2.2: codes count up, and get a 0 at the end where they become longer."""
    codes, code, before = {}, 0, 0
    for length, symbol in sorted((length, symbol) for symbol, length in enumerate(lengths)):
        if length:
            code <<= length - before
            codes[f"{code:0{length}b}"] = symbol
            code, before = code + 1, length
    return codes


def stream(data: bytes, at: int, count: int, codes: dict[str, int]) -> tuple[list[int], int]:
    """The symbols of a stream, and where it ends."""
    if len(codes) == 1:
        return [*codes.values()] * count, at
    symbols = [0] * count
    for block in range(0, count, 16384):
        sizes = [number(data, at + 2 * part, 2) for part in range(4)]
        at += 8
        for part in range(4):
            bits = "".join(f"{byte:08b}"[::-1] for byte in data[at : at + sizes[part]])
            at += sizes[part]
            used = 0
            for place in range(block + part, min(block + 16384, count), 4):
                length = 1
                while bits[used : used + length] not in codes:
                    length += 1
                symbols[place] = codes[bits[used : used + length]]
                used += length
            assert len(bits) - used < 8, "the part ends with its last code"
            assert "1" not in bits[used:]
    return symbols, at
