"""A full disk: refused clearly, nothing corrupt, and it recovers by itself when there is room again."""

import json
import urllib.error
from collections import Counter

from tests.vm.client import Client
from tests.vm.guest import Guest, wait_until


def test_a_full_disk_refuses_clearly_and_recovers(guest: Guest, client: Client, services: list[str]) -> None:
    form = client.form("Full disk")
    kept = [_submit(client, form, number) for number in range(5)]
    # All of it, what is reserved for root too: mongod gets nothing.
    guest.ask("dd if=/dev/zero of=/var/filler bs=1M; dd if=/dev/zero of=/var/filler2 bs=4k; sync")
    assert guest.say("df --output=avail / | tail -n 1") == "0"
    try:
        refused: list[urllib.error.HTTPError] = []
        acknowledged: list[str] = []

        def refuses() -> bool:
            try:
                acknowledged.append(_submit(client, form, 100 + len(acknowledged), big=True))
            except urllib.error.HTTPError as error:
                refused.append(error)
            except OSError as error:
                # One that is cut off says nothing; it does not count as a refusal.
                print(f"no answer: {error}")
            return len(refused) >= 5

        wait_until(refuses, "five refusals, for want of room")
    finally:
        guest.say("rm -f /var/filler /var/filler2; sync")
    # What every client is told: that it is the server's fault and passes, in the form of every other problem.
    print(Counter(error.code for error in refused))
    assert {error.code for error in refused} <= {503, 507}, refused
    assert all(error.headers.get_content_type() == "application/problem+json" for error in refused)
    problems = [json.loads(body) for status, body in client.refusals[-len(refused) :]]
    assert all(problem["status"] in (503, 507) and problem["title"] for problem in problems), problems

    guest.wait_serving(services)
    kept.append(client.insist("POST", f"/api/v1/forms/{form}/responses", {"answers": {"comment": "Room again."}})["id"])
    for identifier in (*kept, *acknowledged):
        assert client.processed(identifier)["id"] == identifier
    assert guest.say("quern audit verify --json >/dev/null && echo holds") == "holds"


def _submit(client: Client, form: str, number: int, big: bool = False) -> str:
    comment = "x" * 90_000 if big else "Small."
    path = f"/api/v1/forms/{form}/responses"
    return str(client.call("POST", path, {"answers": {"number": number, "comment": comment}})["id"])
