"""Forward the journal to a collector by OTLP over HTTP (JSON): what was accepted is never sent again, the rest waits.

The journal is the queue: the cursor of the last accepted entry is kept on disk. An entry may come twice after a crash;
it is lost only when the collector stays away for longer than journald keeps it. Entries of one unit share a resource.
Protocol: OpenTelemetry's OTLP 1.x, `POST /v1/logs`, partial success and retryable statuses included. Standard library
only: the system's Python runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import select
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BATCH_ENTRIES = 256
BATCH_SECONDS = 2.0
LONGEST_PAUSE_SECONDS = 60.0
TIMEOUT_SECONDS = 30.0
#: OTLP: these may be sent again; any other refusal would only be refused again.
RETRYABLE = frozenset({408, 429, 502, 503, 504})
#: Of syslog's priorities, OpenTelemetry's severity numbers and names.
SEVERITIES = [
    (24, "FATAL"),
    (22, "FATAL"),
    (21, "FATAL"),
    (17, "ERROR"),
    (13, "WARN"),
    (10, "INFO"),
    (9, "INFO"),
    (5, "DEBUG"),
]
#: Of the names that Quern's own lines use for a level.
LEVELS = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}

Entry = dict[str, Any]


def text_of(value: object) -> str:
    """What a field of journald's JSON says: a string, or the bytes of one that is not UTF-8, or several of them."""
    if isinstance(value, list):
        if all(isinstance(byte, int) for byte in value):
            return bytes(value).decode(errors="replace")
        return "\n".join(text_of(part) for part in value)
    return "" if value is None else str(value)


def attribute(key: str, value: object) -> dict[str, Any]:
    return {"key": key, "value": {"stringValue": value if isinstance(value, str) else json.dumps(value)}}


def record(entry: Entry) -> dict[str, Any]:
    """One entry as OTLP's LogRecord. A line of Quern's own is taken apart: its message, and the rest as attributes."""
    message = text_of(entry.get("MESSAGE"))
    priority = int(entry["PRIORITY"]) if str(entry.get("PRIORITY", "")) in "01234567" and entry.get("PRIORITY") else 6
    attributes = []
    if message.startswith("{"):
        try:
            fields = json.loads(message)
        except ValueError:
            fields = {}
        if isinstance(fields.get("message"), str):
            message = fields.pop("message")
            priority = LEVELS.get(fields.pop("level", ""), priority)
            attributes = [attribute(key, value) for key, value in fields.items() if key != "time"]
    if "_PID" in entry:
        attributes.append(attribute("process.pid", text_of(entry["_PID"])))
    number, name = SEVERITIES[priority]
    moment = str(int(entry["__REALTIME_TIMESTAMP"]) * 1000)
    return {
        "timeUnixNano": moment,
        "observedTimeUnixNano": moment,
        "severityNumber": number,
        "severityText": name,
        "body": {"stringValue": message},
        "attributes": attributes,
    }


def request_of(entries: list[Entry]) -> dict[str, Any]:
    """An ExportLogsServiceRequest: one resource for each unit of each host."""
    resources: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in entries:
        service = text_of(entry.get("_SYSTEMD_UNIT") or entry.get("SYSLOG_IDENTIFIER") or "kernel")
        where = (text_of(entry.get("_HOSTNAME")), service.removesuffix(".service"))
        resources.setdefault(where, []).append(record(entry))
    return {
        "resourceLogs": [
            {
                "resource": {"attributes": [attribute("host.name", host), attribute("service.name", service)]},
                "scopeLogs": [{"scope": {"name": "journal"}, "logRecords": records}],
            }
            for (host, service), records in resources.items()
        ]
    }


def batches(stream: int, clock: Callable[[], float] = time.monotonic) -> Iterator[list[Entry]]:
    """Entries from a pipe of JSON lines, as many as arrive within a moment; ends with the pipe."""
    entries: list[Entry] = []
    rest, since = b"", clock()
    while True:
        ready, _, _ = select.select([stream], [], [], BATCH_SECONDS)
        if ready:
            chunk = os.read(stream, 1 << 16)
            if not chunk:
                break
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if not entries:
                    since = clock()
                entries.append(json.loads(line))
                if len(entries) >= BATCH_ENTRIES:
                    yield entries
                    entries = []
        if entries and (not ready or clock() - since >= BATCH_SECONDS):
            yield entries
            entries = []
    if entries:
        yield entries


