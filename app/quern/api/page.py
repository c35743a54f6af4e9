"""Lists: a page at a time, with a cursor to the next."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from quern.api.problem import Fault, Problem
from quern.store import cursor, moment

Item = TypeVar("Item", bound=BaseModel)


class PageQuery(BaseModel):
    """Parameters of every list."""

    model_config = ConfigDict(extra="forbid")

    limit: Annotated[int, Field(ge=1, le=200)] = 50
    cursor: Annotated[str, Field(max_length=500)] | None = Field(None, description="`next_cursor` of the page before")

    def position(self, length: int) -> list[str] | None:
        """The position to go on from. Raises Problem for a cursor that this list did not make."""
        if self.cursor is None:
            return None
        try:
            return cursor.decode(self.cursor, length)
        except cursor.BadCursorError:
            raise bad_cursor() from None

    def moment_position(self) -> list[str] | None:
        """The position (moment, identifier) to go on from. Raises Problem for a cursor that this list did not make."""
        position = self.position(2)
        if position is None:
            return None
        try:
            return [moment.parse(position[0]).isoformat(), position[1]]
        except ValueError:
            raise bad_cursor() from None


def bad_cursor() -> Problem:
    """The answer to a cursor that the list did not make."""
    detail = "not a cursor of this list"
    return Problem(422, detail, kind="validation", errors=[Fault(pointer="?cursor", detail=detail)])


class Page(BaseModel, Generic[Item]):
    """One page of a list."""

    items: list[Item]
    next_cursor: str | None = Field(description="null on the last page")


def page(
    documents: Sequence[Any], limit: int, show: Callable[[Any], Item], position: Callable[[Any], Sequence[str]]
) -> tuple[list[Item], str | None]:
    """The items of a page from `limit` + 1 documents, and the cursor to the next page."""
    shown = documents[:limit]
    after = cursor.encode(*position(shown[-1])) if len(documents) > limit else None
    return [show(document) for document in shown], after
