"""redis-server on a UNIX socket, in Quern's two roles: `queue` (durable, never evicts) and `cache` (may forget)."""

import os
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from redis import Redis
from redis.exceptions import RedisError

from quern.embedded.process import ChildProcess
from quern.embedded.provision import redis_server_binary

Role = Literal["queue", "cache"]
Fsync = Literal["always", "everysec"]


class RedisServer(ChildProcess):
    """One instance that keeps its files and its socket in `directory`.

    `fsync` is the queue's append-only-file policy; `memory_megabytes` bounds the data. With `guarded` accounts that are
    made and saved (ACL SAVE) outlive a restart.
    """

    def __init__(
        self,
        directory: Path,
        *,
        role: Role,
        fsync: Fsync = "everysec",
        socket: Path | None = None,
        memory_megabytes: int = 256,
        guarded: bool = False,
    ) -> None:
        self.directory = directory
        self.socket = socket or directory / "redis.sock"
        for folder in (directory, self.socket.parent):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        binary = directory / "redis-server"
        if binary.is_symlink():
            binary.unlink()
        binary.symlink_to(redis_server_binary())
        if role == "queue":
            policy = ["--maxmemory-policy", "noeviction", "--appendonly", "yes", "--appendfsync", fsync]
        else:
            policy = ["--maxmemory-policy", "allkeys-lru", "--appendonly", "no"]
        if guarded:
            accounts = directory / "users.acl"
            accounts.touch(mode=0o600)
            policy += ["--aclfile", os.fspath(accounts)]
        super().__init__(
            f"redis-server ({role})",
            [
                binary,
                *("--port", "0", "--unixsocket", self.socket, "--unixsocketperm", "600", "--dir", directory),
                *("--daemonize", "no", "--save", "", "--databases", "1"),
                *("--maxmemory", f"{memory_megabytes}mb", *policy),
            ],
            log=directory / "redis.log",
            ready=self._answers,
        )

    @property
    def url(self) -> str:
        """A `unix://` URL as `redis.Redis.from_url` takes it."""
        return f"unix://{quote(os.fspath(self.socket.absolute()))}"

    def _answers(self) -> bool:
        try:
            with Redis.from_url(self.url, socket_timeout=2) as client:
                return bool(client.ping())
        except RedisError:
            return False
