"""What operators see: JSON logs without answers or secrets, metrics of every process, one trace across all of them."""

import re
import secrets
from pathlib import Path

import httpcore2
import orjson
import pytest

from quern.embedded.stack import QUEUES
from tests.app.api.client import House, until
from tests.app.observe.collector import Collector, Span

PROCESSES = ["api", "events", "relay", "scheduler", *(f"worker-{queue}" for queue in QUEUES)]


def _log(house: House, process: str) -> str:
    return Path(house.stack.directory / f"{process}.log").read_text(errors="replace")


def test_no_answer_and_no_secret_is_in_any_log_or_span(house: House, collector: Collector) -> None:
    canary = f"canary{secrets.token_hex(8)}"
    client = house.client()
    made = client.call("POST", "/keys", {"name": "another"}, status=201)["key"]
    hook = client.call("POST", "/webhooks", {"url": f"{house.stack.receiver.url}/{canary}"}, status=201)
    steps = [
        {"name": "tell", "type": "webhook", "endpoint": hook["id"]},
        {"name": "mood", "type": "sentiment"},
        {
            "name": "mail",
            "type": "email",
            "to": {"field": "email"},
            "subject": "{{ answers.comment }}",
            "body": "{{ answers.comment }}",
        },
    ]
    form = client.form([{"name": "email", "type": "email"}, {"name": "comment", "type": "long_text"}], steps)
    answers = {"email": f"{canary}@example.org", "comment": f"{canary} said so"}
    response = client.submit(form, answers, Idempotency_Key=f"{canary}-key")
    done = {"done", "dead"}
    until(
        lambda: (
            done
            >= {
                job["status"]
                for job in client.call("GET", f"/responses/{response}")["jobs"]
                if job["step"] in ("tell", "mail")
            }
        )
    )
    # Refusals, filters, exports and erasures see the words too.
    client.send("POST", f"/forms/{form}/responses", {"answers": {canary: canary, "email": canary}})
    client.send("POST", f"/forms/{form}/responses", raw=canary.encode())
    client.send("GET", f"/forms/{form}/responses?where=email:{canary}@example.org")
    client.send("GET", f"/forms/{form}/export?where=comment:{canary}")
    client.send("GET", f"/{canary}?{canary}={canary}", headers={"User-Agent": canary})
    client.with_key(f"qrn_sk_{'0' * 26}_{canary}").send("GET", "/forms")
    client.call("POST", f"/forms/{form}/erasures", {"field": "email", "value": f"{canary}@example.org"})
    assert until(lambda: [span for span in collector.everything.split("Span(") if "worker" in span])
    stack = house.stack
    hidden = [canary, made, made.split("_", 3)[3], str(client.key), str(client.key).split("_", 3)[3], hook["secret"]]
    hidden += [stack.environment["QUERN_SECRET_KEYS"], stack.environment["QUERN_AUDIT_KEY"]]
    logs = {path.name: path.read_text(errors="replace") for path in stack.directory.rglob("*.log")}
    assert {f"{process}.log" for process in PROCESSES} <= logs.keys()
    for secret in hidden:
        assert not [name for name, text in logs.items() if secret in text], secret
        assert secret not in collector.everything


@pytest.mark.parametrize("process", PROCESSES)
def test_every_line_of_a_log_is_json_with_a_time_a_level_and_its_process(house: House, process: str) -> None:
    for line in _log(house, process).splitlines():
        entry = orjson.loads(line)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", entry["time"])
        assert entry["level"] in ("debug", "info", "warning", "error", "critical")
        assert entry["process"] == process
        assert entry["message"]


