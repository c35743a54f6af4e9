"""The connection to MongoDB: one client a process, made again when its credentials change."""

import os
import threading
from typing import Any

from pymongo import MongoClient, WriteConcern
from pymongo.collection import Collection
from pymongo.database import Database
from pymongo.errors import (
    AutoReconnect,
    ConfigurationError,
    ConnectionFailure,
    ExecutionTimeout,
    NetworkTimeout,
    NotPrimaryError,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
    WTimeoutError,
)

from quern.config import LiveSettings, Settings

Document = dict[str, Any]
Db = Database[Document]
Coll = Collection[Document]

#: For what may be lost in a power cut and is made again: claims, turns, heartbeats.
EPHEMERAL = WriteConcern(w=1, j=False)

_AWAY = (
    ServerSelectionTimeoutError,
    NetworkTimeout,
    NotPrimaryError,
    AutoReconnect,
    ConnectionFailure,
    ExecutionTimeout,
    WTimeoutError,
)


def is_away(error: BaseException) -> bool:
    """Whether the database is out of reach, so that the same request may succeed a little later."""
    if isinstance(error, _AWAY):
        return True
    if isinstance(error, ConfigurationError):
        # A client that has not noticed yet that mongod restarts believes that it cannot do sessions.
        return "Sessions are not supported" in str(error)
    if isinstance(error, OperationFailure) and error.code in (91, 11600, 11602, 189, 10107, 13435, 13436, 262, 24):
        return True
    return isinstance(error, PyMongoError) and (error.timeout or error.has_error_label("TransientTransactionError"))


def connect(settings: Settings) -> MongoClient[Document]:
    """A client whose writes are acknowledged by the journal of a majority, and which gives up soon.

    A request has a time limit of its own (`pymongo.timeout`): what is set here lies within it where mongod is gone, and
    lets a mongod that is only slow, on a starved machine, take a connection in nevertheless. For a check that came too
    late would count as its absence, and every request would be refused until the next.
    """
    return MongoClient(
        settings.mongodb_uri.get_secret_value(),
        w="majority",
        journal=True,
        readConcernLevel="local",
        tz_aware=True,
        retryWrites=True,
        serverSelectionTimeoutMS=4000,
        connectTimeoutMS=10_000,
        appname="quern",
    )


class Store:
    """The database of this process.

    Safe over `fork`: a child makes its own client. Safe over rotation: a changed URI makes a new client, and the old
    one closes when the threads that hold it are done with it.
    """

    def __init__(self, live: LiveSettings) -> None:
        self._live = live
        self._lock = threading.Lock()
        self._client: MongoClient[Document] | None = None
        self._db: Db | None = None
        self._uri = ""
        self._pid = 0

    @property
    def settings(self) -> Settings:
        return self._live.get()

    def redis_queue_url(self) -> str:
        """Where Redis `queue` is, as of now."""
        return self._live.get().redis_queue_url.get_secret_value()

    @property
    def client(self) -> MongoClient[Document]:
        settings = self._live.get()
        uri = settings.mongodb_uri.get_secret_value()
        client = self._client
        if client is None or self._pid != os.getpid() or self._uri != uri:
            with self._lock:
                client = self._client
                if client is None or self._pid != os.getpid() or self._uri != uri:
                    client = self._client = connect(settings)
                    self._uri, self._pid = uri, os.getpid()
        return client

    @property
    def db(self) -> Db:
        client, name, db = self.client, self._live.get().mongodb_database, self._db
        if db is None or db.client is not client or db.name != name:
            db = self._db = client[name]
        return db
