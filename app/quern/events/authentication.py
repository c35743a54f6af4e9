"""Who is asking. The check itself is handed in, so that this edge shares it with the API."""

from collections.abc import Awaitable, Callable
from typing import Protocol

from quern.events.problem import ProblemError


class Principal(Protocol):
    """What the edge needs to know of a caller; `quern.tenants.keys.Principal` is one."""

    @property
    def tenant(self) -> str: ...

    @property
    def scopes(self) -> frozenset[str]: ...


Authenticate = Callable[[str | None], Awaitable[Principal | None]]
"""From an Authorization header to the caller, or None. Raises PyMongoError while the database is away."""


async def allowed(authenticate: Authenticate, header: str | None, scope: str) -> Principal:
    """The caller, when its key is good and has `scope`.

    Raises:
        ProblemError: 401 or 403.
    """
    principal = await authenticate(header)
    if principal is None:
        raise ProblemError(
            401, "Expected a valid API key in `Authorization: Bearer …`.", {"WWW-Authenticate": 'Bearer realm="quern"'}
        )
    if scope not in principal.scopes:
        raise ProblemError(403, f"The key lacks the scope {scope}.")
    return principal