def test_the_request_id_is_in_the_log_of_who_works_on_the_request(house: House) -> None:
    client = house.client()
    hook = client.call("POST", "/webhooks", {"url": "https://127.0.0.1:1/closed"}, status=422)
    assert hook["errors"]
    hook = client.call("POST", "/webhooks", {"url": f"{house.stack.receiver.url}/id"}, status=201)["id"]
    form = client.form([{"name": "a", "type": "text"}], [{"name": "tell", "type": "webhook", "endpoint": hook}])
    identity = f"request-{secrets.token_hex(6)}"
    response = client.submit(form, {"a": "x"}, X_Request_ID=identity)
    until(lambda: client.call("GET", f"/responses/{response}")["status"] == "processed")
    received = house.stack.receiver.wait_for(lambda request: request.headers["X-Request-ID"] == identity)
    assert received.path == "/id"
    entries = client.call("GET", f"/audit?subject={response}")["items"]
    assert {entry["request_id"] for entry in entries} == {identity}


@pytest.mark.parametrize("process", PROCESSES)
def test_every_process_shows_its_metrics(house: House, process: str) -> None:
    name = process if process == "api" else f"metrics-{process}"
    with httpcore2.ConnectionPool(uds=str(house.stack.directory / f"{name}.sock")) as pool:
        found = pool.request("GET", "http://localhost/metrics")
    assert found.status == 200
    text = found.content.decode()
    assert "# TYPE quern_" in text


def test_the_apis_processes_count_together(house: House) -> None:
    client = house.client()

    def accepted() -> float:
        text = house.direct().send("GET", "//metrics").content.decode()
        found = re.search(r"^quern_responses_accepted_total ([0-9.e+]+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    form = client.form([{"name": "a", "type": "text"}])
    before = accepted()
    for _ in range(20):
        client.submit(form, {"a": "x"})
    assert accepted() == before + 20


def test_metrics_name_routes_not_identifiers(house: House) -> None:
    client = house.client()
    form = client.form([{"name": "a", "type": "text"}])
    client.send("GET", f"/forms/{form}")
    client.send("GET", "/nonsense/abc")
    text = house.direct().send("GET", "//metrics").content.decode()
    assert 'route="GET /forms/{form}"' in text
    assert form not in text
    assert "nonsense" not in text


def test_one_trace_goes_from_the_request_over_claim_job_and_step_to_the_deliveries(
    house: House, collector: Collector
) -> None:
    client = house.client()
    hook = client.call("POST", "/webhooks", {"url": f"{house.stack.receiver.url}/traced"}, status=201)["id"]
    steps = [{"name": "tell", "type": "webhook", "endpoint": hook}, {"name": "mood", "type": "sentiment"}]
    steps.append({"name": "mail", "type": "email", "to": ["a@example.org"], "subject": "s", "body": "b"})
    form = client.form([{"name": "a", "type": "long_text"}], steps)
    trace, span = secrets.token_hex(16), secrets.token_hex(8)
    response = client.submit(form, {"a": "x"}, traceparent=f"00-{trace}-{span}-01")
    until(lambda: client.call("GET", f"/responses/{response}")["results"].get("tell"))
    received = house.stack.receiver.wait_for(lambda request: trace in (request.headers["traceparent"] or ""))
    wanted = (
        "POST /api/v1/forms/<string:form>/responses",
        "job webhook",
        "deliver webhook",
        "job sentiment",
        "step",
        "claim",
        "job email",
        "deliver email",
    )
    spans = until(lambda: _all_there(collector, trace, wanted))
    request, job, delivery, ai, step, claim, email, mail = (spans[name] for name in wanted)
    assert request.parent == span
    assert (request.service, job.service, ai.service) == ("quern-api", "quern-worker-webhooks", "quern-worker-batched")
    assert job.parent == ai.parent == claim.parent == email.parent == request.id
    assert mail.parent == email.id
    assert delivery.parent == job.id
    assert step.parent == ai.id
    assert received.headers["traceparent"].split("-")[1:3] == [trace, delivery.id]


def _all_there(collector: Collector, trace: str, wanted: tuple[str, ...]) -> dict[str, Span] | None:
    found = {span.name: span for span in collector.of_trace(trace)}
    return found if set(wanted) <= found.keys() else None
