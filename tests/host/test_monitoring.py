"""Prometheus sees every process, Alertmanager mails, all of it within its share, and nothing of it from outside."""

import json
import secrets
import time
from datetime import UTC, datetime
from typing import Any

from testinfra.host import Host

from quern.embedded.smtp_sink import SmtpSink
from tests.host.client import Client
from tests.host.conftest import Place

UNITS = ("prometheus", "prometheus-alertmanager", "prometheus-node-exporter", "prometheus-redis-exporter")
PATIENCE_SECONDS = 300
#: Changes the first entry of the audit log, as who has got hold of the database.
_TAMPER = """
systemd-creds decrypt --name=quern_mongodb_uri /etc/credstore.encrypted/quern-operator.quern_mongodb_uri - |
python3 -c '
import json, pymongo, sys
database = pymongo.MongoClient(sys.stdin.read()).quern
database.audit.update_one({"seq": 1}, json.loads(sys.argv[1]))
' %s
"""
#: What all processes of the slice hold, and how much of the host's processors they take in a minute, as shares. By
#: /proc, since a container need not have a controller that counts; what their children took until they ended is in it.
_SHARE = """
import json, os, pathlib, time
def processes():
    for path in pathlib.Path("/proc").iterdir():
        try:
            if path.name.isdecimal() and "quern-watch.slice" in (path / "cgroup").read_text():
                yield path
        except OSError:
            continue
def ticks():
    fields = {path.name: (path / "stat").read_text().rpartition(")")[2].split() for path in processes()}
    return {name: sum(map(int, of[11:15])) for name, of in fields.items()}
def kilobytes(path, name):
    return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(name + ":"))
held = sum(kilobytes(path / "smaps_rollup", "Pss") for path in processes())
before, start = ticks(), time.monotonic()
time.sleep(60)
after, seconds = ticks(), time.monotonic() - start
taken = sum(value - before.get(name, 0) for name, value in after.items()) / os.sysconf("SC_CLK_TCK")
total = kilobytes(pathlib.Path("/proc/meminfo"), "MemTotal")
print(json.dumps({"processes": len(after), "memory": held / total, "processor": taken / seconds / os.cpu_count()}))
"""


def query(host: Host, expression: str) -> list[dict[str, Any]]:
    """What Prometheus answers now."""
    answer = host.check_output(
        "curl -sS --fail -G http://127.0.0.1:9090/api/v1/query --data-urlencode query=%s", expression
    )
    found: list[dict[str, Any]] = json.loads(answer)["data"]["result"]
    return found


def test_every_process_is_scraped(host: Host) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        states = {(one["metric"]["job"], one["metric"].get("process")): one["value"][1] for one in query(host, "up")}
        away = sorted(name for name, value in states.items() if value != "1")
        if len(states) >= 14 and not away:
            return
        assert time.monotonic() < deadline, (away, len(states))
        time.sleep(5)


def test_both_instances_of_redis_and_mongodb_are_measured(host: Host) -> None:
    assert {one["metric"]["instance"] for one in query(host, "redis_up == 1")} == {"queue", "cache"}
    assert len(query(host, "quern_mongodb_connections{state='current'} > 0")) == 1


