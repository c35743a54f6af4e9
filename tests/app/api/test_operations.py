"""Promises that hold for every route, generated over all documented operations: a new route without a probe fails."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest

from quern.api.app import operations
from quern.api.operation import Operation
from quern.jobs import queue
from quern.search import vectors
from quern.store import clock
from quern.tenants.keys import PUBLISHABLE, SCOPES
from tests.app.api.client import Answer, Client, House, Json, until

FIELDS: list[Json] = [
    {"name": "email", "type": "email"},
    {"name": "comment", "type": "long_text", "required": True},
]
ANSWERS: Json = {"email": "maud@example.org", "comment": "owner's secret words"}


@dataclass
class World:
    """What one tenant has: one thing of each kind, and a fresh one where a probe uses it up."""

    house: House
    client: Client
    tenant: str
    form: str = ""
    response: str = ""
    endpoint: str = ""
    delivery: str = ""
    key: str = ""
    keys_made: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, house: House) -> "World":
        tenant = house.tenant()
        world = cls(house, house.client(tenant), tenant)
        url = f"{house.stack.receiver.url}/isolation/{tenant}"
        world.endpoint = world.client.call("POST", "/webhooks", {"url": url}, status=201)["id"]
        tell = {"name": "tell", "type": "webhook", "endpoint": world.endpoint}
        world.form = world.client.form(FIELDS, [tell])
        world.response = world.client.submit(world.form, ANSWERS)
        world.delivery = until(world._first_delivery)
        world.key = world.client.call("POST", "/keys", {"name": "spare"}, status=201)["id"]
        return world

    def _first_delivery(self) -> str | None:
        items = self.client.call("GET", f"/webhooks/{self.endpoint}/deliveries")["items"]
        return items[0]["id"] if items else None

    @property
    def job(self) -> str:
        return str(self.client.call("GET", f"/responses/{self.response}")["jobs"][0]["id"])

    def waiting_job(self) -> str:
        """A job that stays queued: its queue has no engine to do it."""
        form = self.client.form(FIELDS, [{"name": "mood", "type": "sentiment"}])
        response = self.client.submit(form, ANSWERS)
        job = str(self.client.call("GET", f"/responses/{response}")["jobs"][0]["id"])
        until(lambda: self.client.send("GET", f"/jobs/{job}").status == 200)
        return job

    def dead_job(self) -> str:
        """A dead letter."""
        self.house.stack.runtime.store.db.jobs.update_one(
            {"_id": self.job}, {"$set": {"state": "dead", "ended": clock.now()}}
        )
        return self.job

    def fresh_response(self) -> str:
        return self.client.submit(self.form, ANSWERS)

    def embedded_response(self) -> str:
        """A response that an `embed` step has read."""
        store = self.house.stack.runtime.store
        document = store.db.responses.find_one({"_id": self.response})
        assert document is not None
        queue.transact(store, lambda session: vectors.keep(store.db, document, "read", [1.0], "test", session))
        return self.response

    def fresh_endpoint(self) -> str:
        url = f"{self.house.stack.receiver.url}/isolation/{self.tenant}"
        return str(self.client.call("POST", "/webhooks", {"url": url}, status=201)["id"])

    def fresh_key(self) -> str:
        return str(self.client.call("POST", "/keys", {"name": "short-lived"}, status=201)["id"])

    def draft(self) -> str:
        return self.client.form(FIELDS, publish=False)


@dataclass(frozen=True)
class Probe:
    """One request to a route: its path of `world`'s things, and what an owner gets for it."""

    path: Callable[[World], str]
    body: Callable[[World], Any] = lambda _: None
    status: int = 200
    #: What another tenant sees of it: 404, or an answer of its own without anything of the owner's.
    nothing: Callable[[Answer], bool] | None = None
    """None: another tenant must get 404."""


def _empty(answer: Answer) -> bool:
    return answer.status == 200 and answer.json()["items"] == [] and answer.json()["next_cursor"] is None


def _draft_body(_: World) -> Json:
    return {"name": "changed", "fields": FIELDS}


