"""Free TCP ports on loopback."""

import socket


def free_port(preferred: int | None = None) -> int:
    """`preferred` when nothing listens there, else a port that the kernel had free a moment ago."""
    for candidate in (preferred, 0):
        if candidate is None:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", candidate))
            except OSError:
                continue
            port: int = probe.getsockname()[1]
            return port
    raise OSError("no free TCP port on 127.0.0.1")
