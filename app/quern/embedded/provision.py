"""Fetch and check what the embedded services run: `python -m quern.embedded.provision`."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from quern.embedded.mongod import mongod_binary
from quern.embedded.nginx import nginx_binary
from quern.embedded.redis_server import redis_server_binary

_SERVICES: tuple[tuple[str, Callable[[], Path]], ...] = (
    ("mongod", mongod_binary),
    ("redis-server", redis_server_binary),
    ("nginx", nginx_binary),
)


def main() -> int:
    """Print one line per service and return 0, or say what is missing and return 1."""
    for name, binary in _SERVICES:
        try:
            path = binary()
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            print(error, file=sys.stderr)
            return 1
        print(f"{name}: {path}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
