"""The bodies of requests, as OpenAI's clients send them.

What Quern does not do is refused by name (`extra="forbid"`), not dropped in silence. What changes no answer (`user`,
`service_tier` and the like) is taken and left aside.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

Model = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Text = Annotated[str, Field(max_length=1_000_000)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
_Stop = Annotated[str, Field(min_length=1, max_length=200)]
Stops = Annotated[
    list[_Stop],
    Field(max_length=16),
    BeforeValidator(
        lambda value: [] if value is None else [value] if isinstance(value, str) else value,
        json_schema_input_type=_Stop | Annotated[list[_Stop], Field(max_length=16)] | None,
    ),
]
Bias = dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]]
DEEPEST = 100
FunctionName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class Body(BaseModel):
    """A JSON object without members that nobody knows."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Ignored(Body):
    """What changes no answer here: whose request it is, and how OpenAI would bill, cache and watch it."""

    user: str | None = Field(None, max_length=1000)
    safety_identifier: str | None = Field(None, max_length=1000)
    prompt_cache_key: str | None = Field(None, max_length=1000)
    prompt_cache_retention: str | None = Field(None, max_length=100)
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None


class Sampling(Ignored):
    """How the next token is chosen. `top_k`, `min_p` and `repetition_penalty` are the engine's own."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, le=100_000)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)


class Penalties(Sampling):
    """Of chat and plain completions."""

    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stops = []
    n: int | None = Field(None, ge=1, le=8)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Bias | None = Field(None, max_length=1024)
    max_tokens: int | None = Field(None, ge=1, le=65_536)
    metadata: Metadata | None = None


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class Function(Body):
    name: FunctionName
    description: str | None = Field(None, max_length=10_000)
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class Named(Body):
    name: FunctionName


class ToolChoice(Body):
    type: Literal["function"]
    function: Named


class JsonSchema(Body):
    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = Field(None, max_length=10_000)
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.json_schema is None):
            raise ValueError("expected json_schema.schema")
        return self


class TextPart(Body):
    type: Literal["text"]
    text: Text


class RefusalPart(Body):
    type: Literal["refusal"]
    refusal: Text


Content = Text | Annotated[list[TextPart | RefusalPart], Field(max_length=1000)]


class CalledFunction(Body):
    name: FunctionName
    arguments: Text


class ToolCall(Body):
    id: str = Field(min_length=1, max_length=128)
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    """One turn. `audio`, `function_call` and the like are only taken when they are null."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = Field(None, max_length=64)
    tool_calls: list[ToolCall] | None = Field(None, max_length=64)
    tool_call_id: str | None = Field(None, max_length=128)
    refusal: str | None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    parsed: Any = None

    @model_validator(mode="after")
    def _is_whole(self) -> "ChatMessage":
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.refusal is not None)):
            raise ValueError("expected content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant's message has tool_calls")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("expected tool_call_id in a tool's message")
        return self


class ChatBody(Penalties):
    """`POST /v1/chat/completions`."""

    model: Model
    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = Field(None, ge=1, le=65_536)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, max_length=64)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    store: Literal[False] | None = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: str | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        _choice_exists(self.tool_choice, [tool.function.name for tool in self.tools or []])
        return self


class CompletionBody(Penalties):
    """`POST /v1/completions`: one text, or several."""

    model: Model
    prompt: (
        Annotated[str, Field(min_length=1, max_length=1_000_000)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=1_000_000)]], Field(min_length=1, max_length=32)]
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _is_bounded(self) -> "CompletionBody":
        if (self.n or 1) * (1 if isinstance(self.prompt, str) else len(self.prompt)) > 32:
            raise ValueError("expected at most 32 answers (prompts times n)")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs is not supported")
        return self


class EmbeddingBody(Ignored):
    """`POST /v1/embeddings`."""

    model: Model
    input: (
        Annotated[str, Field(min_length=1, max_length=200_000)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=200_000)]], Field(min_length=1, max_length=2048)]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, le=65_536)


