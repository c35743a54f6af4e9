"""Joins the event service to the API's own check of keys."""

import asyncio
from collections.abc import Awaitable, Callable

from quern.runtime import Runtime
from quern.tenants.keys import Principal


def authenticator(runtime: Runtime) -> Callable[[str | None], Awaitable[Principal | None]]:
    """The check of keys, off the event loop: it may ask the database."""

    async def authenticate(header: str | None) -> Principal | None:
        return await asyncio.to_thread(runtime.authenticate, runtime.store.db, header)

    return authenticate
