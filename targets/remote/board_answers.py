"""What the scripts of the store say: what there is on a board, and why something failed."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field

from edgepress.targets.base import DeviceFailed, LinkBroken
from edgepress.targets.remote import board_scripts

SUMS = "SHA256SUMS"

_ID = re.compile(r"[0-9a-f]{16}")
_SUM = re.compile(r"([0-9a-f]{64})  (.+)")
_INCOMING = re.compile(r"(\d+) ([0-9a-f]{64})(\.part)?")
_FREE = re.compile(r"\s(\d+)\s+\d+%\s")

_ADVICE = (
    ("No space left", "The disk there is full: free some space"),
    ("quota", "Nothing more may be written there: free some space"),
    ("Read-only file system", "The disk there is read-only: make it writable"),
    ("Permission denied", "The account there may not write to it: change that"),
)


@dataclass
class BoardContents:
    """What a folder of a board holds.

    Attributes:
        root: absolute path of the folder.
        versions: per ID the SHA-256 of each file, by path.
        damaged: files of the version that was looked at whose bytes are wrong.
        incoming: bytes of each file that has arrived but belongs to no version yet, by SHA-256.
        parts: likewise of each that is under way.
        free_bytes: of the disk; None where `df` did not say.
        name: what the name is: `link`, `folder` (of an older edgepress), `empty`, `inside` (of a
            bundle), `foreign`, or empty: nothing.
        current: the version that the name points to, or None.
        older: SHA-256 of each file of an older edgepress's folder.
        before: per version to which the name may point the one before.
    """

    root: str = ""
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    incoming: dict[str, int] = field(default_factory=dict)
    parts: dict[str, int] = field(default_factory=dict)
    free_bytes: int | None = None
    name: str = ""
    current: str | None = None
    older: dict[str, str] = field(default_factory=dict)
    before: dict[str, str] = field(default_factory=dict)


def sums_text(sums: Mapping[str, str]) -> str:
    """Return the text of SHA256SUMS, as `sha256sum -c` and `model --selftest` read it."""
    return "".join(f"{sums[path]}  {path}\n" for path in sorted(sums))


def version_id(sums: Mapping[str, str]) -> str:
    """Return the ID of the version that has these files.

    >>> version_id({"model": "0" * 64})
    'ac3fbc5b2d6d0b6e'
    """
    return hashlib.sha256(sums_text(sums).encode()).hexdigest()[:16]


def read_contents(said: bytes) -> BoardContents:
    """Parse what the script LOOK printed; what is none of ours is left out."""
    listing, _, root = ("\n" + os.fsdecode(said)).rpartition("\nroot ")
    contents = BoardContents(root=root)
    files: dict[str, str] = {}
    for line in listing.split("\n"):
        key, _, value = line.partition(" ")
        found = _SUM.fullmatch(value)
        if key == "version":
            files = contents.versions.setdefault(value, {}) if _ID.fullmatch(value) else {}
        elif key == "file" and found:
            files[found[2]] = found[1]
        elif key == "older" and found and found[2] != SUMS:
            contents.older[found[2]] = found[1]
        elif key == "damaged":
            contents.damaged.add(value)
        elif key == "incoming" and (arrived := _INCOMING.fullmatch(value)):
            (contents.parts if arrived[3] else contents.incoming)[arrived[2]] = int(arrived[1])
        elif key == "df" and (free := _FREE.search(value)):
            contents.free_bytes = 1024 * int(free[1])
        elif key == "previous" and len(words := value.split()) == 2:
            contents.before[words[0]] = words[1]
        elif key == "name":
            _read_name(contents, value)
    return contents


def _read_name(contents: BoardContents, value: str) -> None:
    contents.name, _, target = value.partition(" ")
    if contents.name == "link":
        folder, _, version = target.rpartition("/")
        if folder == ".edgepress" and _ID.fullmatch(version):
            contents.current = version
        else:
            contents.name = "foreign"


def failure(
    device: str, folder: str, doing: str, result: subprocess.CompletedProcess[bytes]
) -> DeviceFailed:
    """Say why a script failed.

    Args:
        device: its name.
        folder: of the store.
        doing: what the script was for, as in "cannot …".
        result: how it ended.
    """
    lines = dict.fromkeys(result.stderr.decode("utf-8", "replace").splitlines())
    said = " ".join(" ".join(lines).split())[-800:]
    code = result.returncode
    if code == board_scripts.NOT_HELD:
        return LinkBroken(
            f"{device}: cannot {doing}: the link was gone for so long that another deployment to "
            f"{folder} took over. Deploy again once that has ended."
        )
    if code == board_scripts.NO_HOME:
        return DeviceFailed(
            f"{device}: {folder} needs a home folder, and HOME is not set there. Give an absolute "
            "path: `folder` in devices.toml, or --to."
        )
    if code == board_scripts.LACKS_TOOLS:
        lacking = result.stdout.decode("utf-8", "replace").split()
        return DeviceFailed(
            f"{device}: the board has no {', '.join(lacking)}, which deploying needs there. "
            "busybox has all of that."
        )
    advice = next((advice for sign, advice in _ADVICE if sign in said), "See to that")
    reason = said or f"the script ended with {code}"
    return DeviceFailed(
        f"{device}: cannot {doing} in {folder}: {reason}. {advice}, or give another place: "
        "`folder` in devices.toml, or --to. What was installed before is as it was."
    )
