"""A link between ssh and a board that can be slow, stall, or break."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time

_PIECE_BYTES = 16 * 1024
_PATIENCE_S = 60
# Closing with a linger time of 0 s resets the connection: either side notices at once.
_RESET = struct.pack("ii", 1, 0)


class Link:
    """Hands connections to a local port on to another one.

    Attributes:
        port: where it listens.
        connections: that clients made so far.
        sent_bytes: that clients sent so far.
        cuts: connections that it broke so far.
    """

    def __init__(self, to_port: int) -> None:
        self._to_port = to_port
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._moving = threading.Event()
        self._moving.set()
        self._bytes_per_s: float | None = None
        self._cut_every_bytes = 0
        self._cut_at_bytes = 0
        self._cuts_left = 0
        self.connections = 0
        self.sent_bytes = 0
        self.cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def throttle(self, bytes_per_s: float | None) -> None:
        """Hand on so many bytes a second from the client to the board; None: as they come."""
        self._bytes_per_s = bytes_per_s

    def cut_after(self, sent_bytes: int, times: int = 1) -> None:
        """Break the connection that brings what clients sent from now on to so many bytes.

        Args:
            sent_bytes: ssh's greeting, key exchange and login take about 3 KB of them.
            times: after so many breaks, with as many bytes between them, it holds.
        """
        with self._lock:
            self._cut_every_bytes, self._cuts_left = sent_bytes, times
            self._cut_at_bytes = self.sent_bytes + sent_bytes

    def cut(self) -> None:
        """Break every connection now."""
        with self._lock:
            self.cuts += bool(self._open)
            for end in list(self._open):
                self._close_end(end, reset=True)

    def stall(self) -> None:
        """Hand nothing on, in either direction, but break nothing."""
        self._moving.clear()

    def resume(self) -> None:
        """End a stall."""
        self._moving.set()

    def wait_until_closed(self) -> None:
        """Wait until either side has closed every connection."""
        deadline = time.monotonic() + _PATIENCE_S
        while self._open:
            assert time.monotonic() < deadline, "a connection is still open"
            time.sleep(0.01)

    def close(self) -> None:
        """Break every connection, and accept none any more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        self.resume()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                board = socket.create_connection(("127.0.0.1", self._to_port))
            except OSError:
                return
            with self._lock:
                self.connections += 1
                self._open |= {client, board}
            for source, sink, sends in ((client, board, True), (board, client, False)):
                threading.Thread(target=self._pump, args=(source, sink, sends), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, sends: bool) -> None:
        """Hand on what one side says, until it says no more."""
        broken = False
        try:
            while not broken and (piece := source.recv(_PIECE_BYTES)):
                self._moving.wait()
                whole = len(piece)
                if sends:
                    piece = self._counted(piece)
                    if self._bytes_per_s:
                        time.sleep(len(piece) / self._bytes_per_s)
                sink.sendall(piece)
                broken = len(piece) < whole
        except OSError:  # reset by either side, or by `cut`
            broken = True
        with self._lock:
            for end in (source, sink):
                self._close_end(end, reset=broken)

    def _counted(self, piece: bytes) -> bytes:
        """Count what a client sends; return less of it where the connection breaks there."""
        with self._lock:
            left = self._cut_at_bytes - self.sent_bytes
            if self._cuts_left and left < len(piece):
                piece = piece[:left]
                self.cuts += 1
                self._cuts_left -= 1
                self._cut_at_bytes += self._cut_every_bytes
            self.sent_bytes += len(piece)
            return piece

    def _close_end(self, end: socket.socket, *, reset: bool) -> None:
        with contextlib.suppress(OSError):
            if reset:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            end.shutdown(socket.SHUT_RDWR)
        end.close()
        self._open.discard(end)