def awaited(host: Host, expression: str) -> float:
    """The value of the first series, once there is one."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := query(host, expression)):
        assert time.monotonic() < deadline, f"expected Prometheus to find {expression}"
        time.sleep(5)
    return float(found[0]["value"][1])


def test_the_certificates_end_is_known(host: Host) -> None:
    host.check_output("systemctl start quern-certificate-age")
    assert 300 * 86_400 < awaited(host, "quern_certificate_end_timestamp_seconds - time()") < 400 * 86_400


def test_a_tampered_audit_log_is_found_without_being_asked(host: Host, client: Client) -> None:
    """By the scheduler, from its start on, and with what its own account may read."""
    client.form("Audited")
    awaited(host, "quern_audit_entries > 0")
    try:
        for change, found in ({"actor": "was"}, 1), ({"was": "actor"}, 0):
            host.check_output(_TAMPER, json.dumps({"$rename": change}))
            # Else its round may be over, and the next begin tomorrow.
            host.check_output("systemctl restart quern-scheduler")
            started = host.check_output("date +%s")
            awaited(host, f"quern_audit_verified_timestamp_seconds >= {started} and quern_audit_problems == {found}")
            assert host.run("quern audit verify").rc == found
    finally:
        host.check_output(_TAMPER, json.dumps({"$rename": {"was": "actor"}}))


def test_files_that_change_are_counted(host: Host) -> None:
    host.check_output("systemctl start quern-files")
    host.check_output("cp -a /etc/issue.net /root/issue.net && echo changed >>/etc/issue.net")
    host.check_output("systemctl start quern-files")
    try:
        awaited(host, "quern_files_changed == 1")
        assert "/etc/issue.net" in host.check_output("journalctl --unit quern-files --priority warning -o cat -n 1")
    finally:
        host.check_output("mv /root/issue.net /etc/issue.net")
    host.check_output("systemctl start quern-files && systemctl start quern-files")
    awaited(host, "quern_files_changed == 0")


def test_the_rules_of_the_alerts_are_loaded(host: Host) -> None:
    groups = json.loads(host.check_output("curl -sS --fail http://127.0.0.1:9090/api/v1/rules"))["data"]["groups"]
    names = {rule["name"] for group in groups for rule in group["rules"]}
    assert {"DeadJobs", "OutboxesUnrelayed", "BackupOld", "CertificateEnds", "WarehouseDiffers", "AuditBroken"} <= names
    assert {rule["health"] for group in groups for rule in group["rules"]} <= {"ok", "unknown"}


def test_an_alert_is_mailed(host: Host, place: Place, mail_relay: SmtpSink) -> None:
    """By the real Alertmanager, firewall and relay; the alert itself is handed in."""
    alert = json.dumps([{"labels": {"alertname": "Rehearsal", "severity": "warning"}, "annotations": {"summary": "x"}}])
    if not host.run("grep -q email_configs /etc/prometheus/alertmanager.yml").succeeded:
        raise AssertionError("expected monitoring_mail_to in molecule/inventory, found no receiver of alerts")
    host.check_output(
        "curl -sS --fail -H 'Content-Type: application/json' -d %s http://127.0.0.1:9093/api/v2/alerts", alert
    )
    # Others may fire on a host that has just been made.
    mail = mail_relay.wait_for(lambda one: "Rehearsal" in str(one.message["Subject"]), PATIENCE_SECONDS)
    assert mail.recipients == ("ops@quern.example",)


def test_the_monitoring_takes_its_share_and_no_more(host: Host) -> None:
    """Of memory, and of the processors' time in a minute: a budget of work, however fast the host is."""
    for unit in UNITS:
        assert host.check_output("systemctl show -p Slice --value %s", unit) == "quern-watch.slice"
    taken = json.loads(host.check_output("python3 -c %s", _SHARE))
    assert taken["processes"] >= len(UNITS), taken
    assert taken["memory"] < 0.05, taken
    # Scraping costs something: nothing at all would mean that nothing was measured.
    assert 0 < taken["processor"] <= 0.05, taken


def test_the_operator_reads_the_logs(host: Host, place: Place) -> None:
    host.run(f"curl -sk '{place.url}/api/v1/forms?name=%27%20union%20select%20a%20from%20b--'")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        refused = json.loads(host.check_output("quern logs refused --json"))
        if any(row["place"] == "name" for row in refused):
            break
        assert time.monotonic() < deadline, refused
        time.sleep(1)


def logs(host: Host, *words: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(host.check_output("quern logs " + " ".join(words) + " --json"))
    return found


def test_the_most_frequent_errors_come_from_the_journal(host: Host) -> None:
    """As a service says them: one JSON line each, by its unit."""
    now = datetime.now(UTC).isoformat()
    said = {"time": now, "level": "error", "process": "rehearsal", "message": "tried key_0123456789ABCDEFGHJKMNPQRS"}
    host.check_output("echo %s > /run/rehearsal.log", "\n".join([json.dumps(said)] * 3))
    host.check_output("systemd-run --quiet --wait --unit=quern-rehearsal cat /run/rehearsal.log")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (rows := [row for row in logs(host, "errors") if row["process"] == "rehearsal"]):
        assert time.monotonic() < deadline
        time.sleep(1)
    assert [(row["count"], row["error"]) for row in rows] == [(3, "tried …")]


def test_a_request_is_followed_by_its_name_and_the_slow_ones_are_named_from_rotated_logs_too(
    host: Host, place: Place, client: Client
) -> None:
    name = f"rehearsal-{secrets.token_hex(6)}"
    form = client.form("Logs", workflow={"steps": [{"name": "mood", "type": "sentiment", "fields": ["comment"]}]})
    path = f"/api/v1/forms/{form}/responses"
    response = client.call("POST", path, {"answers": {"comment": "Late again."}}, **{"X-Request-ID": name})["id"]
    client.processed(response, PATIENCE_SECONDS)
    # nginx writes its log every five seconds.
    deadline = time.monotonic() + PATIENCE_SECONDS
    while host.run("grep -q %s /var/log/nginx/access.log", name).failed:
        assert time.monotonic() < deadline, f"expected {name} in nginx's log"
        time.sleep(1)
    host.check_output("logrotate --force /etc/logrotate.d/nginx")
    assert host.run("grep -q %s /var/log/nginx/access.log", name).failed, "expected the log to be rotated"
    rows = logs(host, "request", name)
    assert "nginx" in {row["process"] for row in rows}
    assert any(row["message"].startswith("POST") and "202" in row["message"] for row in rows), rows
    assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)
    slow = {row["route"]: row for row in logs(host, "slow")}
    (submitting,) = [row for route, row in slow.items() if route.startswith("POST") and route.endswith("/responses")]
    assert submitting["requests"] >= 1
    assert 0 < submitting["p50_seconds"] <= submitting["p99_seconds"] <= submitting["slowest_seconds"]
