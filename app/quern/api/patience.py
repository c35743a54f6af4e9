"""How long a client may take to send a request, when it is not nginx that speaks to us.

Gunicorn's threads read from blocking sockets, so a few clients that send a byte now and then could hold them all. A
request that has not arrived whole in time (QUERN_API_RECEIVE_SECONDS) is cut off by the worker's main loop.
"""

import select
import socket
import struct
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

#: Seconds that a thread waits for the next request on a connection that it has answered, while nobody waits for it.
STAY_SECONDS: Final = 0.005

_deadlines: dict[socket.socket, float] = {}


@contextmanager
def receiving(connection: socket.socket | None, seconds: float) -> Iterator[None]:
    """Bounds what is read inside; `connection` is None where no worker of ours serves."""
    if connection is None:
        yield
        return
    _deadlines[connection] = time.monotonic() + seconds
    try:
        yield
    finally:
        _deadlines.pop(connection, None)


def cut_off_late() -> None:
    """Shut the connections whose request is late; whoever reads from them sees their end."""
    now = time.monotonic()
    # A copy, made in one step of the interpreter: the threads that serve come and go meanwhile, without a lock.
    for connection, deadline in list(_deadlines.items()):
        if deadline < now and _deadlines.get(connection) == deadline:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                # The client was faster.
                continue


class Worker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """Gunicorn's threaded worker, with bounds on slow clients.

    A thread that has answered stays with its connection for a moment. The next request of a client that sends one after
    the other, or of a proxy that keeps its connections, then needs neither the poller nor the pool: two hand-overs
    between threads less.
    """

    receive_seconds = 20.0

    def handle(self, conn: Any) -> Any:
        """Answer a request, and those that follow on its connection while they come at once."""
        kept = self._handle_one(conn)
        while kept is True and self._stays(conn):
            kept = self._handle_one(conn)
        return kept

    def _stays(self, conn: Any) -> bool:
        """Whether the next request of a connection is there, or comes before anybody else needs this thread."""
        if not self.alive or conn.is_http2 or conn.parser.unreader.buf.getvalue() or self.tpool._work_queue.qsize():
            return False
        ready = select.poll()
        ready.register(conn.sock, select.POLLIN)
        return bool(ready.poll(1000 * STAY_SECONDS))

    def _handle_one(self, conn: Any) -> Any:
        """Read a request's head, within its time, and have it answered."""
        if not conn.initialized:
            conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_SECONDS, 0))
        _deadlines[conn.sock] = time.monotonic() + self.receive_seconds
        try:
            return super().handle(conn)
        finally:
            _deadlines.pop(conn.sock, None)

    def handle_request(self, req: Any, conn: Any) -> Any:
        """Answer a request whose head is read."""
        _deadlines.pop(conn.sock, None)
        return super().handle_request(req, conn)

    def _keepalive_after(self, conn: Any, keepalive: Any) -> bool:
        # An answer may come before the body was read (401, 413). Whoever still sends, nginx for one, would meet a
        # reset instead of the answer if the connection were closed on it.
        if keepalive and getattr(conn.parser.mesg.body.reader, "length", None) == 0:
            # It was read whole: nothing to look for on the socket.
            return True
        drained = conn.parser.finish_body(deadline=time.monotonic() + DRAIN_SECONDS, max_bytes=DRAIN_BYTES)
        return bool(keepalive and drained)

    def murder_keepalived(self, force: bool = False) -> None:
        """Called about once a second by the main loop."""
        cut_off_late()
        super().murder_keepalived(force)


def worker_class(receive_seconds: float) -> type[Worker]:
    """The worker with a client's time to send a request."""
    return type("BoundedWorker", (Worker,), {"receive_seconds": receive_seconds})
