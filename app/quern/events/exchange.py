"""One request and its answer, from the outside: what it holds is let go, and a client that does not read is cut off.

An ASGI server tells an application nothing of the socket, and closing a connection in the orderly way waits until the
client has read what was written, which a stuck one never does. So the listening socket remembers each connection in a
context variable, which asyncio hands on to every task that serves this connection.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from contextvars import ContextVar
from typing import Any, Final, cast

from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, Scope

from quern.events import metrics

App = Callable[[Scope, ASGIReceiveCallable, ASGISendCallable], Awaitable[None]]

_connection: ContextVar[socket.socket | None] = ContextVar("connection", default=None)
_HELD: Final = "quern.held"


class Listener(socket.socket):
    """A listening socket whose connections can be cut by the tasks that serve them."""

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection; tasks that the event loop starts for it inherit the context set here."""
        connection, address = super().accept()
        _connection.set(connection)
        return connection, address


def held(scope: Scope) -> AsyncExitStack:
    """What this request holds. It is let go when the answer has ended, in whichever way: also before it began."""
    stack: AsyncExitStack = cast(dict[str, Any], scope)[_HELD]
    return stack


class Exchange:
    """ASGI middleware around `app`; `send_timeout` in seconds."""

    def __init__(self, app: App, send_timeout: float) -> None:
        self._app = app
        self._send_timeout = send_timeout

    async def __call__(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_or_cut(message: ASGISendEvent) -> None:
            try:
                async with asyncio.timeout(self._send_timeout):
                    await send(message)
            except TimeoutError:
                if connection := _connection.get():
                    metrics.CUT.inc()
                    connection.shutdown(socket.SHUT_RDWR)
                raise

        async with AsyncExitStack() as stack:
            cast(dict[str, Any], scope)[_HELD] = stack
            await self._app(scope, receive, send_or_cut)
