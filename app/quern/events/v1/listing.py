"""Lists in OpenAI's form: `after` is the identifier of the last item seen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from quart import request

from quern.openai.error import ApiError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Listing:
    """What a client asked of a list."""

    limit: int
    after: str | None
    newest_first: bool

    @classmethod
    def of_request(cls, *, newest_first: bool, most: int, default: int = 20) -> "Listing":
        """From the current request's query.

        Raises:
            ApiError: 400.
        """
        given = request.args.get("limit", str(default))
        if not (given.isascii() and given.isdigit() and len(given) < 7 and 1 <= int(given) <= most):
            raise ApiError(400, f"limit: expected 1 to {most}.", code="invalid_value", param="limit")
        order = request.args.get("order", "desc" if newest_first else "asc")
        if order not in ("asc", "desc"):
            raise ApiError(400, "order: expected asc or desc.", code="invalid_value", param="order")
        return cls(int(given), request.args.get("after"), order == "desc")

    def page(self, found: Sequence[Item], show: Callable[[Item], dict[str, Any]]) -> dict[str, Any]:
        """A page from `limit` + 1 items."""
        data = [show(item) for item in found[: self.limit]]
        return {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": len(found) > self.limit,
        }
