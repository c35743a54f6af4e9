"""How long a client may take to send a request, when it is not nginx that speaks to us.

Gunicorn's threads read from blocking sockets, so a few clients that send a byte now and then could hold them all. A
request that has not arrived whole in time (QUERN_API_RECEIVE_SECONDS) is cut off by the worker's main loop.
"""

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from gunicorn.workers.gthread import ThreadWorker

#: A client that reads nothing of its answer for so long is left.
SEND_SECONDS: Final = 30

#: How much of a body that nobody wants is read so that its sender sees the answer, and for how long.
DRAIN_BYTES: Final = 4 * 1_048_576
DRAIN_SECONDS: Final = 5.0

_deadlines: dict[socket.socket, float] = {}
_lock = threading.Lock()


@contextmanager
def receiving(connection: socket.socket | None, seconds: float) -> Iterator[None]:
    """Bounds what is read inside; `connection` is None where no worker of ours serves."""
    if connection is None:
        yield
        return
    with _lock:
        _deadlines[connection] = time.monotonic() + seconds
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

    receive_seconds = 20.0

    def handle(self, conn: Any) -> Any:
        """Read a request's head, within its time, and have it answered."""
        conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_SECONDS, 0))
        conn.head = receiving(conn.sock, self.receive_seconds)
        conn.head.__enter__()
        try:
            return super().handle(conn)
        finally:
            self._head_is_read(conn)

    def handle_request(self, req: Any, conn: Any) -> Any:
        """Answer a request whose head is read."""
        self._head_is_read(conn)
        return super().handle_request(req, conn)

    def _keepalive_after(self, conn: Any, keepalive: Any) -> bool:
        # An answer may come before the body was read (401, 413). Whoever still sends, nginx for one, would meet a
        # reset instead of the answer if the connection were closed on it.
        drained = conn.parser.finish_body(deadline=time.monotonic() + DRAIN_SECONDS, max_bytes=DRAIN_BYTES)
        return bool(keepalive and drained)

    @staticmethod
    def _head_is_read(conn: Any) -> None:
        if (head := conn.head) is not None:
            conn.head = None
            head.__exit__(None, None, None)

    def murder_keepalived(self, force: bool = False) -> None:
        """Called about once a second by the main loop."""
        cut_off_late()
        super().murder_keepalived(force)


def worker_class(receive_seconds: float) -> type[Worker]:
    """The worker with a client's time to send a request."""
    return type("BoundedWorker", (Worker,), {"receive_seconds": receive_seconds})
