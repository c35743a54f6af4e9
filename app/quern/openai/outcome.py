"""What a request came to, in the engine's terms; `answer` gives it the shape that a client expects."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from quern.inference.protocol import TokenLogprob
from quern.openai.tools import Call

Piece = tuple[int, str, list[TokenLogprob] | None]
"""More of a choice: its index, text, and the log-probabilities of its tokens."""
Record = list[Piece]
"""What was told at one time."""


class Choice(BaseModel):
    """One answer."""

    text: str
    finish: Literal["stop", "length", "tool_calls"]
    calls: list[Call] = Field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None


class Outcome(BaseModel):
    """The end of a generation that went well. `cuts`: for each record that was streamed, (choice, characters, tokens).

    `cuts` divides the answer again as it was told, so that a stream can be resumed long after.
    """

    model: str
    choices: list[Choice]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cuts: list[list[tuple[int, int, int]]] = Field(default_factory=list)

    def records(self) -> list[Record]:
        """The whole answer as it was streamed; what was not streamed comes as one record."""
        at = [(0, 0)] * len(self.choices)
        records: list[Record] = []
        for cut in self.cuts:
            record: Record = []
            for index, length, tokens in cut:
                record.append(self._piece(index, at[index], (at[index][0] + length, at[index][1] + tokens)))
                at[index] = (at[index][0] + length, at[index][1] + tokens)
            records.append(record)
        rest = [
            self._piece(index, at[index], (len(choice.text), len(choice.logprobs or ())))
            for index, choice in enumerate(self.choices)
            if at[index][0] < len(choice.text) or at[index][1] < len(choice.logprobs or ())
        ]
        return [*records, rest] if rest else records

    def _piece(self, index: int, start: tuple[int, int], end: tuple[int, int]) -> Piece:
        choice = self.choices[index]
        logprobs = None if choice.logprobs is None else choice.logprobs[start[1] : end[1]]
        return index, choice.text[start[0] : end[0]], logprobs


class Failure(BaseModel):
    """The end of a request that did not go well, as its client is told."""

    status: int
    message: str
    code: str
    param: str | None = None

    @property
    def document(self) -> dict[str, Any]:
        """The `error` member of an answer."""
        kind = "invalid_request_error" if 400 <= self.status < 500 else "server_error"
        return {"message": self.message, "type": kind, "param": self.param, "code": self.code}
