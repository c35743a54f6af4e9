"""What the operator's tools ask: `/healthz`, `/readyz`, `/metrics`. The front door does not forward these."""

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from quart import Blueprint, Response

from quern.events.edge import Edge
from quern.events.problem import unavailable
from quern.observe.metrics import registry


def blueprint(edge: Edge) -> Blueprint:
    """The routes over `edge`."""
    routes = Blueprint("operations", __name__)

    @routes.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @routes.get("/readyz")
    async def readyz() -> dict[str, str]:
        if edge.hub.draining:
            raise unavailable("The server is restarting.")
        if not edge.hub.live:
            raise unavailable("No change stream: MongoDB is away, or is not a replica set.")
        return {"status": "ok"}

    @routes.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry()), content_type=CONTENT_TYPE_LATEST)

    return routes
