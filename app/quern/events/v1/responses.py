"""`/v1/responses`: plain, streamed, in the background; stored ones can be read, followed, cancelled and deleted."""

from pymongo.client_session import ClientSession
from quart import Blueprint, Response, request

from quern.events.v1.desk import Desk, reply
from quern.events.v1.feeds import Feed
from quern.events.v1.listing import Listing
from quern.events.v1.submission import Wish, submit
from quern.events.v1.waiting import following_before, stream, whole
from quern.openai import answer, ledger
from quern.openai.error import ApiError, not_found
from quern.openai.ledger import Asked
from quern.openai.request import ResponseBody
from quern.tenants.keys import Principal

USE, READ, WRITE = "ai:use", "ai:read", "ai:write"


def add_routes(routes: Blueprint, desk: Desk) -> None:
    """Add the routes over `desk`."""

    @routes.post("/responses")
    async def create_response() -> Response:
        principal = await desk.admit(USE)
        body = await desk.json(ResponseBody)
        await desk.expect_model(body.model, "chat")
        previous = await _previous(desk, principal, body)
        background = bool(body.background)
        if not background or body.stream:
            await desk.take_place(principal.tenant)
        wish = Wish(
            "response",
            body,
            stream=bool(body.stream),
            background=background,
            stored=body.stored,
            previous=previous.id if previous else None,
        )
        feeds: list[Feed] = []
        submitted = await submit(desk, principal, wish, lambda identity: feeds.append(following_before(desk, identity)))
        if wish.stream:
            return await stream(desk, submitted.asked, feeds[0], submitted.headers, joins=submitted.joined)
        if background:
            asked = submitted.asked
            if submitted.joined:
                asked = await _found(desk, principal, asked.public_id)
            return reply(answer.response(asked), headers=submitted.headers)
        return await whole(desk, submitted.asked, submitted.headers)

    @routes.get("/responses/<identity>")
    async def get_response(identity: str) -> Response:
        principal = await desk.admit(READ)
        asked = await _found(desk, principal, identity)
        if request.args.get("stream") != "true":
            return reply(answer.response(asked), headers=await desk.run(desk.standing, asked.job_id))
        if not asked.stream or not asked.background:
            message = "Only a response that was created with background and stream can be streamed again."
            raise ApiError(400, message, code="invalid_value", param="stream")
        await desk.take_place(principal.tenant)
        feed = following_before(desk, asked.id)
        return await stream(desk, asked, feed, {"X-Quern-Job": asked.job_id}, after=_starting_after(), joins=True)

    @routes.post("/responses/<identity>/cancel")
    async def cancel_response(identity: str) -> Response:
        principal = await desk.admit(WRITE)
        asked = await _found(desk, principal, identity)
        if not asked.background:
            message = "Only a background response can be cancelled; close the connection of any other."
            raise ApiError(400, message, code="invalid_value")
        if asked.state in ledger.ENDED and asked.state != "cancelled":
            raise ApiError(
                400, f"The response is {asked.state}; it cannot be cancelled any more.", code="invalid_value"
            )

        def work(session: ClientSession) -> None:
            desk.audit(session, principal, "ai_response.cancelled", asked.public_id)

        if asked.state != "cancelled" and await desk.run(desk.cancel, asked):
            await desk.run(desk.transact, work)
        # The worker of a running one stops within a second; until then it is still in progress.
        return reply(answer.response(await _found(desk, principal, identity)))

    @routes.delete("/responses/<identity>")
    async def delete_response(identity: str) -> Response:
        principal = await desk.admit(WRITE)
        asked = await _found(desk, principal, identity)
        await desk.run(_delete, desk, principal, asked)
        return reply({"id": asked.public_id, "object": "response", "deleted": True})

    @routes.get("/responses/<identity>/input_items")
    async def list_input_items(identity: str) -> Response:
        principal = await desk.admit(READ)
        listing = Listing.of_request(newest_first=True, most=100)
        asked = await _found(desk, principal, identity)
        items = answer.input_items(asked)
        ordered = items[::-1] if listing.newest_first else items
        if listing.after is not None:
            places = [place for place, item in enumerate(ordered) if item["id"] == listing.after]
            if not places:
                raise not_found("item", listing.after)
            ordered = ordered[places[0] + 1 :]
        return reply(listing.page(ordered[: listing.limit + 1], lambda item: item))


async def _found(desk: Desk, principal: Principal, identity: str) -> Asked:
    asked = await desk.run(ledger.get_response, desk.db, principal.tenant, identity)
    if asked is None:
        raise not_found("response", identity)
    return asked


async def _previous(desk: Desk, principal: Principal, body: ResponseBody) -> Asked | None:
    if body.previous_response_id is None:
        return None
    previous = await desk.run(ledger.get_response, desk.db, principal.tenant, body.previous_response_id)
    if previous is None:
        message = f"Previous response with id '{body.previous_response_id[:100]}' not found."
        raise ApiError(404, message, code="previous_response_not_found", param="previous_response_id")
    if previous.outcome is None:
        message = f"The previous response is {previous.state}; expected one that is completed."
        raise ApiError(400, message, code="invalid_value", param="previous_response_id")
    return previous


def _starting_after() -> int:
    given = request.args.get("starting_after", "-1")
    if given != "-1" and not (given.isascii() and given.isdigit() and len(given) <= 9):
        message = "starting_after: expected the sequence_number of an event."
        raise ApiError(400, message, code="invalid_value", param="starting_after")
    return int(given)


def _delete(desk: Desk, principal: Principal, asked: Asked) -> None:
    if asked.state not in ledger.ENDED:
        desk.cancel(asked)

    def work(session: ClientSession) -> None:
        ledger.delete(desk.db, asked, session)
        desk.audit(session, principal, "ai_response.deleted", asked.public_id)

    desk.transact(work)
    desk.runtime.forget(asked.tenant)
