"""The connection to MongoDB of an asyncio process, made again when its credentials change."""

import asyncio

from pymongo import AsyncMongoClient
from pymongo.asynchronous.database import AsyncDatabase

from quern.config import LiveSettings
from quern.store.connection import Document


class AsyncStore:
    """Reads only, and only what a majority has journaled: an event once sent is never taken back by a crash."""

    def __init__(self, live: LiveSettings) -> None:
        self._live = live
        self._client: AsyncMongoClient[Document] | None = None
        self._uri = ""
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def db(self) -> AsyncDatabase[Document]:
        """The database as of now. Call it from the event loop, and again for each piece of work."""
        settings = self._live.get()
        uri = settings.mongodb_uri.get_secret_value()
        if self._client is None or uri != self._uri:
            if self._client is not None:
                task = asyncio.create_task(self._client.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
            self._uri = uri
            self._client = AsyncMongoClient(
                uri,
                readConcernLevel="majority",
                tz_aware=True,
                # As quern.store.connection.
                serverSelectionTimeoutMS=4000,
                connectTimeoutMS=10_000,
                maxPoolSize=16,
                appname="quern-events",
            )
        return self._client[settings.mongodb_database]

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.close()
        await asyncio.gather(*self._closing)
