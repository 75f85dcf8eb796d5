"""Text of a board's or a file's made safe for a terminal, which control characters could steer."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""Return text with a question mark for each control character but the line's end.

    >>> printable("no space\nleft on \x1b[31mdevice")
    'no space\nleft on ?[31mdevice'
    """
    return "".join(each if each.isprintable() or each == "\n" else "?" for each in text)


def one_line(text: str) -> str:
    r"""Return text likewise, as one line.

    >>> one_line("no space\nleft on \x1b[31mdevice")
    'no space left on ?[31mdevice'
    """
    return printable(" ".join(text.split()))
