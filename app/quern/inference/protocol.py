"""The frames between the engine and its clients; docs/engine-protocol.md tells their order.

One frame is one JSON object in UTF-8 and a newline. A client sends one request on a connection and reads events until
one that ends it (`result` or `error`); closing the connection cancels the request.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

MAX_REQUEST_BYTES = 4 * 1024 * 1024
MAX_EVENT_BYTES = 64 * 1024 * 1024
#: How the refusal of a prompt that is too long begins.
TOO_LONG = "expected prompt and answer to fit into"
#: The refusal of tools by a model that was not made for them; a client may then describe them in words.
NO_TOOLS = "this model's chat template has no place for tools"

Priority = Literal["interactive", "batch"]
Tenant = Annotated[str, Field(min_length=1, max_length=128)]


class Frame(BaseModel):
    """A frame as it is sent: unknown fields are a mistake, not an extension."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Message(Frame):
    """One turn of a conversation. Its text is data: no part of it is ever read as the template's control tokens."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str = Field("", max_length=1_000_000)
    name: str | None = Field(None, max_length=64)
    tool_calls: list[dict[str, Any]] | None = Field(None, max_length=64)
    tool_call_id: str | None = Field(None, max_length=128)


class GenerateRequest(Frame):
    """Continue a conversation (`messages`, through the model's own chat template) or a plain text (`prompt`)."""

    op: Literal["generate"] = "generate"
    tenant: Tenant
    model: str | None = Field(None, description="default: the engine's chat model")
    messages: list[Message] | None = Field(None, min_length=1, max_length=1000)
    prompt: str | None = Field(None, min_length=1, max_length=1_000_000)
    tools: list[dict[str, Any]] | None = Field(None, max_length=64, description="for templates that know tools")
    max_tokens: int = Field(256, ge=1, le=65_536)
    fits_room: bool = Field(False, description="fewer tokens rather than a refusal where the context has no room")
    begins: str = Field(
        "", max_length=1_000_000, description="what was told of this answer before; it is read, not chosen again"
    )
    temperature: float = Field(0.0, ge=0, le=10, description="0: always the likeliest token")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=100_000, description="0: all")
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(default_factory=list, max_length=16)
    repetition_penalty: float = Field(1.0, ge=0.1, le=10)
    presence_penalty: float = Field(0.0, ge=-10, le=10)
    frequency_penalty: float = Field(0.0, ge=-10, le=10)
    logit_bias: dict[int, Annotated[float, Field(ge=-1000, le=1000)]] = Field(default_factory=dict, max_length=1024)
    logprobs: int | None = Field(
        None, ge=0, le=20, description="how many likeliest tokens to tell beside each chosen one"
    )
    json_schema: dict[str, Any] | None = Field(None, description="the answer must be JSON that this schema accepts")
    json_mode: bool = Field(False, description="the answer must be a JSON object")
    priority: Priority = "batch"
    deadline: float | None = Field(None, gt=0, le=86_400, description="seconds from now until the answer is of no use")
    stream: bool = Field(False, description="send `token` events")

    @model_validator(mode="after")
    def _has_one_input(self) -> GenerateRequest:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("expected either messages or prompt")
        if self.json_mode and self.json_schema is not None:
            raise ValueError("expected either json_schema or json_mode, not both")
        return self


class EmbedRequest(Frame):
    """One vector of length 1 for each text. Text beyond the model's context is left out of its vector."""

    op: Literal["embed"] = "embed"
    tenant: Tenant
    model: str | None = None
    texts: list[Annotated[str, Field(max_length=200_000)]] = Field(min_length=1, max_length=2048)
    priority: Priority = "batch"
    deadline: float | None = Field(None, gt=0, le=86_400)


class Label(Frame):
    """A class: its name, what it means in words, and texts known to belong to it."""

    name: str = Field(min_length=1, max_length=200)
    description: str = Field("", max_length=2000)
    examples: list[Annotated[str, Field(min_length=1, max_length=4000)]] = Field(default_factory=list, max_length=64)


class ClassifyRequest(Frame):
    """Which label is nearest in meaning to the text."""

    op: Literal["classify"] = "classify"
    tenant: Tenant
    model: str | None = None
    text: str = Field(max_length=200_000)
    labels: list[Label] = Field(min_length=2, max_length=100)
    priority: Priority = "batch"
    deadline: float | None = Field(None, gt=0, le=86_400)

    @model_validator(mode="after")
    def _has_distinct_labels(self) -> ClassifyRequest:
        if len({label.name for label in self.labels}) != len(self.labels):
            raise ValueError("expected labels with distinct names")
        return self


