"""What came in by the front door can be asked about there, and nothing of it is in reach of anybody else."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from testinfra.host import Host

from tests.host.client import Client

#: Each tenant's rows are the only ones in reach.
COUNT = "SELECT count(*) AS n, sum(value_number) AS amount FROM fact_answer WHERE path = 'amount'"
COUNT_BY_FORM = COUNT.replace("SELECT", "SELECT form,") + " GROUP BY form"
AMOUNTS = {"north": [10, 20, 60], "south": [7]}
FRESHNESS = "quern_etl_freshness_timestamp_seconds "
PATIENCE_SECONDS = 300


def fill(host: Host) -> dict[str, Any]:
    """Bring the warehouse up to now; another run may be at it."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (done := host.run("quern etl run --json")).rc == 75:
        assert time.monotonic() < deadline, done.stderr
        time.sleep(2)
    assert done.rc == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.fixture(scope="module")
def form(host: Host, client: Client) -> str:
    """A form with answers that are in the warehouse."""
    fields = [
        {"name": "region", "type": "choice", "options": [{"value": name} for name in AMOUNTS]},
        {"name": "amount", "type": "number"},
    ]
    made = client.call("POST", "/api/v1/forms", {"name": "Orders", "fields": fields})["id"]
    client.call("POST", f"/api/v1/forms/{made}/publish")
    for region, amounts in AMOUNTS.items():
        for amount in amounts:
            answers = {"region": region, "amount": amount}
            client.call("POST", f"/api/v1/forms/{made}/responses", {"answers": answers})
    report = fill(host)
    assert (report["outcome"], report["mismatched_days"]) == ("published", 0), report
    return str(made)


@pytest.fixture(scope="module")
def question(form: str) -> dict[str, Any]:
    return {
        "measure": "answer",
        "of": "answer.amount",
        "statistics": ["count", "sum", "mean"],
        "dimensions": ["answer.region"],
        "filters": [{"dimension": "form", "values": [form]}],
        "order": {"by": "count", "descending": True},
    }


@pytest.fixture(scope="module")
def stranger(host: Host) -> Iterator[str]:
    """The secret key of another tenant."""
    yield str(json.loads(host.check_output("quern tenant create stranger --json"))["key"])


def test_a_question_gets_the_right_numbers(client: Client, question: dict[str, Any]) -> None:
    page = client.call("POST", "/api/v1/analytics/questions", question)
    assert page["rows"] == [["north", 3, 90, 30], ["south", 1, 7, 7]]


def test_an_answer_is_kept(client: Client, question: dict[str, Any]) -> None:
    pages = [client.call("POST", "/api/v1/analytics/questions", question) for _ in range(2)]
    assert pages[1]["cached"]


def test_a_tenants_sql_runs_confined(client: Client, form: str) -> None:
    assert client.call("POST", "/api/v1/analytics/sql", {"sql": COUNT})["rows"] == [[4, 97]]


def test_another_tenant_finds_nothing(client: Client, stranger: str, form: str, question: dict[str, Any]) -> None:
    other = {"Authorization": f"Bearer {stranger}"}
    # It has no such field.
    with pytest.raises(OSError, match="422"):
        client.call("POST", "/api/v1/analytics/questions", question, **other)
    assert client.call("POST", "/api/v1/analytics/sql", {"sql": COUNT}, **other)["rows"] == [[0, None]]


def test_the_operator_asks_over_all_tenants(host: Host, form: str) -> None:
    rows = json.loads(host.check_output("quern sql --json %s", COUNT_BY_FORM))["rows"]
    assert [form, 4, 97] in rows


def test_the_warehouse_has_one_writer_and_a_group_that_reads(host: Host, form: str) -> None:
    for folder in ("/var/lib/quern-warehouse", "/var/lib/quern-extract"):
        assert host.check_output("find %s -not -user quern-low -o -not -group quern-warehouse", folder) == ""
        assert host.check_output("find %s -perm /o=rwx,g=w", folder) == ""
    manifest = "/var/lib/quern-warehouse/manifest.json"
    assert host.run("runuser -u quern-analytics -G quern-warehouse -- test -w %s", manifest).rc != 0
    assert host.run("runuser -u quern-analytics -G quern-warehouse -- test -r %s", manifest).rc == 0
    assert host.run("runuser -u quern-api -- test -r %s", manifest).rc != 0


def test_only_the_api_reaches_the_service(host: Host) -> None:
    ask = "curl -sf --unix-socket /run/quern-analytics.sock http://localhost/healthz"
    assert host.run(f"runuser -u quern-api -G quern-analytics -- {ask}").rc == 0
    assert host.run(f"runuser -u nginx -G quern-web -G quern-metrics -- {ask}").rc != 0


def test_its_freshness_is_a_metric(host: Host, form: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        lines = host.check_output("curl -sf http://127.0.0.1:9460/metrics/analytics").splitlines()
        value = next(float(line.split()[1]) for line in lines if line.startswith(FRESHNESS))
        if abs(time.time() - value) < 900:
            return
        assert time.monotonic() < deadline, value
        time.sleep(1)
