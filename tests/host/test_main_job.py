"""The main job, from outside: a response in by TLS; AI results, a signed webhook and a mail out."""

import json
import time

from standardwebhooks.webhooks import Webhook
from testinfra.host import Host

from quern.embedded.receiver import Receiver
from quern.embedded.smtp_sink import SmtpSink
from tests.host.client import Client

PATIENCE_SECONDS = 300
COMMENT = "I waited two hours for my parcel, and the driver was rude. Please call me back about order 4711."


def test_the_relay_lets_the_doctor_in(host: Host, mail_relay: SmtpSink) -> None:
    """The relay of the tests takes nothing without the password, and the doctor logs in."""
    checks = json.loads(host.run("quern doctor --json").stdout)
    (found,) = [check for check in checks if check["check"] == "mail relay"]
    assert found["ok"], found
    assert found["found"].endswith("lets us in")


def test_a_response_becomes_results_a_webhook_and_a_mail(
    client: Client, receiver: Receiver, mail_relay: SmtpSink
) -> None:
    hook = client.call("POST", "/api/v1/webhooks", {"url": f"{receiver.url}/quern"})
    form = client.call(
        "POST",
        "/api/v1/forms",
        {
            "name": "Host test",
            "fields": [
                {"name": "email", "type": "email"},
                {"name": "comment", "type": "long_text", "max_length": 10_000, "required": True},
            ],
            "workflow": {
                "steps": [
                    {"name": "summary", "type": "summarize", "fields": ["comment"], "max_words": 40},
                    {"name": "mood", "type": "sentiment", "fields": ["comment"]},
                    {"name": "vector", "type": "embed", "fields": ["comment"]},
                    {
                        "name": "thanks",
                        "type": "email",
                        "needs": ["summary"],
                        "to": {"field": "email"},
                        "subject": "Your feedback",
                        "body": "We understood: {{ results.summary.text }} ({{ response.id }})",
                    },
                    {
                        "name": "notify",
                        "type": "webhook",
                        "needs": ["summary", "mood", "vector"],
                        "endpoint": hook["id"],
                    },
                ]
            },
        },
    )
    client.call("POST", f"/api/v1/forms/{form['id']}/publish")
    accepted = client.call(
        "POST",
        f"/api/v1/forms/{form['id']}/responses",
        {"answers": {"email": "ada@example.org", "comment": COMMENT}},
        **{"Idempotency-Key": "host-test-1"},
    )

    deadline = time.monotonic() + PATIENCE_SECONDS
    while (response := client.call("GET", f"/api/v1/responses/{accepted['id']}"))["status"] != "processed":
        assert time.monotonic() < deadline, f"expected it to be processed, found {response}"
        time.sleep(0.5)

    assert response["results"]["summary"]["text"]
    assert response["results"]["mood"]["label"] in ("positive", "neutral", "negative")
    assert len(response["results"]["vector"]["vector"]) == 384

    mail = mail_relay.wait_for(lambda message: "ada@example.org" in message.recipients, PATIENCE_SECONDS)
    assert mail.encrypted
    assert accepted["id"] in str(mail.message.get_content())

    request = receiver.wait_for(lambda found: accepted["id"].encode() in found.body, PATIENCE_SECONDS)
    payload = Webhook(hook["secret"]).verify(
        request.body, {name.lower(): text for name, text in request.headers.items()}
    )
    assert payload["data"]["id"] == accepted["id"]
