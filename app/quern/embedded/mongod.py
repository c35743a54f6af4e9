"""mongod as a one-node replica set on a UNIX socket: transactions and change streams without a TCP port."""

import os
import secrets
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pymongo import MongoClient
from pymongo.errors import OperationFailure, PyMongoError

from quern.embedded.ports import free_port
from quern.embedded.process import ChildProcess
from quern.embedded.provision import mongod_binary

_REPLICA_SET = "rs0"
_SOCKET_PATH_LIMIT = 107
_ALREADY_INITIALIZED = 23
_INVALID_REPLICA_SET_CONFIG = 93
_UNAUTHORIZED = 13
_OWNER = "owner"


class Mongod(ChildProcess):
    """A one-node replica set that keeps its data in `directory` and listens on `socket`.

    The member's name in the replica set is the socket's path, so that no TCP port is needed; `tcp` adds one on
    loopback. `cache_gigabytes` bounds WiredTiger's cache. Clients made before the first start had ended see no
    sessions: use `uri` after `start`. With `guarded` every client must say who it is, and `uri` is the owner's, which
    may do anything; its password lives as long as this object.
    """

    def __init__(
        self,
        directory: Path,
        *,
        socket: Path | None = None,
        tcp: bool = False,
        cache_gigabytes: float = 0.25,
        oplog_megabytes: int = 512,
        guarded: bool = False,
    ) -> None:
        self.socket = socket or directory / "mongod.sock"
        if len(os.fsencode(self.socket)) > _SOCKET_PATH_LIMIT:
            raise ValueError(
                f"mongod: expected a socket path of at most {_SOCKET_PATH_LIMIT} bytes, found {self.socket}; "
                "pass a shorter `socket`"
            )
        self.directory = directory
        self.port = free_port() if tcp else None
        data = directory / "data"
        for folder in (data, self.socket.parent):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._password = secrets.token_hex(16) if guarded else ""
        self._owned = not guarded
        if guarded:
            key = directory / "keyfile"
            key.touch(mode=0o600)
            key.write_text(secrets.token_hex(60))
        addresses = [str(self.socket)] if self.port is None else ["127.0.0.1", str(self.socket)]
        super().__init__(
            "mongod",
            [
                mongod_binary(),
                *("--dbpath", data, "--replSet", _REPLICA_SET, "--bind_ip", ",".join(addresses)),
                *("--port", str(self.port or 27017)),
                # Without this, mongod makes a second socket in /tmp, named after the port: two would collide.
                *("--nounixsocket", "--filePermissions", "0600"),
                *("--wiredTigerCacheSizeGB", str(cache_gigabytes), "--oplogSize", str(oplog_megabytes)),
                *("--quiet", "--setParameter", "diagnosticDataCollectionEnabled=false"),
                # What a process that was killed inside a transaction had locked is free again after half as much more.
                *("--setParameter", "transactionLifetimeLimitSeconds=20"),
                *(("--keyFile", directory / "keyfile") if guarded else ()),
            ],
            log=directory / "mongod.log",
            ready=self._is_primary,
        )

    @property
    def uri(self) -> str:
        """A connection string over the UNIX socket.

        The replica set's name makes a client that looks at a restarting mongod wait until its configuration is loaded.
        A client that has not yet noticed the restart can still meet a server "without sessions" (ConfigurationError)
        for a moment: to it that means away, not misconfigured.
        """
        return (
            self.uri_of(_OWNER, self._password) if self._password else f"{self._direct_uri}&replicaSet={_REPLICA_SET}"
        )

    def uri_of(self, account: str, password: str) -> str:
        """As `uri`, for one of the accounts of a guarded server."""
        address = f"mongodb://{account}:{password}@{quote(str(self.socket), safe='')}"
        return f"{address}/?directConnection=true&authSource=admin&replicaSet={_REPLICA_SET}"

    @property
    def tcp_uri(self) -> str:
        """A connection string over loopback TCP. Raises ValueError when the server was made without it."""
        if self.port is None:
            raise ValueError("mongod: expected a server with a TCP port, found none; make it with tcp=True")
        return f"mongodb://127.0.0.1:{self.port}/?directConnection=true&replicaSet={_REPLICA_SET}"

    @property
    def _direct_uri(self) -> str:
        return f"mongodb://{quote(str(self.socket), safe='')}/?directConnection=true"

    def _is_primary(self) -> bool:
        if not self.socket.exists():
            return False
        try:
            with MongoClient[dict[str, Any]](self._direct_uri, serverSelectionTimeoutMS=2000) as client:
                hello = client.admin.command("hello")
                if hello.get("isWritablePrimary"):
                    self._own(client)
                    return True
                if "setName" not in hello:
                    self._join_set(client)
                return False
        except OperationFailure:
            raise
        except PyMongoError:
            return False

    def _own(self, client: MongoClient[dict[str, Any]]) -> None:
        """Make the owner of a guarded server, as it allows a local client once (the localhost exception)."""
        if not self._owned:
            client.admin.command("createUser", _OWNER, pwd=self._password, roles=["root"])
            self._owned = True

    def _join_set(self, client: MongoClient[dict[str, Any]]) -> None:
        member = str(self.socket)
        try:
            client.admin.command("replSetInitiate", {"_id": _REPLICA_SET, "members": [{"_id": 0, "host": member}]})
        except OperationFailure as error:
            if error.code == _UNAUTHORIZED and self._owned:
                # It is in one, whose configuration it is still reading.
                return
            if error.code != _ALREADY_INITIALIZED:
                raise
        else:
            return
        try:
            client.admin.command("replSetGetStatus")
        except OperationFailure as error:
            if error.code != _INVALID_REPLICA_SET_CONFIG:
                return
            # The data was last served under another socket path: the member takes its new name.
            config = client.local["system.replset"].find_one()
            if config is None or config["members"][0]["host"] == member:
                return
            config["members"][0]["host"] = member
            config["version"] += 1
            client.admin.command("replSetReconfig", config, force=True)