class CountTokensRequest(Frame):
    """How many tokens a prompt would take."""

    op: Literal["count_tokens"] = "count_tokens"
    tenant: Tenant
    model: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=1000)
    prompt: str | None = Field(None, max_length=1_000_000)
    tools: list[dict[str, Any]] | None = Field(None, max_length=64)

    @model_validator(mode="after")
    def _has_one_input(self) -> CountTokensRequest:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("expected either messages or prompt")
        return self


class ModelsRequest(Frame):
    """The models that the engine serves."""

    op: Literal["models"] = "models"


class StatsRequest(Frame):
    """The engine's counters, each since its start unless it is a gauge."""

    op: Literal["stats"] = "stats"


class HealthRequest(Frame):
    """Whether the models are loaded."""

    op: Literal["health"] = "health"


class PurgeRequest(Frame):
    """Forget everything that was kept of a tenant's texts."""

    op: Literal["purge"] = "purge"
    tenant: Tenant


class FaultRequest(Frame):
    """For tests of the engine itself; refused unless the engine was started with `allow_fault_injection`."""

    op: Literal["fault"] = "fault"
    action: Literal["crash_next_step", "hang_next_step", "poison", "clear"]
    text: str = Field("", max_length=1000, description="`poison`: a step with a prompt that contains this crashes")


Request = Annotated[
    GenerateRequest
    | EmbedRequest
    | ClassifyRequest
    | CountTokensRequest
    | ModelsRequest
    | StatsRequest
    | HealthRequest
    | PurgeRequest
    | FaultRequest,
    Field(discriminator="op"),
]
REQUEST: TypeAdapter[Request] = TypeAdapter(Request)


class TokenLogprob(Frame):
    """A token's text and natural-log probability, and the likeliest tokens in its place."""

    text: str
    logprob: float
    top: list[tuple[str, float]] = Field(default_factory=list)


class Generation(Frame):
    """What a generation came to. Durations in seconds."""

    text: str
    finish_reason: Literal["stop", "length"]
    parsed: Any = Field(None, description="the answer as JSON, where a schema or JSON mode asked for it")
    model: str
    seed: int
    prompt_tokens: int
    cached_tokens: int = Field(description="prompt tokens that a kept prefix saved")
    completion_tokens: int
    waited: float
    prompt_time: float
    completion_time: float
    logprobs: list[TokenLogprob] | None = None


class Embeddings(Frame):
    """Vectors in the order of the texts."""

    vectors: list[list[float]]
    model: str
    tokens: int


class Classification(Frame):
    """The nearest label, and every label's share of the belief; the shares add up to 1."""

    label: str
    score: float
    scores: dict[str, float]
    model: str


class TokenCount(Frame):
    """The tokens of a prompt."""

    tokens: int


class ServedModel(Frame):
    """A model that the engine serves."""

    name: str
    kind: Literal["chat", "embedding"]
    context: int
    licence: str
    loaded: bool


class ServedModels(Frame):
    """The models that the engine serves."""

    models: list[ServedModel]


class Stats(Frame):
    """Counters and gauges by their Prometheus name, without labels."""

    values: dict[str, float]


class Health(Frame):
    """`starting`: loading the models; `ready`; `failed`: `detail` says why, and the engine goes on trying."""

    status: Literal["starting", "ready", "failed"]
    detail: str = ""


class Done(Frame):
    """The request was carried out and has no answer of its own."""


class QueuedEvent(Frame):
    """The request waits; `ahead` is how many are before it."""

    event: Literal["queued"] = "queued"
    ahead: int


class TokenEvent(Frame):
    """More of a streamed answer's text, and how many tokens there are so far."""

    event: Literal["token"] = "token"
    text: str
    tokens: int
    logprobs: list[TokenLogprob] | None = None


class ResultEvent(Frame):
    """The end of a request that went well; `data` is its result."""

    event: Literal["result"] = "result"
    data: Any


ErrorKind = Literal["refused", "busy", "deadline", "crashed", "unavailable", "invalid_output"]


class ErrorEvent(Frame):
    """The end of a request that did not go well.

    `refused`: wrong in itself, the same again fails again. `busy`, `unavailable`: come again after `retry_after`
    seconds.
    `deadline`: too late. `crashed`: the model's process died under it; `suspect` when it died twice with this request.
    `invalid_output`: the model's answer was not what the schema asks for.
    """

    event: Literal["error"] = "error"
    kind: ErrorKind
    message: str
    retry_after: float | None = None
    suspect: bool = False


Event = Annotated[QueuedEvent | TokenEvent | ResultEvent | ErrorEvent, Field(discriminator="event")]
EVENT: TypeAdapter[Event] = TypeAdapter(Event)