PROBES: dict[str, Probe] = {
    "GET /forms": Probe(lambda _: "/forms", nothing=_empty),
    "POST /forms": Probe(lambda _: "/forms", _draft_body, 201, nothing=lambda answer: answer.status == 201),
    "GET /forms/{form}": Probe(lambda w: f"/forms/{w.form}"),
    "PUT /forms/{form}": Probe(lambda w: f"/forms/{w.draft()}", _draft_body),
    "POST /forms/{form}/publish": Probe(lambda w: f"/forms/{w.draft()}/publish"),
    "POST /forms/{form}/close": Probe(lambda w: f"/forms/{w.client.form(FIELDS)}/close"),
    "POST /forms/{form}/open": Probe(lambda w: f"/forms/{w.client.form(FIELDS)}/open"),
    "GET /forms/{form}/versions": Probe(lambda w: f"/forms/{w.form}/versions"),
    "GET /forms/{form}/schema": Probe(lambda w: f"/forms/{w.form}/schema"),
    "POST /forms/{form}/responses": Probe(lambda w: f"/forms/{w.form}/responses", lambda _: {"answers": ANSWERS}, 202),
    "GET /forms/{form}/responses": Probe(lambda w: f"/forms/{w.form}/responses"),
    "GET /forms/{form}/export": Probe(lambda w: f"/forms/{w.form}/export"),
    "POST /forms/{form}/erasures": Probe(
        lambda w: f"/forms/{w.client.form(FIELDS)}/erasures", lambda _: {"field": "email", "value": "maud@example.org"}
    ),
    "GET /responses/{response}": Probe(lambda w: f"/responses/{w.response}"),
    "DELETE /responses/{response}": Probe(lambda w: f"/responses/{w.fresh_response()}", status=204),
    "POST /search": Probe(lambda _: "/search", lambda w: {"like": w.embedded_response()}),
    "GET /jobs": Probe(lambda _: "/jobs", nothing=_empty),
    "GET /jobs/{job}": Probe(lambda w: f"/jobs/{w.job}"),
    "GET /jobs/{job}/events": Probe(lambda w: f"/jobs/{w.job}/events"),
    "POST /jobs/{job}/cancel": Probe(lambda w: f"/jobs/{w.waiting_job()}/cancel", status=202),
    "POST /jobs/{job}/replay": Probe(lambda w: f"/jobs/{w.dead_job()}/replay", status=202),
    "GET /keys": Probe(
        lambda _: "/keys", nothing=lambda answer: [key["name"] for key in answer.json()["items"]] == ["test"]
    ),
    "POST /keys": Probe(
        lambda _: "/keys", lambda _: {"name": "another"}, 201, nothing=lambda answer: answer.status == 201
    ),
    "GET /keys/{key}": Probe(lambda w: f"/keys/{w.key}"),
    "DELETE /keys/{key}": Probe(lambda w: f"/keys/{w.fresh_key()}"),
    "GET /audit": Probe(lambda _: "/audit", nothing=_empty),
    "GET /analytics": Probe(lambda _: "/analytics", nothing=lambda answer: answer.status == 200),
    # What they answer depends on what was published: who sees what is told in `test_analytics`. Here: who may ask.
    **{
        f"POST /analytics/{name}": Probe(
            lambda _, name=name: f"/analytics/{name}",  # type: ignore[misc]
            lambda _: {},
            422,
            nothing=lambda answer: answer.status == 422,
        )
        for name in ("questions", "files", "charts", "sql")
    },
    "GET /webhooks": Probe(lambda _: "/webhooks", nothing=_empty),
    "POST /webhooks": Probe(
        lambda _: "/webhooks",
        lambda w: {"url": f"{w.house.stack.receiver.url}/new"},
        201,
        nothing=lambda answer: answer.status == 201,
    ),
    "GET /webhooks/{endpoint}": Probe(lambda w: f"/webhooks/{w.endpoint}"),
    "PATCH /webhooks/{endpoint}": Probe(lambda w: f"/webhooks/{w.endpoint}", lambda _: {"description": "changed"}),
    "DELETE /webhooks/{endpoint}": Probe(lambda w: f"/webhooks/{w.fresh_endpoint()}", status=204),
    "POST /webhooks/{endpoint}/rotate": Probe(lambda w: f"/webhooks/{w.fresh_endpoint()}/rotate"),
    "POST /webhooks/{endpoint}/enable": Probe(lambda w: f"/webhooks/{w.fresh_endpoint()}/enable"),
    "POST /webhooks/{endpoint}/disable": Probe(lambda w: f"/webhooks/{w.fresh_endpoint()}/disable"),
    "POST /webhooks/{endpoint}/test": Probe(lambda w: f"/webhooks/{w.endpoint}/test", status=202),
    "GET /webhooks/{endpoint}/deliveries": Probe(lambda w: f"/webhooks/{w.endpoint}/deliveries"),
    "GET /webhooks/{endpoint}/deliveries/{delivery}": Probe(
        lambda w: f"/webhooks/{w.endpoint}/deliveries/{w.delivery}"
    ),
    "POST /webhooks/{endpoint}/deliveries/{delivery}/replay": Probe(
        lambda w: f"/webhooks/{w.endpoint}/deliveries/{w.delivery}/replay", status=202
    ),
    "POST /webhooks/{endpoint}/replay": Probe(
        lambda w: f"/webhooks/{w.endpoint}/replay",
        lambda _: {"since": clock.rfc3339(clock.now() - timedelta(hours=1))},
        202,
    ),
}


def _name(operation: Operation) -> str:
    return f"{operation.method} {operation.path}"


ALL = sorted(operations(), key=_name)
every_operation = pytest.mark.parametrize("operation", ALL, ids=_name)


@pytest.fixture(scope="module")
def world(house: House) -> World:
    return World.of(house)


@pytest.fixture(scope="module")
def stranger(house: House) -> Client:
    """Another tenant, that has nothing but its key, which can do everything."""
    return house.client()


def test_every_route_has_a_probe_and_every_probe_a_route() -> None:
    assert {_name(operation) for operation in ALL} == set(PROBES)


