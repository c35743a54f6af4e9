"""A copy is made, is encrypted, says its age, and brings every document back."""

import json
import time
from collections.abc import Callable

import pytest
from testinfra.host import Host

from tests.host.client import Client
from tests.host.conftest import Played
from tests.host.test_analytics import fill

#: Prints the documents of what tenants own, in extended JSON, one a line; on the host, as the operator.
_DUMP = "rm -rf /var/lib/quern-backup/seen && quern-backup dump /var/lib/quern-backup/seen"
#: What tenants own, and no process changes by itself.
OWNED = ("tenants", "keys", "forms", "responses", "webhooks")


def owned(host: Host) -> dict[str, str]:
    """Collection to the digest of its documents, in the order of their identifiers."""
    host.check_output(_DUMP)
    manifest = json.loads(host.file("/var/lib/quern-backup/seen/manifest.json").content)["collections"]
    host.check_output("rm -rf /var/lib/quern-backup/seen")
    return {name: item["sha256"] for name, item in manifest.items() if name in OWNED and item["count"]}


def warehouse(host: Host) -> dict[str, str]:
    """The immutable files that the warehouse is made of, each with its digest."""
    tables = json.loads(host.file("/var/lib/quern-warehouse/manifest.json").content)["tables"]
    paths = [item["path"] for tenants in tables.values() for items in tenants.values() for item in items]
    return {path: host.file(f"/var/lib/quern-warehouse/{path}").sha256sum for path in paths}


@pytest.fixture(scope="module")
def response(client: Client) -> str:
    form = client.form("To be kept")
    made = client.call("POST", f"/api/v1/forms/{form}/responses", {"answers": {"comment": "Keep this sentence."}})
    client.processed(made["id"], 120)
    return str(made["id"])


@pytest.fixture(scope="module")
def copied(host: Host, response: str, play: Callable[..., Played]) -> dict[str, str]:
    """What tenants own, when the copy was made."""
    fill(host)
    done = play("playbooks/backup.yml")
    assert done.code == 0, done.output
    return owned(host)


def test_the_age_of_the_last_good_copy_is_a_metric(host: Host, copied: dict[str, str]) -> None:
    text = host.file("/var/lib/prometheus/node-exporter/quern_backup.prom").content_string
    line = next(line for line in text.splitlines() if line.startswith("quern_backup_last_success_timestamp_seconds "))
    assert abs(time.time() - float(line.split()[1])) < 600


def test_a_copy_shows_nothing_without_its_password(host: Host, copied: dict[str, str]) -> None:
    assert host.run("grep -rqa 'Keep this sentence' /var/backups/quern").rc == 1
    assert host.file("/var/backups/quern").mode == 0o700
    assert "staging" not in host.file("/var/lib/quern-backup").listdir()


def test_a_second_copy_keeps_only_what_changed(host: Host, copied: dict[str, str]) -> None:
    def size() -> int:
        return int(host.check_output("du -s --block-size=1 /var/backups/quern/data").split()[0])

    before = size()
    host.check_output("quern-backup run")
    assert size() - before < before / 2


def test_a_restore_brings_every_document_back(
    host: Host, client: Client, response: str, copied: dict[str, str], play: Callable[..., Played]
) -> None:
    newest = json.loads(host.check_output("quern-backup list --json"))[-1]["short_id"]
    later = client.call(
        "POST",
        f"/api/v1/forms/{client.call('GET', f'/api/v1/responses/{response}')['form']}/responses",
        {"answers": {"comment": "Came after the copy."}},
    )["id"]
    files = warehouse(host)
    assert files
    host.check_output("find /var/lib/quern-warehouse -name '*.parquet' -delete")
    done = play("playbooks/restore.yml", backup_snapshot=newest)
    assert done.code == 0, done.output
    assert "are back, all alike" in done.output
    assert owned(host) == copied
    assert {path: host.file(f"/var/lib/quern-warehouse/{path}").sha256sum for path in files} == files
    assert host.check_output("find /var/lib/quern-warehouse -not -user quern-low -o -not -group quern-warehouse") == ""
    assert client.call("GET", f"/api/v1/responses/{response}")["answers"]["comment"] == "Keep this sentence."
    with pytest.raises(OSError, match="404"):
        client.call("GET", f"/api/v1/responses/{later}")
