"""Why ssh failed, told from what it says, and what to do about it.

ssh exits with 255 whatever went wrong; only its messages tell. They are OpenSSH's, in C's locale.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgepress.targets.base import DeviceFailed, LinkBroken, Unreachable

SSH_FAILED = 255
_SHOWN = 600


@dataclass(frozen=True)
class _Reason:
    """A message of ssh's.

    Attributes:
        pattern: what it has in it.
        text: what it means, and what to do, with the names of what `_filled` puts in.
    """

    pattern: str
    text: str


# The first that is found counts.
_UNREACHABLE = (
    _Reason(
        r"REMOTE HOST IDENTIFICATION HAS CHANGED|[Hh]ost key for .* has changed",
        "the host key of {host} HAS CHANGED{fingerprint}. Either the board was installed anew, or "
        "something else answers in its place. Do not go on unless you know that it was installed "
        "anew; then forget the old key with `{forget}` and connect once by hand with `{by_hand}`.",
    ),
    _Reason(
        r"Host key verification failed|No .* host key is known for",
        "the host key of {host} is unknown. Connect once by hand with `{by_hand}` and compare "
        "the fingerprint that it shows with the board's own.{said}",
    ),
    _Reason(
        r"Permission denied|Too many authentication failures|No supported authentication methods",
        "{host} denied the login. No password is asked for: it takes a key that the board "
        "knows and that needs no typing; `{copy_id}` puts yours there, and ssh-agent "
        "keeps its passphrase.{said}",
    ),
    _Reason(
        r"Could not resolve hostname",
        "{host} is neither a machine's name that can be looked up nor a Host of ssh's "
        "configuration. Check its spelling, or use the board's address.{said}",
    ),
    _Reason(
        r"connect.*: Connection refused",
        "{host} refuses the connection: the board is up, but no ssh server listens at this port. "
        "Start sshd there, or name the right port.{said}",
    ),
    _Reason(
        r"connect.* timed out|timed out during banner exchange",
        "{host} does not answer. Check that the board is on, that it is in the network and "
        "that its address is right.{said}",
    ),
    _Reason(
        r"connect.*: (No route to host|Network is unreachable|Network is down|Host is down)",
        "there is no way to {host} from this machine. Check the network of both, and whether the "
        "board is on.{said}",
    ),
    _Reason(
        r"Bad configuration option|terminating, \d+ bad configuration|Can't open user config"
        r"|Bad owner or permissions on|[Kk]eyword .* extra arguments|no argument after keyword",
        "ssh does not accept its configuration. Correct it as the message says.{said}",
    ),
    _Reason(
        r"Unable to negotiate",
        "{host} and this machine's ssh have no common algorithm. Update the older one, or allow "
        "the algorithm for this host in ssh's configuration.{said}",
    ),
)
# Said only by a client that had a connection.
_WAS_CONNECTED = re.compile(r"client_loop|Read from remote host|Timeout, server")
# Said before anything ran on the board; where there is a jump host, it says on stderr why.
_NOT_YET_CONNECTED = re.compile(r"kex_exchange_identification|banner exchange")


def failure(name: str, host: str, port: str, log: bytes, stderr: bytes) -> DeviceFailed:
    """Return the error for an ssh that exited with 255.

    Args:
        name: the device, as the user names it.
        host: what ssh was told to connect to, with the user or not.
        port: the same, or empty.
        log: ssh's own messages.
        stderr: what else came: messages of a jump host, or of what ran on the board.
    """
    text = log.decode("utf-8", "replace")
    if _NOT_YET_CONNECTED.search(text):
        text += stderr.decode("utf-8", "replace")
    if not _WAS_CONNECTED.search(text):
        for reason in _UNREACHABLE:
            if re.search(reason.pattern, text):
                return Unreachable(f"{name}: {_filled(reason.text, host, port, text)}")
    return LinkBroken(
        f"{name}: the connection to {host} broke. Trying again may help.{_quote(text)}"
    )


def _filled(text: str, host: str, port: str, said: str) -> str:
    """Put the host, commands that a user can copy, and what ssh said into a reason's text."""
    machine = host.rpartition("@")[2]
    option = f"-p {port} " if port else ""
    known = f"[{machine}]:{port}" if port and port != "22" else machine
    advised = re.search(r"ssh-keygen -f .* -R \S+", said)  # by Debian's ssh, which knows the file
    return text.format(
        host=f"{host} port {port}" if port else host,
        by_hand=f"ssh {option}{host}",
        copy_id=f"ssh-copy-id {option}{host}",
        forget=advised[0] if advised else f"ssh-keygen -R '{known}'",
        fingerprint=_fingerprint(said),
        said=_quote(said),
    )


def _fingerprint(said: str) -> str:
    found = re.search(r"fingerprint for .*? is\s+(\S+)\.\s", said)
    return f" ({found[1]})" if found else ""


def _quote(text: str) -> str:
    """What ssh said, in one line."""
    lines = [line.strip().removeprefix("ssh: ") for line in text.splitlines()]
    said = " ".join(line for line in lines if line and not line.startswith("@"))
    if len(said) > _SHOWN:
        said = "… " + said[-_SHOWN:]
    return f" (ssh: {said})" if said else ""
