"""Every service is confined, and its profile refuses what it has no business doing."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from quern.embedded.receiver import Receiver
from quern.embedded.smtp_sink import SmtpSink
from tests.vm.client import Client
from tests.vm.confinement import denials, modes, outcomes
from tests.vm.guest import Guest

EXPECTED = yaml.safe_load((Path(__file__).parent / "expected.yml").read_text())
PROFILES = {**EXPECTED["profiles"], **EXPECTED["jobs"]}
COMMENT = "I waited two hours for my parcel, and the driver was rude. Please call me back about order 4711."


def test_every_process_of_every_service_is_confined(guest: Guest, expected: dict[str, Any]) -> None:
    found = modes(guest, expected["profiles"])
    assert {process: mode for process, mode in found.items() if mode[0] != mode[1]} == {}
    assert len(found) >= len(EXPECTED["profiles"])


def test_no_profile_only_complains(guest: Guest) -> None:
    status = json.loads(guest.say("aa-status --json"))
    assert {name: status["profiles"].get(name) for name in PROFILES} == dict.fromkeys(PROFILES, "enforce")


@pytest.mark.parametrize("profile", PROFILES)
def test_acts_fail_under_the_profile_and_succeed_without_it(
    guest: Guest, profile: str, expected: dict[str, Any]
) -> None:
    allowed = expected["allowed"].get(profile, [])
    found = outcomes(guest, profile, PROFILES[profile][0])
    assert {act: said for act, said in found.items() if said["unconfined"] != "done"} == {}
    refused = {act for act, said in found.items() if said["confined"] == "refused"}
    assert found.keys() - refused == set(allowed), found
    assert len(refused) >= 10


def test_the_main_job_is_done_without_a_denial(
    guest: Guest, client: Client, receiver: Receiver, mail_relay: SmtpSink
) -> None:
    since = guest.say("date +%s.%N")
    hook = client.insist("POST", "/api/v1/webhooks", {"url": f"https://10.0.2.2:{receiver.port}/quern"})
    form = client.form(
        "AppArmor",
        {"name": "summary", "type": "summarize", "fields": ["comment"], "max_words": 10},
        {"name": "mood", "type": "sentiment", "fields": ["comment"]},
        {"name": "vector", "type": "embed", "fields": ["comment"]},
        {
            "name": "thanks",
            "type": "email",
            "needs": ["mood"],
            "to": {"field": "email"},
            "subject": "Your feedback",
            "body": "Thank you ({{ response.id }})",
        },
        {"name": "notify", "type": "webhook", "needs": ["summary", "mood", "vector"], "endpoint": hook["id"]},
    )
    accepted = client.insist(
        "POST",
        f"/api/v1/forms/{form}/responses",
        {"answers": {"number": 1, "email": "ada@example.org", "comment": COMMENT}},
        **{"Idempotency-Key": "apparmor-1"},
    )
    with guest.time_for_ai():
        results = client.processed(accepted["id"])["results"]
    assert results["summary"]["text"]
    assert results["mood"]["label"] in ("positive", "neutral", "negative")
    assert len(results["vector"]["vector"]) == 384
    mail_relay.wait_for(lambda message: "ada@example.org" in message.recipients, 60)
    receiver.wait_for(lambda request: accepted["id"].encode() in request.body, 60)
    assert denials(guest, since) == []


def test_services_come_back_confined_without_a_denial(guest: Guest, services: list[str]) -> None:
    since = guest.say("date +%s.%N")
    guest.say("systemctl restart quern-worker@low quern-relay && systemctl reload nginx")
    guest.wait_serving(services)
    assert denials(guest, since) == []


def test_the_jobs_of_a_moment_are_done_without_a_denial(guest: Guest) -> None:
    since = guest.say("date +%s.%N")
    # AIDE compares from its second look on.
    for unit in ("quern-certificate", "quern-certificate-age", "quern-backup", "quern-files", "quern-files"):
        # Fails when the unit does.
        guest.say(f"systemctl start {unit}.service")
    assert denials(guest, since) == []
