"""What is killed under systemd in the middle of its work comes back, and nothing that was accepted is lost."""

import time
import urllib.error
import uuid
from collections.abc import Callable

from testinfra.host import Host

from quern.embedded.receiver import ReceivedRequest, Receiver
from tests.host.client import Client

PATIENCE_SECONDS = 300
RESPONSES = 6
VICTIMS = ["quern-worker@batched", "quern-worker@webhooks", "quern-relay", "quern-engine", "mongod", "quern-api@1"]


def submit(client: Client, form: str, text: str) -> str:
    """Submit until it is accepted, with one Idempotency-Key: the database may just have been killed."""
    key, deadline = uuid.uuid4().hex, time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            path = f"/api/v1/forms/{form}/responses"
            return str(client.call("POST", path, {"answers": {"comment": text}}, **{"Idempotency-Key": key})["id"])
        except (urllib.error.URLError, OSError):
            assert time.monotonic() < deadline
            time.sleep(0.5)


def carrying(response: str) -> Callable[[ReceivedRequest], bool]:
    return lambda found: response.encode() in found.body


def test_nothing_accepted_is_lost_when_workers_and_mongod_are_killed(
    host: Host, client: Client, receiver: Receiver
) -> None:
    hook = client.call("POST", "/api/v1/webhooks", {"url": f"{receiver.url}/kills"})
    steps = [
        {"name": "mood", "type": "sentiment", "fields": ["comment"]},
        {"name": "summary", "type": "summarize", "fields": ["comment"], "max_words": 12},
        {"name": "notify", "type": "webhook", "needs": ["mood", "summary"], "endpoint": hook["id"]},
    ]
    form = client.form("Kills", workflow={"steps": steps})
    accepted = []
    for number, victim in zip(range(RESPONSES), VICTIMS, strict=True):
        accepted.append(submit(client, form, f"Parcel {number} came two days late, and nobody answered my calls."))
        before = host.check_output("systemctl show -p MainPID --value %s", victim)
        host.check_output("systemctl kill --kill-whom=main -s SIGKILL %s", victim)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while host.check_output("systemctl show -p MainPID --value %s", victim) in ("0", before):
            assert time.monotonic() < deadline, f"expected {victim} to come back"
            time.sleep(0.5)

    for response in accepted:
        results = client.processed(response, PATIENCE_SECONDS)["results"]
        assert results["mood"]["label"]
        assert results["summary"]["text"]
        receiver.wait_for(carrying(response), PATIENCE_SECONDS)
