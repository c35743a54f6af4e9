"""What was said before a response: the chain of `previous_response_id`, and how answers become input again."""

from collections.abc import Sequence
from typing import Final

from quern.openai import ledger, prompt
from quern.openai.ledger import Asked
from quern.openai.request import FunctionCallItem, InputItem, InputMessage, ResponseBody
from quern.store.connection import Db

#: Responses that a conversation reaches back.
LONGEST: Final = 100


def before(db: Db, asked: Asked) -> Sequence[InputItem]:
    """The items before this response, oldest first. One that was deleted since is missing, with all before it."""
    turns: list[list[InputItem]] = []
    earlier = asked.previous
    while earlier is not None and len(turns) < LONGEST:
        found = ledger.get(db, asked.tenant, earlier)
        if found is None:
            break
        turns.append([*prompt.input_items(ResponseBody.model_validate(found.body)), *answered(found)])
        earlier = found.previous
    return [item for turn in reversed(turns) for item in turn]


def answered(asked: Asked) -> list[InputItem]:
    """What a response answered, as items of a later input."""
    outcome = asked.outcome
    if outcome is None:
        return []
    choice = outcome.choices[0]
    said: list[InputItem] = [InputMessage(role="assistant", content=choice.text)] if choice.text else []
    calls = [
        FunctionCallItem(type="function_call", call_id=call_id(asked, index), name=call.name, arguments=call.arguments)
        for index, call in enumerate(choice.calls)
    ]
    return [*said, *calls]


def call_id(asked: Asked, index: int) -> str:
    """The identifier of a call, by which its output is given back."""
    return f"call_{asked.core}{index}"
