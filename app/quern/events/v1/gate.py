"""A body is not read before somebody may send it: until then it stays in the socket, not in this process's memory.

Quart reads a request's body while its handler runs, whoever sent it. Here the first message of a body waits until the
handler has looked at the key and opens the gate.

An answer that comes before its request was read (401, 413) waits until the rest has come, and been thrown away: whoever
still sends, nginx for one, would meet a closed connection instead of the answer.
"""

import asyncio
from contextlib import suppress
from typing import Any, Final, cast

from hypercorn.typing import ASGIReceiveCallable, ASGIReceiveEvent, ASGISendCallable, ASGISendEvent, Scope

from quern.events.exchange import App

_GATE: Final = "quern.gate"
_DRAIN_SECONDS: Final = 5.0


class Gate:
    """ASGI middleware around `app` for the paths below `prefix`."""

    def __init__(self, app: App, prefix: str) -> None:
        self._app, self._prefix = app, prefix

    async def __call__(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(self._prefix):
            await self._app(scope, receive, send)
            return
        gate, whole, answering = asyncio.Event(), asyncio.Event(), asyncio.Event()
        cast(dict[str, Any], scope)[_GATE] = gate

        async def gated() -> ASGIReceiveEvent:
            await gate.wait()
            while True:
                message = await receive()
                if message["type"] != "http.request" or not message["more_body"]:
                    whole.set()
                    return message
                if not answering.is_set():
                    return message

        async def drained(message: ASGISendEvent) -> None:
            if message["type"] == "http.response.start" and not whole.is_set():
                answering.set()
                gate.set()
                # Quart goes on asking for the body until its handler has ended.
                with suppress(TimeoutError):
                    await asyncio.wait_for(whole.wait(), _DRAIN_SECONDS)
            await send(message)

        await self._app(scope, gated, drained)


def open_gate(scope: Scope) -> None:
    """Let the body in."""
    gate: asyncio.Event = cast(dict[str, Any], scope)[_GATE]
    gate.set()
