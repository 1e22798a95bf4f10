"""What a connection is told that answers come through: when to wake its reader, when to give its host up."""

import socket
import time

# A host that has vanished without a word is asked every 10 seconds whether it is there, and given up after the sixth.
_ASK_AFTER = (("TCP_KEEPIDLE", 30), ("TCP_KEEPALIVE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6))


def keep_alive(connection: socket.socket) -> None:
    """Notice a host that has vanished, however long an answer may take."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _ASK_AFTER:
        if hasattr(socket, name):  # TCP_KEEPALIVE is macOS's name of the first
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Gatherer:
    """Lets the system gather some text before it wakes the reader, once it is known how fast text comes.

    Where every core computes the next token, each wake-up of the reader costs the model time.
    """

    AFTER_CHUNKS = 16

    def __init__(self, connection: socket.socket, seconds: float):
        self._socket, self._seconds = connection, seconds
        self._chunks = self._bytes = 0
        self._since = time.perf_counter()

    def took(self, num_bytes: int) -> None:
        """Count a chunk, and now and then set how many bytes to wait for; the end of the answer always wakes."""
        self._chunks, self._bytes = self._chunks + 1, self._bytes + num_bytes
        if self._seconds and self._chunks == self.AFTER_CHUNKS:
            now = time.perf_counter()
            wanted = int(self._bytes / (now - self._since) * self._seconds)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, max(1, min(wanted, 4096)))
            self._chunks, self._bytes, self._since = 0, 0, now