@every_operation
def test_no_tenant_reaches_another_tenants_things(operation: Operation, world: World, house: House) -> None:
    probe = PROBES[_name(operation)]
    stranger = house.client()
    path, body = probe.path(world), probe.body(world)
    if operation.unsafe and probe.nothing is None:
        # The stranger goes first: if it could change anything, the owner's own request would fail.
        foreign = stranger.send(operation.method, path, body)
    owner = world.client.send(operation.method, path, body)
    assert owner.status == probe.status, owner.content[:500]
    if not operation.unsafe or probe.nothing is not None:
        foreign = stranger.send(operation.method, path, body)
    if probe.nothing is None:
        assert foreign.status == 404, foreign.content[:500]
    else:
        assert probe.nothing(foreign), foreign.content[:500]
    for secret in (b"owner's secret words", b"maud@example.org", world.response.encode(), world.endpoint.encode()):
        assert secret not in foreign.content


@every_operation
def test_every_route_refuses_a_key_without_its_scope(operation: Operation, world: World, house: House) -> None:
    scopes = sorted(SCOPES.keys() - {operation.scope})
    weak = house.client(world.tenant, scopes=scopes)
    probe = PROBES[_name(operation)]
    path, body = probe.path(world), probe.body(world)
    assert weak.send(operation.method, path, body).status == 403
    strong = house.client(world.tenant, scopes=[operation.scope])
    assert strong.send(operation.method, path, body).status == probe.status


@every_operation
def test_every_route_refuses_who_has_no_key(operation: Operation, world: World) -> None:
    nobody = world.client.with_key(None)
    answer = nobody.send(operation.method, PROBES[_name(operation)].path(world))
    assert answer.status == 401
    assert answer.headers["www-authenticate"].startswith("Bearer")


@every_operation
def test_a_publishable_key_can_only_submit(operation: Operation, world: World, house: House) -> None:
    public = house.client(world.tenant, kind="publishable")
    probe = PROBES[_name(operation)]
    expected = probe.status if operation.scope in PUBLISHABLE else 403
    assert public.send(operation.method, probe.path(world), probe.body(world)).status == expected
    assert {_name(item) for item in ALL if item.scope in PUBLISHABLE} == {"POST /forms/{form}/responses"}


@pytest.mark.parametrize("operation", [operation for operation in ALL if operation.served_by == "api"], ids=_name)
def test_unknown_query_parameters_are_refused(operation: Operation, world: World) -> None:
    answer = world.client.send(operation.method, PROBES[_name(operation)].path(world) + "?tenant=x", {})
    assert answer.status == 422
    assert answer.pointers == ["?tenant"]


def test_a_cursor_of_another_tenant_shows_only_ones_own(world: World, house: House) -> None:
    for _ in range(3):
        world.client.submit(world.form, ANSWERS)
    other = World.of(house)
    lists = {
        f"/forms/{world.form}/responses": f"/forms/{other.form}/responses",
        "/jobs": "/jobs",
        "/audit": "/audit",
        "/keys": "/keys",
        "/forms": "/forms",
    }
    for theirs, mine in lists.items():
        cursor = world.client.call("GET", f"{theirs}?limit=1")["next_cursor"]
        assert cursor is not None, theirs
        own = {item["id"] for item in other.client.call("GET", f"{mine}?limit=200")["items"]}
        shown = {item["id"] for item in other.client.call("GET", f"{mine}?limit=200&cursor={cursor}")["items"]}
        assert shown <= own


def test_filters_and_counts_never_look_at_another_tenant(world: World, stranger: Client) -> None:
    form = stranger.form(FIELDS)
    own = stranger.submit(form, {"email": "maud@example.org", "comment": "mine"})
    erased = stranger.call("POST", f"/forms/{form}/erasures", {"field": "email", "value": "maud@example.org"})
    assert erased == {"erased": [own], "more": False}
    assert world.client.call("GET", f"/responses/{world.response}")["status"] != "erased"
    assert stranger.call("GET", f"/audit?subject={world.form}")["items"] == []


def test_another_tenants_idempotency_key_is_free_to_use(world: World, stranger: Client) -> None:
    body = {"name": "same name", "fields": FIELDS}
    first = world.client.call("POST", "/forms", body, status=201, Idempotency_Key="shared-key")
    second = stranger.call("POST", "/forms", body, status=201, Idempotency_Key="shared-key")
    assert first["id"] != second["id"]
    form = stranger.form(FIELDS)
    one = world.client.submit(world.form, ANSWERS, Idempotency_Key="shared-submit")
    two = stranger.submit(form, {"comment": "something else"}, Idempotency_Key="shared-submit")
    assert one != two


def test_a_form_cannot_send_to_another_tenants_webhook(world: World, stranger: Client) -> None:
    step = {"name": "tell", "type": "webhook", "endpoint": world.endpoint}
    answer = stranger.send("POST", "/forms", {"name": "thief", "fields": FIELDS, "workflow": {"steps": [step]}})
    assert answer.status == 422
    assert answer.pointers == ["/workflow/steps/0/endpoint"]
