"""A body is not read before somebody may send it: until then it stays in the socket, not in this process's memory.

Quart reads a request's body while its handler runs, whoever sent it. Here the first message of a body waits until the
handler has looked at the key and opens the gate.
"""

import asyncio
from typing import Any, Final, cast

from hypercorn.typing import ASGIReceiveCallable, ASGIReceiveEvent, ASGISendCallable, Scope

from quern.events.exchange import App

_GATE: Final = "quern.gate"


class Gate:
    """ASGI middleware around `app` for the paths below `prefix`."""

    def __init__(self, app: App, prefix: str) -> None:
        self._app, self._prefix = app, prefix

    async def __call__(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(self._prefix):
            await self._app(scope, receive, send)
            return
        gate = asyncio.Event()
        cast(dict[str, Any], scope)[_GATE] = gate

        async def gated() -> ASGIReceiveEvent:
            await gate.wait()
            return await receive()

        await self._app(scope, gated, send)


def open_gate(scope: Scope) -> None:
    """Let the body in."""
    gate: asyncio.Event = cast(dict[str, Any], scope)[_GATE]
    gate.set()
