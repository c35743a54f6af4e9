"""What the front door writes: its access log (one JSON object a line) and what the firewall's rules found."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import orjson

#: Identifiers in a path: two requests for two forms are one route.
_IDENTIFIER = re.compile(r"/[a-z]{3}_[0-9A-Za-z]{20,}(?=/|$)")
_FIELD = re.compile(r'\[(id|msg|data|uri|unique_id) "((?:[^"\\]|\\.)*)"\]')
_PLACE = re.compile(r"against variable `([^']*)'|found within (\S+):")


@dataclass(frozen=True)
class Request:
    """One request, as the front door saw it."""

    time: datetime
    method: str
    route: str
    status: int
    seconds: float
    request_id: str


@dataclass(frozen=True)
class Finding:
    """What one rule found in one request; never what the client wrote there."""

    time: datetime
    rule: str
    message: str
    place: str
    path: str
    request_id: str


def route_of(path: str) -> str:
    """The path with identifiers taken out: `/api/v1/forms/{id}/responses`."""
    return _IDENTIFIER.sub("/{id}", path.partition("?")[0])


def request_of(line: str) -> Request | None:
    """A line of the access log; None for one that is cut off or not of this format."""
    try:
        entry: dict[str, Any] = orjson.loads(line)
        return Request(
            datetime.fromisoformat(entry["time"]).astimezone(UTC),
            entry["method"],
            route_of(entry["path"]),
            int(entry["status"]),
            float(entry["seconds"]),
            entry["request_id"],
        )
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        return None


def finding_of(line: str) -> Finding | None:
    """A line that ModSecurity wrote to nginx's error log (times are local); None for any other."""
    if "ModSecurity: " not in line:
        return None
    fields = dict(_FIELD.findall(line))
    if "id" not in fields:
        return None
    try:
        time = datetime.strptime(line[:19], "%Y/%m/%d %H:%M:%S").astimezone(UTC)
    except ValueError:
        return None
    place = _PLACE.search(line)
    name = next((part for part in place.groups() if part), "") if place else ""
    return Finding(
        time,
        fields["id"],
        fields.get("msg", ""),
        name.removeprefix("ARGS:"),
        fields.get("uri", ""),
        fields.get("unique_id", ""),
    )
