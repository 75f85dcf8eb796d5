"""The rules of the weights file, by the words with which a file that breaks one is refused."""

from __future__ import annotations

import enum


class Rule(enum.Enum):
    """The rules of `docs/format.md`. `runtime/weights.c` and `decode.c` use the same words."""

    MAGIC = "not a weights file"
    VERSION = "unknown version of the format"
    TRUNCATED = "the file is truncated"
    TRAILING = "bytes follow the last payload"
    HEADER_SIZE = "the header's size is wrong"
    HEADER_CHECKSUM = "the header's checksum is wrong"
    RESERVED = "a reserved field or padding is not zero"
    NAME = "a name is empty, not UTF-8 or out of order"
    DTYPE = "unknown dtype"
    SHAPE = "a shape has too many axes or elements"
    RAW_SIZE = "the raw size is not that of the shape"
    CODEC = "unknown codec"
    ENCODED_SIZE = "the encoded size is impossible for the codec"
    OFFSET = "a payload does not lie where it must"
    CHECKSUM = "a payload's checksum is wrong"
    SECTION = "a section has an unknown kind or word size"
    SECTION_SIZE = "a section's size is wrong"
    WORDS = "the sections do not fill the tensor"
    CODE = "the code lengths make no prefix code"
    STREAM = "a stream does not end with its last symbol"
    GAPS = "the gaps do not fit the tensor"


class BrokenRule(Exception):
    """A coded payload breaks a rule of the format.

    Attributes:
        rule: the rule that it breaks.
        detail: where in the payload, or by how much.
    """

    def __init__(self, rule: Rule, detail: str = "") -> None:
        self.rule, self.detail = rule, detail
        super().__init__(f"{rule.value} ({detail})" if detail else rule.value)