def say(importance: int, words: str) -> None:
    """One line for the journal; systemd reads the number as syslog's priority."""
    sys.stderr.write(f"<{importance}>{words}\n")
    sys.stderr.flush()


class Collector:
    """The far end: takes a batch, or is asked again until it does."""

    def __init__(self, endpoint: str, authority: Path | None, token: str | None) -> None:
        self._endpoint = endpoint
        # No proxy of the environment's, and no other scheme or host by a redirect.
        context = ssl.create_default_context(cafile=str(authority) if authority else None)
        self._opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.HTTPSHandler(context=context),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.HTTPDefaultErrorHandler(),
        ):
            self._opener.add_handler(handler)
        self._headers = {"Content-Type": "application/json", "User-Agent": "quern-forward"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"

    def take(self, entries: list[Entry]) -> None:
        """Return when the batch was accepted, or refused for good (which is said on standard error)."""
        body = json.dumps(request_of(entries)).encode()
        pause = 1.0
        while True:
            # main() refuses any scheme but https.
            request = urllib.request.Request(self._endpoint, body, self._headers, method="POST")  # noqa: S310
            try:
                with self._opener.open(request, timeout=TIMEOUT_SECONDS) as answer:
                    said = json.loads(answer.read() or b"{}")
                rejected = int((said.get("partialSuccess") or {}).get("rejectedLogRecords") or 0)
                if rejected:
                    say(4, f"the collector refused {rejected} of {len(entries)} entries")
                return
            except urllib.error.HTTPError as refusal:
                if refusal.code not in RETRYABLE and refusal.code < 500:
                    say(3, f"the collector refused {len(entries)} entries: status {refusal.code}")
                    return
                asked = refusal.headers.get("Retry-After") or ""
                reason, wish = f"status {refusal.code}", float(asked) if asked.isdigit() else 0.0
            except (OSError, ValueError) as error:
                reason, wish = str(error), 0.0
            if pause == 1.0:
                say(4, f"{self._endpoint}: {reason}; trying on")
            time.sleep(min(max(wish, pause * (50 + secrets.randbelow(51)) / 100), LONGEST_PAUSE_SECONDS))
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)


def keep(cursor: Path, value: str) -> None:
    partial = cursor.with_suffix(".partial")
    partial.write_text(value)
    partial.replace(cursor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("endpoint", help="https://HOST:PORT/v1/logs")
    parser.add_argument("--cursor", type=Path, required=True, help="file that names the last accepted entry")
    parser.add_argument("--authority", type=Path, help="PEM file that the collector is trusted by")
    parser.add_argument("--token", type=Path, help="file with a bearer token")
    arguments = parser.parse_args()
    if not arguments.endpoint.startswith("https://"):
        sys.exit(f"forward_otlp: expected an https address, found {arguments.endpoint!r}; set it in the inventory")
    token = arguments.token.read_text().strip() if arguments.token else None
    collector = Collector(arguments.endpoint, arguments.authority, token)
    # From now on, when nothing was sent yet: what is past may be of another's time.
    known = arguments.cursor.read_text() if arguments.cursor.exists() else ""
    since = ["--no-tail", f"--after-cursor={known}"] if known else ["--lines=0"]
    # What it says itself is not sent: a refusal would cause the next.
    # Without --merge, --follow shows the present boot only: what waited when the machine went down would never be sent.
    # (And in a container that hides /proc, that boot's identifier is the outer kernel's, so nothing would be shown.)
    command = ["journalctl", "--quiet", "--output=json", "--all", "--follow", "--merge", *since]
    own = os.environ.get("QUERN_FORWARD_UNIT", "quern-forward.service")
    with subprocess.Popen(command, stdout=subprocess.PIPE) as journal:
        pipe = journal.stdout.fileno() if journal.stdout else -1
        for entries in batches(pipe):
            others = [entry for entry in entries if entry.get("_SYSTEMD_UNIT") != own]
            if others:
                collector.take(others)
            keep(arguments.cursor, entries[-1]["__CURSOR"])
    sys.exit(f"forward_otlp: journalctl ended with {journal.returncode}")


if __name__ == "__main__":
    main()
