"""A conversation becomes tokens through the model's own chat template, without letting any text in it forge a turn.

The template (Jinja, from the model file) is rendered with a random mark in place of every text from outside. What lies
between the marks is the template's, and its control tokens count; each text is tokenised apart, as plain text. So an
answer that contains `<|im_end|>` is only those ten characters.
"""

from __future__ import annotations

import json
import re
import secrets
from datetime import UTC, datetime
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quern.inference.llama import Vocabulary
from quern.inference.protocol import NO_TOOLS, Message

#: For model files that bring no template: the form that most small models were tuned on (ChatML).
FALLBACK_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class TemplateRefusedError(Exception):
    """The model's template does not take this conversation; the text is the template's own complaint."""


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(value: Any, indent: int | None = None, **_ignored: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _strftime_now(form: str) -> str:
    return datetime.now(UTC).strftime(form)


class ChatTemplate:
    """A model's chat template, ready to use."""

    def __init__(self, source: str | None, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, autoescape=False)
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source or FALLBACK_TEMPLATE)
        except TemplateError as error:
            raise TemplateRefusedError(f"the model's chat template does not read as Jinja: {error}") from error
        self._bos = vocabulary.text(vocabulary.bos) if vocabulary.bos >= 0 else ""
        self._eos = vocabulary.text(vocabulary.eos) if vocabulary.eos >= 0 else ""
        self.knows_tools = "tools" in (source or "")

    def tokens(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """The prompt that asks the model for the next turn.

        Raises:
            TemplateRefusedError: the template does not take these messages, or no tools.
        """
        if tools and not self.knows_tools:
            raise TemplateRefusedError(NO_TOOLS)
        nonce = secrets.token_hex(12)
        texts: list[str] = []

        def mark(value: str) -> str:
            # The blanks tell whether the template trims its texts: then they are gone from around the mark.
            texts.append(value)
            return f" q{nonce}x{len(texts) - 1}y "

        def mark_within(value: Any) -> Any:
            # Templates look into tools and calls, so only what could forge a control token is marked there.
            if isinstance(value, str):
                return (
                    mark(json.dumps(value, ensure_ascii=False)[1:-1])
                    if self._vocabulary.has_control_text(value)
                    else value
                )
            if isinstance(value, list):
                return [mark_within(item) for item in value]
            if isinstance(value, dict):
                return {mark_within(str(key)): mark_within(item) for key, item in value.items()}
            return value

        turns = []
        for message in messages:
            turn = message.model_dump(exclude_none=True, exclude={"content", "tool_calls", "name"})
            # Templates ask whether there is any: of a call alone there is none.
            turn["content"] = mark(message.content) if message.content else ""
            if message.name is not None:
                turn["name"] = mark_within(message.name)
            if message.tool_calls:
                turn["tool_calls"] = mark_within(message.tool_calls)
            turns.append(turn)
        try:
            rendered = self._template.render(
                messages=turns,
                tools=mark_within(tools),
                add_generation_prompt=True,
                bos_token=self._bos,
                eos_token=self._eos,
            )
        except TemplateError as error:
            raise TemplateRefusedError(f"the model's chat template refuses these messages: {error}") from error
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError) as error:
            raise TemplateRefusedError(
                f"the model's chat template fails on these messages: {type(error).__name__}"
            ) from error
        return self._tokenize(rendered, nonce, texts)

    def _tokenize(self, rendered: str, nonce: str, texts: list[str]) -> list[int]:
        tokens: list[int] = []
        end = 0
        # Adjoining text of one kind is tokenised in one go, as words and blanks often share a token.
        for found in re.finditer(rf"( ?)q{nonce}x(\d+)y( ?)", rendered):
            tokens += self._vocabulary.tokenize(rendered[end : found.start()], control=True)
            text = texts[int(found[2])]
            text = text if found[1] else text.lstrip()
            tokens += self._vocabulary.tokenize(text if found[3] else text.rstrip(), control=False)
            end = found.end()
        tokens += self._vocabulary.tokenize(rendered[end:], control=True)
        wants_bos = self._vocabulary.adds_bos and (not tokens or tokens[0] != self._vocabulary.bos)
        return [self._vocabulary.bos, *tokens] if wants_bos else tokens
