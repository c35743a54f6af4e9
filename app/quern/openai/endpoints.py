"""What `/v1` serves, route by route, for the description of the API. Tests hold the routes to it, scopes included."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, Field, WithJsonSchema

from quern.openai import answermodels as answers
from quern.openai.files import PURPOSES
from quern.openai.request import BatchBody, ChatBody, CompletionBody, EmbeddingBody, ResponseBody

USE, READ, WRITE = "ai:use", "ai:read", "ai:write"
_WAITS = (409, 422, 504)


class AfterQuery(BaseModel):
    """A page of a list, newest first."""

    limit: int = Field(20, ge=1, le=100)
    after: str | None = Field(None, description="the identifier of the last item seen")


class ItemsQuery(AfterQuery):
    order: Literal["asc", "desc"] = "desc"


class FilesQuery(ItemsQuery):
    limit: int = Field(100, ge=1, le=10_000)
    purpose: str | None = None


class ResponseQuery(BaseModel):
    """How to read a response."""

    stream: bool = Field(default=False, description="follow it; for those made with `background` and `stream`")
    starting_after: int | None = Field(None, ge=0, lt=10**9, description="leave out events up to this number")


class FileUpload(BaseModel):
    """A file, in `multipart/form-data`."""

    file: Annotated[bytes, WithJsonSchema({"type": "string", "format": "binary"})]
    purpose: Annotated[str, WithJsonSchema({"type": "string", "enum": list(PURPOSES)})]
    expires_after_anchor: Literal["created_at"] | None = Field(None, alias="expires_after[anchor]")
    expires_after_seconds: int | None = Field(None, alias="expires_after[seconds]", ge=3600, le=2_592_000)


@dataclass(frozen=True)
class Endpoint:
    """A route below `/v1`.

    `answer`: the model of a 200 in JSON; None for bytes. `event`: of one event's data where the answer can be
    streamed. `refusals`: statuses of errors beside those that every route may answer with.
    """

    method: Literal["GET", "POST", "DELETE"]
    path: str
    summary: str
    scope: str
    answer: type[BaseModel] | None
    body: type[BaseModel] | None = None
    query: type[BaseModel] | None = None
    event: type[BaseModel] | None = None
    refusals: tuple[int, ...] = ()
    description: str = ""

    @property
    def is_job(self) -> bool:
        """Whether a request becomes a job of the queue, and takes an `Idempotency-Key`."""
        return self.method == "POST" and self.scope == USE


ENDPOINTS = (
    Endpoint("GET", "/models", "List the models", USE, answers.AiModelList),
    Endpoint("GET", "/models/{model}", "Read a model's entry", USE, answers.AiModel, refusals=(404,)),
    Endpoint(
        "POST",
        "/chat/completions",
        "Complete a conversation",
        USE,
        answers.ChatCompletion,
        ChatBody,
        event=answers.ChatCompletionChunk,
        refusals=(404, *_WAITS),
    ),
    Endpoint(
        "POST",
        "/completions",
        "Complete a text",
        USE,
        answers.TextCompletion,
        CompletionBody,
        event=answers.TextCompletionChunk,
        refusals=(404, *_WAITS),
    ),
    Endpoint(
        "POST",
        "/embeddings",
        "Turn texts into vectors",
        USE,
        answers.EmbeddingList,
        EmbeddingBody,
        refusals=(404, *_WAITS),
    ),
    Endpoint(
        "POST",
        "/responses",
        "Ask for a response",
        USE,
        answers.AiResponse,
        ResponseBody,
        event=answers.AiResponseEvent,
        refusals=(404, *_WAITS),
        description="With `background` the answer comes at once, and its `status` says how far it is.",
    ),
    Endpoint(
        "GET",
        "/responses/{response}",
        "Read a response, or follow it",
        READ,
        answers.AiResponse,
        query=ResponseQuery,
        event=answers.AiResponseEvent,
        refusals=(400, 404),
    ),
    Endpoint("DELETE", "/responses/{response}", "Delete a response", WRITE, answers.Removed, refusals=(404,)),
    Endpoint(
        "POST",
        "/responses/{response}/cancel",
        "Cancel a response in the background",
        WRITE,
        answers.AiResponse,
        refusals=(400, 404),
    ),
    Endpoint(
        "GET",
        "/responses/{response}/input_items",
        "List a response's own input",
        READ,
        answers.ShownInputList,
        query=ItemsQuery,
        refusals=(400, 404),
    ),
    Endpoint("POST", "/files", "Upload a file", WRITE, answers.AiFile, FileUpload),
    Endpoint("GET", "/files", "List files", READ, answers.AiFileList, query=FilesQuery, refusals=(400, 404)),
    Endpoint("GET", "/files/{file}", "Read a file's entry", READ, answers.AiFile, refusals=(404,)),
    Endpoint("GET", "/files/{file}/content", "Read a file", READ, None, refusals=(404,)),
    Endpoint("DELETE", "/files/{file}", "Delete a file", WRITE, answers.Removed, refusals=(404,)),
    Endpoint("POST", "/batches", "Start a batch", WRITE, answers.AiBatch, BatchBody),
    Endpoint("GET", "/batches", "List batches", READ, answers.AiBatchList, query=AfterQuery, refusals=(400, 404)),
    Endpoint("GET", "/batches/{batch}", "Read a batch", READ, answers.AiBatch, refusals=(404,)),
    Endpoint("POST", "/batches/{batch}/cancel", "Cancel a batch", WRITE, answers.AiBatch, refusals=(404, 409)),
)
