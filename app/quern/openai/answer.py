"""Answers in OpenAI's shapes: whole ones, and the frames of streamed ones. Pure functions of what was asked."""

import base64
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, Protocol

import orjson

from quern.inference.protocol import TokenLogprob
from quern.openai import conversation, prompt
from quern.openai.ledger import Asked
from quern.openai.outcome import Choice, Failure, Outcome, Record
from quern.openai.request import FunctionCallItem, FunctionOutputItem, InputItem, InputMessage, ResponseBody

Json = dict[str, Any]


def unix(at: datetime) -> int:
    """Whole seconds since 1970, as OpenAI's answers give time."""
    return int(at.timestamp())


# ---- whole answers


def chat_completion(asked: Asked, outcome: Outcome) -> Json:
    """`chat.completion`."""
    return {
        **_head(asked, "chat.completion", outcome.model),
        "choices": [
            {
                "index": index,
                "message": _chat_message(asked, index, choice),
                "logprobs": _chat_logprobs(choice.logprobs),
                "finish_reason": choice.finish,
            }
            for index, choice in enumerate(outcome.choices)
        ],
        "usage": chat_usage(outcome),
    }


def completion(asked: Asked, outcome: Outcome) -> Json:
    """`text_completion`."""
    return {
        **_head(asked, "text_completion", outcome.model),
        "choices": [
            {
                "index": index,
                "text": choice.text,
                "logprobs": _text_logprobs(choice.logprobs, 0),
                "finish_reason": choice.finish,
            }
            for index, choice in enumerate(outcome.choices)
        ],
        "usage": chat_usage(outcome),
    }


def embeddings(asked: Asked, outcome: Outcome) -> Json:
    """`list` of embeddings; with `dimensions`, the first so many numbers, scaled to length 1 again."""
    count = 1 if isinstance(asked.body["input"], str) else len(asked.body["input"])
    import numpy as np  # ten megabytes, and of a worker's jobs only this one needs them

    vectors = np.frombuffer(asked.vectors or b"", "<f4").reshape(count, -1)
    if (wanted := asked.body.get("dimensions")) is not None:
        vectors = vectors[:, :wanted]
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    if asked.body.get("encoding_format") == "base64":
        shown: list[Any] = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
    else:
        shown = [vector.tolist() for vector in vectors]
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(shown)]
    usage = {"prompt_tokens": outcome.prompt_tokens, "total_tokens": outcome.prompt_tokens}
    return {"object": "list", "data": data, "model": outcome.model, "usage": usage}


