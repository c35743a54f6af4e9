"""nginx as the front door: event streams go to the events service, everything else to the API, over UNIX sockets."""

import getpass
import os
import re
import signal
import socket
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from quern.embedded.ports import free_port
from quern.embedded.process import ChildProcess
from quern.embedded.provision import nginx_binary

EVENT_STREAMS = (r"^/api/v1/jobs/[^/]+/events$",)


class Nginx(ChildProcess):
    """Listens on one loopback port; everything it writes stays in `directory`.

    `event_streams` are regular expressions (PCRE) of paths that are served unbuffered by `events_socket`, as `/v1` is.
    Bodies over `body_megabytes` (under `/v1`: `file_megabytes`) are refused before the API sees them, and so is
    everything while an upstream is away; both with an error in the form of the path. The port stays the same over
    restarts; `port` is only a wish.
    """

    def __init__(
        self,
        directory: Path,
        *,
        api_socket: Path,
        events_socket: Path,
        event_streams: Sequence[str] = EVENT_STREAMS,
        port: int | None = None,
        body_megabytes: int = 2,
        file_megabytes: int = 40,
    ) -> None:
        self.directory = directory
        self.port = free_port(port)
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for pattern in event_streams:
            if re.search(r'["\s;]', pattern):
                raise ValueError(f"nginx: expected a pattern without quotes, spaces or semicolons, found {pattern!r}")
        templates = Environment(
            loader=PackageLoader("quern.embedded", "templates"),
            undefined=StrictUndefined,
            autoescape=False,  # noqa: S701 - an nginx configuration, not HTML
            trim_blocks=True,
            lstrip_blocks=True,
        )
        configuration = directory / "nginx.conf"
        configuration.write_text(
            templates.get_template("nginx.conf").render(
                # nginx started as root would give its workers to an account that cannot reach the private sockets.
                user=getpass.getuser() if os.geteuid() == 0 else None,
                directory=directory.absolute(),
                port=self.port,
                api_socket=api_socket.absolute(),
                events_socket=events_socket.absolute(),
                event_streams=event_streams,
                body_megabytes=body_megabytes,
                file_megabytes=file_megabytes,
            )
        )
        super().__init__(
            "nginx",
            [nginx_binary(), "-p", directory, "-e", "stderr", "-c", configuration],
            log=directory / "nginx.log",
            ready=self._accepts,
            # On SIGKILL the master's workers would live on and hold the port.
            death_signal=signal.SIGTERM,
        )

    @property
    def url(self) -> str:
        """The base URL, without a trailing slash."""
        return f"http://127.0.0.1:{self.port}"

    def _accepts(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=2):
                return True
        except OSError:
            return False
