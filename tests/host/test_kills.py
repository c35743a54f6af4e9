"""What is killed under systemd in the middle of its work comes back, and nothing that was accepted is lost."""

import time
import urllib.error
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from testinfra.host import Host

from quern.embedded.receiver import Answer, ReceivedRequest, Receiver
from tests.host.client import Client

PATIENCE_SECONDS = 300
#: Far longer than a kill takes to follow.
SLOW_SECONDS = 60.0
_AS_RELAY = """
url=$(systemd-creds decrypt --name=quern_redis_queue_url /etc/credstore.encrypted/quern-relay.quern_redis_queue_url -)
password=${url#*://*:}
export REDISCLI_AUTH="${password%%@*}"
printf '%s\\n' "$@" | redis-cli -s /run/redis-queue/redis.sock --user quern-relay
"""


def submit(client: Client, form: str, number: int) -> str:
    """Submit until it is accepted, with one Idempotency-Key: the database may just have been killed."""
    text = f"Parcel {number} came two days late, and nobody answered my calls."
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


def running(client: Client, response: str) -> dict[str, Any]:
    """A job of the response, once one is being worked on."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        for job in client.call("GET", "/api/v1/jobs?status=running&limit=100")["items"]:
            if job["response"] == response:
                return dict(job)
        assert time.monotonic() < deadline, f"expected a job of {response} to run"
        time.sleep(0.1)


def kill(host: Host, unit: str) -> None:
    """End it without a word, and wait until systemd has brought it back."""
    before = host.check_output("systemctl show -p MainPID --value %s", unit)
    host.check_output("systemctl kill --kill-whom=main -s SIGKILL %s", unit)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while host.check_output("systemctl show -p MainPID --value %s", unit) in ("0", before):
        assert time.monotonic() < deadline, f"expected {unit} to come back"
        time.sleep(0.5)


@contextmanager
def frozen(host: Host, unit: str) -> Iterator[None]:
    """It does nothing meanwhile: whoever waits for it is in the middle of its work until then."""
    host.check_output("systemctl kill -s SIGSTOP %s", unit)
    try:
        yield
    finally:
        host.check_output("systemctl kill -s SIGCONT %s", unit)


@pytest.fixture(scope="module")
def form(client: Client, receiver: Receiver) -> str:
    hook = client.call("POST", "/api/v1/webhooks", {"url": f"{receiver.url}/kills"})
    steps = [
        {"name": "mood", "type": "sentiment", "fields": ["comment"]},
        {"name": "summary", "type": "summarize", "fields": ["comment"], "max_words": 12},
        {"name": "notify", "type": "webhook", "needs": ["mood", "summary"], "endpoint": hook["id"]},
    ]
    return client.form("Kills", workflow={"steps": steps})


def ends_well(client: Client, receiver: Receiver, response: str) -> None:
    results = client.processed(response, PATIENCE_SECONDS)["results"]
    assert results["mood"]["label"]
    assert results["summary"]["text"]
    receiver.wait_for(carrying(response), PATIENCE_SECONDS)


def was_rescued(client: Client, job: dict[str, Any]) -> bool:
    log = client.call("GET", f"/api/v1/jobs/{job['id']}")["log"]
    return "rescued" in [event["type"] for event in log]


def test_a_step_whose_worker_is_killed_is_done_by_another(
    host: Host, client: Client, receiver: Receiver, form: str
) -> None:
    with frozen(host, "quern-engine"):
        response = submit(client, form, 1)
        job = running(client, response)
        kill(host, "quern-worker@batched")
    ends_well(client, receiver, response)
    assert was_rescued(client, job)


def test_a_step_whose_engine_is_killed_is_computed_again(
    host: Host, client: Client, receiver: Receiver, form: str
) -> None:
    with frozen(host, "quern-engine"):
        response = submit(client, form, 2)
        running(client, response)
        kill(host, "quern-engine")
    ends_well(client, receiver, response)


def test_a_webhook_whose_worker_is_killed_is_sent_again(
    host: Host, client: Client, receiver: Receiver, form: str
) -> None:
    receiver.script(Answer(delay=SLOW_SECONDS), path="/kills")
    response = submit(client, form, 3)
    receiver.wait_for(carrying(response), PATIENCE_SECONDS)
    job = running(client, response)
    assert job["kind"] == "webhook"
    kill(host, "quern-worker@webhooks")
    receiver.wait_for_count(2, carrying(response), PATIENCE_SECONDS)
    ends_well(client, receiver, response)
    assert was_rescued(client, job)


def test_a_response_that_waits_for_a_relay_that_is_killed_is_relayed(
    host: Host, client: Client, receiver: Receiver, form: str
) -> None:
    with frozen(host, "quern-relay"):
        response = submit(client, form, 4)
        assert client.call("GET", f"/api/v1/responses/{response}")["status"] != "processed"
        kill(host, "quern-relay")
    ends_well(client, receiver, response)


@pytest.mark.parametrize("victim", ["mongod", "quern-api@1"])
def test_what_was_accepted_while_its_server_is_killed_is_there(
    host: Host, client: Client, receiver: Receiver, form: str, victim: str
) -> None:
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(submit, client, form, number) for number in range(10, 18)]
        # In the middle of them.
        accepted = [waiting[0].result()]
        kill(host, victim)
        accepted += [one.result() for one in waiting[1:]]
    for response in accepted:
        ends_well(client, receiver, response)


def as_relay(host: Host, *commands: str) -> list[str]:
    """What the queues' Redis answers to the relay's account."""
    said: str = host.run("sh -c %s relay" + " %s" * len(commands), _AS_RELAY, *commands).stdout
    return said.splitlines()


def test_a_killed_redis_still_knows_what_it_took_in_one_transaction(host: Host) -> None:
    assert as_relay(host, "MULTI", "LPUSH huey.kills one", "LPUSH huey.kills two", "EXEC")[-2:] == ["1", "2"]
    # The log is flushed each second; what the kernel has outlives the process.
    kill(host, "redis@queue")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while as_relay(host, "PING") != ["PONG"]:
        assert time.monotonic() < deadline, "expected the queues' Redis to answer again"
        time.sleep(0.5)
    assert as_relay(host, "LRANGE huey.kills 0 -1") == ["two", "one"]
    as_relay(host, "DEL huey.kills")