def response(asked: Asked) -> Json:
    """`response`, in whatever state it is."""
    body = ResponseBody.model_validate(asked.body)
    outcome, error = asked.outcome, asked.error
    shown = None
    if error is not None:
        shown = {"code": error.code if error.code in _RESPONSE_CODES else "server_error", "message": error.message}
    return {
        "id": asked.public_id,
        "object": "response",
        "created_at": unix(asked.created),
        "completed_at": unix(asked.ended) if asked.ended and asked.state == "completed" else None,
        "status": asked.state,
        "background": asked.background,
        "error": shown,
        "incomplete_details": {"reason": "max_output_tokens"} if asked.state == "incomplete" else None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "model": outcome.model if outcome else body.model,
        "output": output_items(asked, outcome, _item_status(asked)) if outcome else [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": f"resp_{asked.previous.removeprefix('air_')}" if asked.previous else None,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": asked.stored,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": _text_format(body)},
        "tool_choice": asked.body.get("tool_choice") or "auto",
        "tools": asked.body.get("tools") or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": _response_usage(outcome) if outcome else None,
        "user": body.user,
    }


_RESPONSE_CODES = frozenset({"server_error", "rate_limit_exceeded", "invalid_prompt"})


def output_items(asked: Asked, outcome: Outcome, status: str) -> list[Json]:
    """What a response answered, item by item."""
    choice = outcome.choices[0]
    items: list[Json] = []
    if choice.text or not choice.calls:
        items.append(_message_item(asked, [_text_part(choice.text, choice.logprobs)], status))
    for index, call in enumerate(choice.calls):
        items.append(_call_item(asked, index, call.name, call.arguments, "completed"))
    return items


def input_items(asked: Asked) -> list[Json]:
    """A response's own input, each item with an identifier."""
    items = prompt.input_items(ResponseBody.model_validate(asked.body))
    return [_input_item(item, f"{asked.core}i{index}") for index, item in enumerate(items)]


def whole(asked: Asked) -> Json:
    """The answer to a request that went well, in the shape of its kind."""
    if asked.kind == "response":
        return response(asked)
    outcome = asked.outcome
    if outcome is None:
        raise ValueError("expected a request that has been answered")
    shape = {"chat": chat_completion, "completion": completion, "embedding": embeddings}[asked.kind]
    return shape(asked, outcome)


# ---- streams


class Shape(Protocol):
    """One request's answer as frames. Called in this order; each gives what goes over the wire then."""

    def begin(self) -> list[bytes]:
        """The request is durable."""

    def more(self, record: Record) -> list[bytes]:
        """More of the answer."""

    def finish(self, asked: Asked, outcome: Outcome) -> list[bytes]:
        """The answer is whole, and all of it was given to `more`."""

    def fail(self, asked: Asked | None, failure: Failure) -> list[bytes]:
        """There will be no (further) answer."""


class ChatShape:
    """`chat.completion.chunk`s and `[DONE]`."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._wants_usage = bool((asked.body.get("stream_options") or {}).get("include_usage"))
        self._count = asked.body.get("n") or 1

    def begin(self) -> list[bytes]:
        first = {"role": "assistant", "content": "", "refusal": None}
        return [self._chunk([self._choice(index, first) for index in range(self._count)])]

    def more(self, record: Record) -> list[bytes]:
        if self._asked.body.get("tools"):
            return []
        return [
            self._chunk([self._choice(index, {"content": text}, _chat_logprobs(logprobs))])
            for index, text, logprobs in record
        ]

    def finish(self, asked: Asked, outcome: Outcome) -> list[bytes]:
        frames = []
        for index, choice in enumerate(outcome.choices):
            if self._asked.body.get("tools"):
                if choice.text:
                    said = self._choice(index, {"content": choice.text}, _chat_logprobs(choice.logprobs))
                    frames.append(self._chunk([said]))
                if choice.calls:
                    calls = [{"index": place, **call} for place, call in enumerate(_chat_calls(asked, index, choice))]
                    frames.append(self._chunk([self._choice(index, {"tool_calls": calls})]))
            frames.append(self._chunk([{**self._choice(index, {}), "finish_reason": choice.finish}]))
        if self._wants_usage:
            frames.append(self._chunk([], chat_usage(outcome)))
        return [*frames, _DONE]

    def fail(self, asked: Asked | None, failure: Failure) -> list[bytes]:
        return [_data({"error": failure.document})]

    def _chunk(self, choices: list[Json], usage: Json | None = None) -> bytes:
        chunk = {**_head(self._asked, "chat.completion.chunk", self._asked.body["model"]), "choices": choices}
        return _data(chunk | {"usage": usage} if self._wants_usage else chunk)

    @staticmethod
    def _choice(index: int, delta: Json, logprobs: Json | None = None) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


class CompletionShape:
    """Chunks of `text_completion` and `[DONE]`."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._wants_usage = bool((asked.body.get("stream_options") or {}).get("include_usage"))
        self._offsets: dict[int, int] = {}

    def begin(self) -> list[bytes]:
        return []

    def more(self, record: Record) -> list[bytes]:
        frames = []
        for index, text, logprobs in record:
            offset = self._offsets.get(index, 0)
            self._offsets[index] = offset + len(text)
            frames.append(self._chunk([self._choice(index, text, _text_logprobs(logprobs, offset))]))
        return frames

    def finish(self, asked: Asked, outcome: Outcome) -> list[bytes]:
        frames = [
            self._chunk([{**self._choice(index, ""), "finish_reason": choice.finish}])
            for index, choice in enumerate(outcome.choices)
        ]
        if self._wants_usage:
            frames.append(self._chunk([], chat_usage(outcome)))
        return [*frames, _DONE]

    def fail(self, asked: Asked | None, failure: Failure) -> list[bytes]:
        return [_data({"error": failure.document})]

    def _chunk(self, choices: list[Json], usage: Json | None = None) -> bytes:
        chunk = {**_head(self._asked, "text_completion", self._asked.body["model"]), "choices": choices}
        return _data(chunk | {"usage": usage} if self._wants_usage else chunk)

    @staticmethod
    def _choice(index: int, text: str, logprobs: Json | None = None) -> Json:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}


