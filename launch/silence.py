"""A host at the other end of a connection that answers no more: noticed by the kernel, on both sides."""

from __future__ import annotations

import errno
import socket

SILENT_SECONDS = (10, 5, 3)
"""TCP keep-alive: asked after so many idle seconds, then every so many, given up after so many questions.

As long in all is waited for the receipt of what was sent, of which keep-alive knows nothing: without a limit of its own
that is tried again for a quarter of an hour.
"""


def is_silence(error: OSError) -> bool:
    """Whether the other side just does not answer; else its process has ended."""
    return error.errno in (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)


def notice_silence(connection: socket.socket) -> None:
    """Have the kernel end a connection whose other side answers no more (tcp(7))."""
    idle, interval, count = SILENT_SECONDS
    limit = (idle + interval * count) * 1000
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": idle, "TCP_KEEPINTVL": interval, "TCP_KEEPCNT": count, "TCP_USER_TIMEOUT": limit}
    for name, value in options.items():
        if hasattr(socket, name):  # macOS has other names
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
