"""`/v1/models`, `/v1/chat/completions`, `/v1/completions`, `/v1/embeddings`."""

from quart import Blueprint, Response

from quern.events.v1.desk import Desk, reply
from quern.events.v1.feeds import Feed
from quern.events.v1.submission import Wish, submit
from quern.events.v1.waiting import following_before, stream, whole
from quern.inference.protocol import ServedModel
from quern.openai.error import ApiError
from quern.openai.request import ChatBody, CompletionBody, EmbeddingBody
from quern.tenants.keys import Principal

SCOPE = "ai:use"


def add_routes(routes: Blueprint, desk: Desk) -> None:
    """Add the routes over `desk`."""

    @routes.get("/models")
    async def list_models() -> Response:
        await desk.admit(SCOPE)
        return reply({"object": "list", "data": [_model(model) for model in await desk.models()]})

    @routes.get("/models/<path:name>")
    async def get_model(name: str) -> Response:
        await desk.admit(SCOPE)
        for model in await desk.models():
            if model.name == name:
                return reply(_model(model))
        raise ApiError(404, f"The model '{name[:100]}' does not exist here.", code="model_not_found", param="model")

    @routes.post("/chat/completions")
    async def create_chat_completion() -> Response:
        principal = await desk.admit(SCOPE)
        body = await desk.json(ChatBody)
        await desk.expect_model(body.model, "chat")
        await desk.take_place(principal.tenant)
        return await _answer(desk, principal, Wish("chat", body, stream=bool(body.stream)))

    @routes.post("/completions")
    async def create_completion() -> Response:
        principal = await desk.admit(SCOPE)
        body = await desk.json(CompletionBody)
        await desk.expect_model(body.model, "chat")
        await desk.take_place(principal.tenant)
        return await _answer(desk, principal, Wish("completion", body, stream=bool(body.stream)))

    @routes.post("/embeddings")
    async def create_embeddings() -> Response:
        principal = await desk.admit(SCOPE)
        body = await desk.json(EmbeddingBody)
        await desk.expect_model(body.model, "embedding")
        await desk.take_place(principal.tenant)
        return await _answer(desk, principal, Wish("embedding", body))


async def _answer(desk: Desk, principal: Principal, wish: Wish) -> Response:
    feeds: list[Feed] = []
    submitted = await submit(desk, principal, wish, lambda identity: feeds.append(following_before(desk, identity)))
    if wish.stream:
        return await stream(desk, submitted.asked, feeds[0], submitted.headers, joins=submitted.joined)
    return await whole(desk, submitted.asked, submitted.headers)


def _model(model: ServedModel) -> dict[str, object]:
    """`created` is 0: a model file has no such date. `kind`, `context` and `licence` are Quern's own."""
    return {
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": "quern",
        "kind": model.kind,
        "context": model.context,
        "licence": model.licence,
    }
