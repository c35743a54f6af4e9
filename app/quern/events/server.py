"""The process: Hypercorn over one socket, until SIGTERM or SIGINT; streams then end with a hint to come back."""

import asyncio
import logging
import resource
import signal
from typing import Final

from hypercorn.asyncio import serve as serve_asgi
from hypercorn.config import Config, Sockets
from quart import Quart

from quern.config import LiveSettings
from quern.events.app import create_app
from quern.events.authentication import Authenticate
from quern.events.edge import Edge
from quern.events.exchange import Listener
from quern.runtime import Runtime

_log = logging.getLogger(__name__)

_SPARE_DESCRIPTORS: Final = 200


class _Config(Config):
    def create_sockets(self) -> Sockets:
        made = super().create_sockets()
        listeners = [Listener(fileno=plain.detach()) for plain in made.insecure_sockets]
        return Sockets(secure_sockets=[], insecure_sockets=list(listeners), quic_sockets=[])


def main(live: LiveSettings, authenticate: Authenticate, runtime: Runtime | None = None) -> None:
    """Serve until told to stop. `event_bind` may be `unix:/path` (mode 0660), `host:port` or `fd://3` (systemd).

    Raises:
        RuntimeError: there are too few file descriptors for the streams that the settings allow.
    """
    _raise_descriptor_limit(live.get().event.max_streams + _SPARE_DESCRIPTORS)
    asyncio.run(serve(create_app(live, authenticate, runtime), live.get().events_bind))


async def serve(app: Quart, bind: str) -> None:
    """Serve `app` on `bind` until SIGTERM or SIGINT, then let its streams end."""
    edge: Edge = app.extensions["edge"]
    config = _Config()
    config.bind = [bind]
    config.umask = 0o117
    config.backlog = 2048
    config.accesslog = None
    config.errorlog = logging.getLogger("hypercorn.error")
    config.include_server_header = False
    # A client that does not read is cut off after `send_timeout`; only then is everybody gone.
    config.graceful_timeout = edge.settings.send_timeout + 1

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    async def stopped() -> None:
        await stop.wait()
        edge.hub.drain()

    await serve_asgi(app, config, shutdown_trigger=stopped)


def _raise_descriptor_limit(needed: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise RuntimeError(
            f"expected room for {needed} file descriptors, found a hard limit of {hard}; "
            f"set LimitNOFILE={needed} in the unit, or a smaller QUERN_EVENT__MAX_STREAMS"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
