"""The shapes of `answer`, for the description of the API; tests hold the answers to them, member by member."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from quern.openai.request import ResponseFunction, ResponseToolChoice, TextFormat


class Shown(BaseModel):
    """A JSON object with these members and no others."""

    model_config = ConfigDict(extra="forbid")


class ApiFault(Shown):
    message: str
    type: str
    param: str | None
    code: str | None


class ApiFailure(Shown):
    """An error, in the envelope that OpenAI's clients know."""

    error: ApiFault


class AiModel(Shown):
    """A model that is served. `created` is always 0; `kind`, `context` and `licence` are Quern's own."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    kind: Literal["chat", "embedding"]
    context: int = Field(description="tokens of prompt and answer together")
    licence: str


class AiModelList(Shown):
    """All models that are served."""

    object: Literal["list"]
    data: list[AiModel]


class LikelyToken(Shown):
    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(LikelyToken):
    top_logprobs: list[LikelyToken]


class ChatLogprobs(Shown):
    content: list[ChosenToken]
    refusal: None


class ShownFunction(Shown):
    name: str
    arguments: str = Field(description="JSON, as the model wrote it")


class ShownToolCall(Shown):
    id: str
    type: Literal["function"]
    function: ShownFunction


class ChatAnswer(Shown):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    annotations: list[Any]
    tool_calls: list[ShownToolCall] | None = None


class ChatChoice(Shown):
    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class CachedTokens(Shown):
    cached_tokens: int = Field(description="of the prompt, that were not computed again")


class ChatUsage(Shown):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class ChatCompletion(Shown):
    """A chat completion."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: None
    service_tier: Literal["default"]
    choices: list[ChatChoice]
    usage: ChatUsage


class ToolCallDelta(ShownToolCall):
    index: int


class ChatDelta(Shown):
    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(Shown):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class ChatCompletionChunk(Shown):
    """The `data` of one event of a streamed chat completion; `[DONE]` follows the last. A call comes whole."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: None
    service_tier: Literal["default"]
    choices: list[ChatChunkChoice]
    usage: ChatUsage | None = None


class TextLogprobs(Shown):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Shown):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class TextCompletion(Shown):
    """A completion."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: ChatUsage


class TextChunkChoice(Shown):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class TextCompletionChunk(Shown):
    """The `data` of one event of a streamed completion; `[DONE]` follows the last."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChunkChoice]
    usage: ChatUsage | None = None


class EmbeddingItem(Shown):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="numbers, or base64 of 32-bit floats, lowest byte first")


class EmbeddingUsage(Shown):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Shown):
    """One vector for each text."""

    object: Literal["list"]
    data: list[EmbeddingItem]
    model: str
    usage: EmbeddingUsage


class ResponseText(Shown):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ChosenToken]


class ResponseMessage(Shown):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[ResponseText]


class ResponseCall(Shown):
    id: str
    type: Literal["function_call"]
    status: Literal["in_progress", "completed"]
    call_id: str
    name: str
    arguments: str


class ResponseFault(Shown):
    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class WhyIncomplete(Shown):
    reason: Literal["max_output_tokens"]


class ResponseReasoning(Shown):
    effort: None
    summary: None


class PlainText(Shown):
    type: Literal["text"]


class ShownTextOptions(Shown):
    format: TextFormat | PlainText


class InputDetails(Shown):
    cached_tokens: int
    cache_write_tokens: Literal[0]


class OutputDetails(Shown):
    reasoning_tokens: Literal[0]


class ResponseUsage(Shown):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class AiResponse(Shown):
    """A response, in whatever state it is."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    background: bool
    error: ResponseFault | None
    incomplete_details: WhyIncomplete | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    model: str
    output: list[ResponseMessage | ResponseCall]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: ResponseReasoning
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: ShownTextOptions
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice
    tools: list[ResponseFunction]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None


class AiResponseEvent(BaseModel):
    """The `data` of one event of a streamed response; further members depend on `type`, as OpenAI names them."""

    type: str
    sequence_number: int


class ShownInput(BaseModel):
    """An item of a response's input: a message, a call, or a call's output."""

    id: str
    type: Literal["message", "function_call", "function_call_output"]
    status: Literal["completed"]


class Listed(Shown):
    """A page of a list. `last_id` is the `after` of the next one."""

    object: Literal["list"]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ShownInputList(Listed):
    """A page of a response's own input."""

    data: list[ShownInput]


class AiFile(Shown):
    """A file without its content."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Literal["batch", "batch_output", "user_data"]
    status: Literal["processed"]
    status_details: None


class AiFileList(Listed):
    """A page of files."""

    data: list[AiFile]


class Removed(Shown):
    """What was deleted."""

    id: str
    object: Literal["file", "response"]
    deleted: Literal[True]


class BatchFault(Shown):
    code: str
    line: int | None
    message: str
    param: None


class BatchFaults(Shown):
    object: Literal["list"]
    data: list[BatchFault]


class BatchCounts(Shown):
    total: int
    completed: int
    failed: int


class AiBatch(Shown):
    """A batch."""

    id: str
    object: Literal["batch"]
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
    errors: BatchFaults | None
    input_file_id: str
    completion_window: Literal["24h"]
    status: Literal[
        "validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: BatchCounts
    metadata: dict[str, str] | None


class AiBatchList(Listed):
    """A page of batches."""

    data: list[AiBatch]
