"""From the body of a request to what the engine is asked: pure translation."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quern.inference.protocol import GenerateRequest, Message, Priority
from quern.openai import tools
from quern.openai.request import (
    ChatBody,
    ChatMessage,
    CompletionBody,
    FunctionCallItem,
    FunctionOutputItem,
    InputItem,
    InputMessage,
    Penalties,
    ResponseBody,
    Sampling,
)

#: OpenAI's default; the engine's own is 0.
_TEMPERATURE = 1.0
_LEAST_TOP_P = 1e-6


@dataclass(frozen=True)
class Question:
    """What the engine is asked: one generation for each choice.

    `functions`: those that an answer may call; `forced`: the answer is nothing but one call. `echo`: text that comes
    before each answer.
    """

    generations: Sequence[GenerateRequest]
    functions: Sequence[tools.Function] = ()
    forced: bool = False
    echo: Sequence[str] = ()

    @property
    def streams(self) -> bool:
        """Whether the answer can be told as it is made: a call is known as one only at its end."""
        return not self.functions


@dataclass(frozen=True)
class Setting:
    """What the body does not say. `seed`: of the first choice, when the body names none."""

    tenant: str
    priority: Priority
    seed: int
    most_tokens: int


def of_chat(body: ChatBody, setting: Setting) -> Question:
    """A chat completion."""
    chosen = body.tool_choice
    functions = [tool.function.model_dump(exclude_none=True) for tool in body.tools or []] if chosen != "none" else []
    only = None if chosen is None or isinstance(chosen, str) else chosen.function.name
    schema, json_mode = None, False
    if (wanted := body.response_format) is not None:
        json_mode = wanted.type == "json_object"
        schema = wanted.json_schema.json_schema if wanted.type == "json_schema" and wanted.json_schema else None
    base = _base(body, setting, body.max_completion_tokens or body.max_tokens) | _penalties(body)
    if body.logprobs:
        base["logprobs"] = body.top_logprobs or 0
    return _ask(
        [_chat_message(message) for message in body.messages],
        functions,
        "required" if only else chosen if isinstance(chosen, str) else None,
        only,
        base | {"json_schema": schema, "json_mode": json_mode},
        _seeds(body.seed, body.n or 1, setting),
    )


def of_completion(body: CompletionBody, setting: Setting) -> Question:
    """A plain completion: each prompt `n` times."""
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    base = _base(body, setting, body.max_tokens or 16) | _penalties(body)
    if body.logprobs is not None:
        base["logprobs"] = body.logprobs
    seeds = _seeds(body.seed, body.n or 1, setting)
    generations = [GenerateRequest(**base, prompt=prompt, seed=seed) for prompt in prompts for seed in seeds]
    echo = [prompt for prompt in prompts for _ in seeds] if body.echo else []
    return Question(generations, echo=echo)


def of_response(body: ResponseBody, earlier: Sequence[InputItem], setting: Setting) -> Question:
    """A response. `earlier`: what was said before, by `previous_response_id`; its instructions do not carry over."""
    messages = [Message(role="system", content=body.instructions)] if body.instructions else []
    messages += messages_of([*earlier, *input_items(body)])
    chosen = body.tool_choice
    functions = [tool.model_dump(exclude_none=True) for tool in body.tools or []] if chosen != "none" else []
    only = None if chosen is None or isinstance(chosen, str) else chosen.name
    wanted = body.text.format if body.text else None
    base = _base(body, setting, body.max_output_tokens)
    if body.include:
        base["logprobs"] = body.top_logprobs or 0
    return _ask(
        messages,
        functions,
        "required" if only else chosen if isinstance(chosen, str) else None,
        only,
        base
        | {
            "json_schema": wanted.json_schema if wanted and wanted.type == "json_schema" else None,
            "json_mode": wanted is not None and wanted.type == "json_object",
        },
        [setting.seed],
    )


def without_template_tools(question: Question) -> Question:
    """The same question for a model whose template has no place for tools: it is told of them in words."""
    told = tools.in_words(list(question.functions))
    generations = []
    for request in question.generations:
        messages = [_call_in_words(message) for message in request.messages or []]
        first = messages[0]
        if first.role == "system":
            messages[0] = first.model_copy(update={"content": f"{first.content}\n\n{told}"})
        else:
            messages.insert(0, Message(role="system", content=told))
        generations.append(request.model_copy(update={"messages": messages, "tools": None}))
    return Question(generations, question.functions, question.forced, question.echo)


def input_items(body: ResponseBody) -> list[InputItem]:
    """The items of a response's input."""
    if isinstance(body.input, str):
        return [InputMessage(role="user", content=body.input)]
    return list(body.input)