class InputText(Body):
    type: Literal["input_text"]
    text: Text


class OutputText(Body):
    type: Literal["output_text"]
    text: Text
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    parsed: Any = None


class Refusal(Body):
    type: Literal["refusal"]
    refusal: Text


class InputMessage(Body):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[InputText | OutputText | Refusal], Field(max_length=1000)]
    id: str | None = Field(None, max_length=128)
    status: str | None = None
    phase: str | None = None


class FunctionCallItem(Body):
    type: Literal["function_call"]
    call_id: str = Field(min_length=1, max_length=128)
    name: FunctionName
    arguments: Text
    id: str | None = Field(None, max_length=128)
    status: str | None = None
    parsed_arguments: Any = None


class FunctionOutputItem(Body):
    type: Literal["function_call_output"]
    call_id: str = Field(min_length=1, max_length=128)
    output: Text | Annotated[list[InputText], Field(max_length=1000)]
    id: str | None = Field(None, max_length=128)
    status: str | None = None


InputItem = InputMessage | FunctionCallItem | FunctionOutputItem


class ResponseFunction(Body):
    type: Literal["function"]
    name: FunctionName
    description: str | None = Field(None, max_length=10_000)
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseToolChoice(Body):
    type: Literal["function"]
    name: FunctionName


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = Field(None, max_length=10_000)
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> "TextFormat":
        if self.type == "json_schema" and (self.json_schema is None or self.name is None):
            raise ValueError("expected schema and name")
        return self


class TextOptions(Body):
    format: TextFormat | None = None
    verbosity: str | None = None


class ResponseStreamOptions(Body):
    include_obfuscation: bool | None = None


class ResponseBody(Sampling):
    """`POST /v1/responses`."""

    model: Model
    input: (
        Annotated[str, Field(min_length=1, max_length=1_000_000)]
        | Annotated[list[InputItem], Field(min_length=1, max_length=1000)]
    )
    instructions: Text | None = None
    background: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    store: bool | None = None
    previous_response_id: str | None = Field(None, max_length=128)
    max_output_tokens: int | None = Field(None, ge=1, le=65_536)
    metadata: Metadata | None = None
    text: TextOptions | None = None
    tools: list[ResponseFunction] | None = Field(None, max_length=64)
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    truncation: Literal["disabled"] | None = None
    reasoning: None = None
    conversation: None = None
    prompt: None = None
    max_tool_calls: None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "ResponseBody":
        if self.background and self.store is False:
            raise ValueError("background needs store to be true")
        _choice_exists(self.tool_choice, [tool.name for tool in self.tools or []])
        return self

    @property
    def stored(self) -> bool:
        """Whether it can be asked for afterwards."""
        return self.store is not False


class BatchExpiry(Body):
    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2_592_000)


ENDPOINTS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completion",
    "/v1/embeddings": "embedding",
    "/v1/responses": "response",
}


class BatchBody(Body):
    """`POST /v1/batches`."""

    input_file_id: str = Field(min_length=1, max_length=128)
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: BatchExpiry | None = None


BODIES: dict[str, type[ChatBody] | type[CompletionBody] | type[EmbeddingBody] | type[ResponseBody]] = {
    "chat": ChatBody,
    "completion": CompletionBody,
    "embedding": EmbeddingBody,
    "response": ResponseBody,
}


def is_too_deep(value: Any) -> bool:
    """Whether a JSON value is nested more than DEEPEST levels: beyond some, what reads and writes it gives up."""
    level, depth = [value], 0
    while level:
        if (depth := depth + 1) > DEEPEST:
            return True
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return False


def _choice_exists(choice: Any, names: list[str]) -> None:
    if len(set(names)) != len(names):
        raise ValueError("tools: expected functions with distinct names")
    if choice in (None, "none", "auto"):
        return
    if not names:
        raise ValueError("tool_choice needs tools")
    name = choice.function.name if isinstance(choice, ToolChoice) else getattr(choice, "name", None)
    if name is not None and name not in names:
        raise ValueError("tool_choice names a function that is not among tools")
