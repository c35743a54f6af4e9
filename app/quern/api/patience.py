"""How long a client may take to send a request, when it is not nginx that speaks to us.

Gunicorn's threads read from blocking sockets, so a few clients that send a byte now and then could hold them all. A
request that has not arrived whole after RECEIVE_SECONDS is cut off by the worker's main loop.
"""

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from gunicorn.workers.gthread import ThreadWorker

RECEIVE_SECONDS: Final = 20.0
#: A client that reads nothing of its answer for so long is left.
SEND_SECONDS: Final = 30

_deadlines: dict[socket.socket, float] = {}
_lock = threading.Lock()


@contextmanager
def receiving(connection: socket.socket | None) -> Iterator[None]:
    """Bounds what is read inside; `connection` is None where no worker of ours serves."""
    if connection is None:
        yield
        return
    with _lock:
        _deadlines[connection] = time.monotonic() + RECEIVE_SECONDS
    try:
        yield
    finally:
        with _lock:
            _deadlines.pop(connection, None)


def cut_off_late() -> None:
    """Shut the connections whose request is late; whoever reads from them sees their end."""
    now = time.monotonic()
    with _lock:
        late = [connection for connection, deadline in _deadlines.items() if deadline < now]
        for connection in late:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                # The client was faster.
                continue


class Worker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """Gunicorn's threaded worker, with bounds on slow clients."""

    def handle(self, conn: Any) -> Any:
        """Read a request's head, within its time, and have it answered."""
        conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_SECONDS, 0))
        conn.head = receiving(conn.sock)
        conn.head.__enter__()
        try:
            return super().handle(conn)
        finally:
            self._head_is_read(conn)

    def handle_request(self, req: Any, conn: Any) -> Any:
        """Answer a request whose head is read."""
        self._head_is_read(conn)
        return super().handle_request(req, conn)

    @staticmethod
    def _head_is_read(conn: Any) -> None:
        if (head := conn.head) is not None:
            conn.head = None
            head.__exit__(None, None, None)

    def murder_keepalived(self, force: bool = False) -> None:
        """Called about once a second by the main loop."""
        cut_off_late()
        super().murder_keepalived(force)