def messages_of(items: Sequence[InputItem]) -> list[Message]:
    """Items as turns; calls that follow one another are one turn."""
    messages: list[Message] = []
    for item in items:
        match item:
            case InputMessage(role=role, content=content):
                text = content if isinstance(content, str) else "".join(_text(part) for part in content)
                messages.append(Message(role="system" if role == "developer" else role, content=text))
            case FunctionCallItem():
                call = _template_call(item.call_id, item.name, item.arguments)
                last = messages[-1] if messages else None
                if last is not None and last.tool_calls:
                    messages[-1] = last.model_copy(update={"tool_calls": [*last.tool_calls, call]})
                else:
                    messages.append(Message(role="assistant", tool_calls=[call]))
            case FunctionOutputItem(output=output):
                text = output if isinstance(output, str) else "".join(part.text for part in output)
                messages.append(Message(role="tool", content=text, tool_call_id=item.call_id))
    return messages


def _ask(
    messages: list[Message],
    functions: list[tools.Function],
    choice: str | None,
    only: str | None,
    base: dict[str, Any],
    seeds: list[int],
) -> Question:
    wanted = [function for function in functions if only is None or function["name"] == only]
    forced = choice == "required"
    if forced:
        base |= {"json_schema": tools.forced_schema(wanted), "json_mode": False}
    given = tools.for_template(functions) if functions else None
    generations = [GenerateRequest(**base, messages=messages, tools=given, seed=seed) for seed in seeds]
    return Question(generations, wanted, forced)


def _base(body: Sampling, setting: Setting, max_tokens: int | None) -> dict[str, Any]:
    return {
        "tenant": setting.tenant,
        "model": getattr(body, "model", None),
        "priority": setting.priority,
        "max_tokens": max_tokens or setting.most_tokens,
        # A limit that the client named is kept or refused; without one the answer gets what room there is.
        "fits_room": max_tokens is None,
        "temperature": _TEMPERATURE if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else max(body.top_p, _LEAST_TOP_P),
        "top_k": body.top_k or 0,
        "min_p": body.min_p or 0.0,
        "repetition_penalty": body.repetition_penalty or 1.0,
    }


def _penalties(body: Penalties) -> dict[str, Any]:
    return {
        "stop": body.stop,
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "logit_bias": {int(token): bias for token, bias in (body.logit_bias or {}).items()},
    }


def _seeds(seed: int | None, count: int, setting: Setting) -> list[int]:
    first = setting.seed if seed is None else seed % 2**63
    return [(first + index) % 2**63 for index in range(count)]


def _chat_message(message: ChatMessage) -> Message:
    content = message.content
    text = content if isinstance(content, str) else "".join(_text(part) for part in content or [])
    calls = [_template_call(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or []]
    return Message(
        role="system" if message.role == "developer" else message.role,
        content=text or message.refusal or "",
        name=message.name,
        tool_calls=calls or None,
        tool_call_id=message.tool_call_id,
    )


def _text(part: Any) -> str:
    return str(getattr(part, "text", None) or getattr(part, "refusal", ""))


def _template_call(identity: str, name: str, arguments: str) -> dict[str, Any]:
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        value = arguments
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": value}}


def _call_in_words(message: Message) -> Message:
    if message.tool_calls:
        called = [call["function"] for call in message.tool_calls]
        words = "\n".join(tools.call_in_words(call["name"], call["arguments"]) for call in called)
        return Message(role="assistant", content=f"{message.content}\n{words}".strip())
    if message.role == "tool":
        return Message(role="user", content=f"<tool_response>{message.content}</tool_response>")
    return message
