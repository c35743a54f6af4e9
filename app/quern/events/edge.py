"""What every waiting route is given: who may ask, how many may wait, and what wakes them.

A new kind of waiting (a long poll, a streamed completion) is a blueprint over an `Edge`, registered in `app`.
"""

from dataclasses import dataclass

from quart import request

from quern.events.admission import Places
from quern.events.authentication import Authenticate, Principal, allowed
from quern.events.exchange import held
from quern.events.hub import Hub
from quern.events.problem import unavailable
from quern.events.settings import EventSettings


@dataclass(frozen=True)
class Edge:
    """The parts that all waiting routes of a process share."""

    settings: EventSettings
    authenticate: Authenticate
    places: Places
    hub: Hub

    async def admit(self, scope: str) -> Principal:
        """The caller of the current request, who has `scope` and holds a place until the answer has ended.

        Raises:
            ProblemError: 401, 403, 429 or 503.
        """
        if self.hub.draining:
            raise unavailable("The server is restarting.")
        principal = await allowed(self.authenticate, request.headers.get("Authorization"), scope)
        held(request.scope).enter_context(self.places.take(principal.tenant))
        return principal