class ResponseShape:
    """The events of a response. Each has a number that depends on the request and its answer alone.

    `after`: numbers up to this one are left out, for a client that has them.
    """

    def __init__(self, asked: Asked, after: int = -1) -> None:
        self._asked, self._after, self._number = asked, after, 0
        self._opened = False
        self._text = ""

    def begin(self) -> list[bytes]:
        waiting = response(_in_state(self._asked, "queued" if self._asked.background else "in_progress"))
        frames = self._event("response.created", response=waiting)
        if self._asked.background:
            frames += self._event("response.queued", response=waiting)
        return frames + self._event("response.in_progress", response=response(_in_state(self._asked, "in_progress")))

    def more(self, record: Record) -> list[bytes]:
        if self._asked.body.get("tools"):
            return []
        frames = [] if self._opened else self._open()
        for _, text, logprobs in record:
            self._text += text
            shown = [_response_logprob(one) for one in logprobs or ()]
            frames += self._event("response.output_text.delta", **self._place(), delta=text, logprobs=shown)
        return frames

    def finish(self, asked: Asked, outcome: Outcome) -> list[bytes]:
        choice, status = outcome.choices[0], _item_status(asked)
        frames = []
        if choice.text or not choice.calls:
            if not self._opened:
                frames += self._open()
                if choice.text:
                    frames += self._event("response.output_text.delta", **self._place(), delta=choice.text, logprobs=[])
            part = _text_part(choice.text, choice.logprobs)
            shown = part["logprobs"]
            frames += self._event("response.output_text.done", **self._place(), text=choice.text, logprobs=shown)
            frames += self._event("response.content_part.done", **self._place(), part=part)
            item = _message_item(asked, [part], status)
            frames += self._event("response.output_item.done", output_index=0, item=item)
        first = 1 if choice.text else 0
        for index, call in enumerate(choice.calls):
            place = {"item_id": f"fc_{asked.core}{index}", "output_index": first + index}
            empty = _call_item(asked, index, call.name, "", "in_progress")
            frames += self._event("response.output_item.added", output_index=first + index, item=empty)
            frames += self._event("response.function_call_arguments.delta", **place, delta=call.arguments)
            done = {**place, "name": call.name, "arguments": call.arguments}
            frames += self._event("response.function_call_arguments.done", **done)
            item = _call_item(asked, index, call.name, call.arguments, "completed")
            frames += self._event("response.output_item.done", output_index=first + index, item=item)
        return frames + self._event(f"response.{asked.state}", response=response(asked))

    def fail(self, asked: Asked | None, failure: Failure) -> list[bytes]:
        if asked is not None and asked.state == "failed":
            return self._event("response.failed", response=response(asked))
        return self._event("error", code=failure.code, message=failure.message, param=failure.param)

    def _open(self) -> list[bytes]:
        self._opened = True
        item = _message_item(self._asked, [], "in_progress")
        added = self._event("response.output_item.added", output_index=0, item=item)
        return added + self._event("response.content_part.added", **self._place(), part=_text_part("", None))

    def _place(self) -> Json:
        return {"item_id": f"msg_{self._asked.core}", "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **members: Any) -> list[bytes]:
        number, self._number = self._number, self._number + 1
        if number <= self._after:
            return []
        data = orjson.dumps({"type": kind, "sequence_number": number, **members})
        return [b"event: %s\ndata: %s\n\n" % (kind.encode(), data)]


def shape(asked: Asked, after: int = -1) -> Shape:
    """The stream of a request's kind."""
    if asked.kind == "response":
        return ResponseShape(asked, after)
    return ChatShape(asked) if asked.kind == "chat" else CompletionShape(asked)


_DONE = b"data: [DONE]\n\n"


def _data(value: Json) -> bytes:
    return b"data: %s\n\n" % orjson.dumps(value)


# ---- parts


def _head(asked: Asked, kind: str, model: str) -> Json:
    head = {"id": asked.public_id, "object": kind, "created": unix(asked.created), "model": model}
    return head | {"system_fingerprint": None, "service_tier": "default"} if asked.kind == "chat" else head


def _chat_message(asked: Asked, index: int, choice: Choice) -> Json:
    message: Json = {
        "role": "assistant",
        "content": choice.text or (None if choice.calls else ""),
        "refusal": None,
        "annotations": [],
    }
    return message | {"tool_calls": _chat_calls(asked, index, choice)} if choice.calls else message


def _chat_calls(asked: Asked, index: int, choice: Choice) -> list[Json]:
    return [
        {
            "id": f"call_{asked.core}{index}{place}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for place, call in enumerate(choice.calls)
    ]


def chat_usage(outcome: Outcome) -> Json:
    """Tokens of a chat or plain completion."""
    return {
        "prompt_tokens": outcome.prompt_tokens,
        "completion_tokens": outcome.completion_tokens,
        "total_tokens": outcome.prompt_tokens + outcome.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": outcome.cached_tokens},
    }


def _response_usage(outcome: Outcome) -> Json:
    return {
        "input_tokens": outcome.prompt_tokens,
        "input_tokens_details": {"cached_tokens": outcome.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": outcome.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": outcome.prompt_tokens + outcome.completion_tokens,
    }


def _chat_logprobs(logprobs: Sequence[TokenLogprob] | None) -> Json | None:
    if logprobs is None:
        return None
    return {
        "content": [
            {
                **_named(one.text, one.logprob),
                "top_logprobs": [_named(text, logprob) for text, logprob in one.top],
            }
            for one in logprobs
        ],
        "refusal": None,
    }


def _named(text: str, logprob: float) -> Json:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _response_logprob(one: TokenLogprob) -> Json:
    return {**_named(one.text, one.logprob), "top_logprobs": [_named(text, logprob) for text, logprob in one.top]}


def _text_logprobs(logprobs: Sequence[TokenLogprob] | None, offset: int) -> Json | None:
    if logprobs is None:
        return None
    offsets = []
    for one in logprobs:
        offsets.append(offset)
        offset += len(one.text)
    return {
        "tokens": [one.text for one in logprobs],
        "token_logprobs": [one.logprob for one in logprobs],
        "top_logprobs": [dict(one.top) for one in logprobs],
        "text_offset": offsets,
    }


def _text_part(text: str, logprobs: Sequence[TokenLogprob] | None) -> Json:
    shown = [_response_logprob(one) for one in logprobs or ()]
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": shown}


def _message_item(asked: Asked, content: list[Json], status: str) -> Json:
    return {"id": f"msg_{asked.core}", "type": "message", "role": "assistant", "status": status, "content": content}


def _call_item(asked: Asked, index: int, name: str, arguments: str, status: str) -> Json:
    return {
        "id": f"fc_{asked.core}{index}",
        "type": "function_call",
        "status": status,
        "call_id": conversation.call_id(asked, index),
        "name": name,
        "arguments": arguments,
    }


def _item_status(asked: Asked) -> str:
    return "incomplete" if asked.state == "incomplete" else "completed"


def _in_state(asked: Asked, state: str) -> Asked:
    return replace(asked, state=state, answer=None, failure=None, ended=None)


def _text_format(body: ResponseBody) -> Json:
    if body.text is None or body.text.format is None:
        return {"type": "text"}
    return body.text.format.model_dump(by_alias=True, exclude_none=True)


def _input_item(item: InputItem, core: str) -> Json:
    match item:
        case InputMessage(role=role, content=content):
            kind = "output_text" if role == "assistant" else "input_text"
            parts: list[Json] = (
                [{"type": kind, "text": content}]
                if isinstance(content, str)
                else [json.loads(part.model_dump_json(exclude_none=True)) for part in content]
            )
            for part in parts:
                if part["type"] == "output_text":
                    part.setdefault("annotations", [])
            return {
                "id": item.id or f"msg_{core}",
                "type": "message",
                "role": role,
                "status": "completed",
                "content": parts,
            }
        case FunctionCallItem():
            shown = {"call_id": item.call_id, "name": item.name, "arguments": item.arguments}
            return {"id": item.id or f"fc_{core}", "type": "function_call", "status": "completed", **shown}
        case FunctionOutputItem(output=output):
            text = output if isinstance(output, str) else "".join(part.text for part in output)
            shown = {"call_id": item.call_id, "output": text}
            return {"id": item.id or f"fco_{core}", "type": "function_call_output", "status": "completed", **shown}
