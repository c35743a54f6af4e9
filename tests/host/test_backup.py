"""A copy is made, is encrypted, says its age, and brings every document back."""

import json
import subprocess
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from testinfra.host import Host

from quern.embedded.receiver import Receiver
from tests.host.client import Client
from tests.host.conftest import Played
from tests.host.test_analytics import fill

#: What a copy has to bring: all that tenants own, and what was written down of it.
OWNED = (
    *("tenants", "keys", "forms", "form_versions", "responses", "vectors", "webhook_endpoints", "webhook_deliveries"),
    *("jobs", "audit", "idempotency", "ai_requests", "ai_files", "ai_file_chunks", "ai_batches"),
)
#: As roles/backup has it where the inventory says nothing: of the last days, weeks and months that have a copy.
KEPT = {"%Y-%m-%d": 7, "%G-%V": 5, "%Y-%m": 12}
_EMBEDDER = "all-minilm-l6-v2-int8"
#: The digests of the documents of a dump that no process changes by itself any more: ended work, sealed entries, and
#: nothing that the database forgets within half an hour.
_DIGESTS = """
import bson, datetime, hashlib, json, pathlib, sys
soon = datetime.datetime.utcnow() + datetime.timedelta(minutes=30)
def settled(name, document):
    ends = [document.get("forget"), document.get("expires_at")]
    if any(isinstance(end, datetime.datetime) and end < soon for end in ends):
        return False
    if name == "jobs":
        return document["state"] in ("done", "dead", "cancelled", "skipped")
    return not document.get("pending") and not document.get("outbox")
found = {}
for path in pathlib.Path(sys.argv[1]).glob("*.bson"):
    with path.open("rb") as file:
        found[path.stem] = {
            str(document["_id"]): hashlib.sha256(bson.encode(document)).hexdigest()[:32]
            for document in bson.decode_file_iter(file) if settled(path.stem, document)
        }
print(json.dumps(found))
"""


def owned(host: Host) -> dict[str, dict[str, str]]:
    """Collection to its settled documents: identifier to digest. Fails where the database has no such collection."""
    folder = "/var/lib/quern-backup/seen"
    host.check_output("rm -rf %s && quern-backup dump %s", folder, folder)
    found = json.loads(host.check_output("python3 -c %s %s", _DIGESTS, folder))
    host.check_output("rm -rf %s", folder)
    assert set(OWNED) <= set(found), set(OWNED) - set(found)
    return {name: found[name] for name in OWNED}


def in_both(before: dict[str, dict[str, str]], after: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """The documents that were the same all the time."""
    return {name: dict(before[name].items() & after[name].items()) for name in OWNED}


def settings(host: Host, snapshot: str) -> str:
    """The settings inside a copy."""
    folder = "/var/lib/quern-backup/seen"
    host.check_output("rm -rf %s && install -d -m 0700 -o quern-backup %s", folder, folder)
    host.check_output("quern-backup fetch %s %s", snapshot, folder)
    found = host.file(f"{folder}/var/lib/quern-backup/staging/settings/quern.env").content_string
    host.check_output("rm -rf %s", folder)
    return str(found)


def warehouse(host: Host) -> dict[str, str]:
    """The immutable files that the warehouse is made of, each with its digest."""
    tables = json.loads(host.file("/var/lib/quern-warehouse/manifest.json").content)["tables"]
    paths = [item["path"] for tenants in tables.values() for items in tenants.values() for item in items]
    return {path: host.file(f"/var/lib/quern-warehouse/{path}").sha256sum for path in paths}


@pytest.fixture(scope="module")
def response(client: Client, receiver: Receiver) -> str:
    """One that has left something in every collection of OWNED."""
    # A response's own key is in its identifier; what is kept of keys is of other requests.
    given = {"Idempotency-Key": uuid.uuid4().hex}
    hook = client.call("POST", "/api/v1/webhooks", {"url": f"{receiver.url}/kept"}, **given)["id"]
    steps = [
        {"name": "vector", "type": "embed", "fields": ["comment"]},
        {"name": "notify", "type": "webhook", "needs": ["vector"], "endpoint": hook},
    ]
    form = client.form("To be kept", workflow={"steps": steps})
    made = client.call("POST", f"/api/v1/forms/{form}/responses", {"answers": {"comment": "Keep this sentence."}})
    client.processed(made["id"], 300)
    return str(made["id"])


@pytest.fixture(scope="module")
def batch(client: Client) -> str:
    """The file of a batch that has ended, and an answer that is kept."""
    body = {"model": _EMBEDDER, "input": "Keep this, too."}
    line = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": body})
    file = client.upload("/v1/files", "batch.jsonl", line.encode(), purpose="batch")["id"]
    wanted = {"input_file_id": file, "endpoint": "/v1/embeddings", "completion_window": "24h"}
    made = client.call("POST", "/v1/batches", wanted)["id"]
    client.call("POST", "/v1/embeddings", body)
    deadline = time.monotonic() + 600
    while (found := client.call("GET", f"/v1/batches/{made}"))["status"] != "completed":
        assert time.monotonic() < deadline, f"expected the batch to be completed, found {found}"
        time.sleep(1)
    return str(file)


@pytest.fixture(scope="module")
def copied(host: Host, response: str, batch: str, play: Callable[..., Played]) -> dict[str, dict[str, str]]:
    """What the copy has to hold: what was the same before it was made and afterwards."""
    fill(host)
    before = owned(host)
    done = play("playbooks/backup.yml")
    assert done.code == 0, done.output
    kept = in_both(before, owned(host))
    assert [name for name in OWNED if not kept[name]] == []
    return kept


def test_the_age_of_the_last_good_copy_is_a_metric(host: Host, copied: dict[str, dict[str, str]]) -> None:
    text = host.file("/var/lib/prometheus/node-exporter/quern_backup.prom").content_string
    line = next(line for line in text.splitlines() if line.startswith("quern_backup_last_success_timestamp_seconds "))
    assert abs(time.time() - float(line.split()[1])) < 600


def test_a_copy_shows_nothing_without_its_password(host: Host, copied: dict[str, dict[str, str]]) -> None:
    assert host.run("grep -rqa 'Keep this sentence' /var/backups/quern").rc == 1
    assert host.file("/var/backups/quern").mode == 0o700
    assert "staging" not in host.file("/var/lib/quern-backup").listdir()


def test_a_second_copy_keeps_only_what_changed(host: Host, copied: dict[str, dict[str, str]]) -> None:
    def size() -> int:
        return int(host.check_output("du -s --block-size=1 /var/backups/quern/data").split()[0])

    before = size()
    host.check_output("quern-backup run")
    assert size() - before < before / 2


def test_a_restore_brings_every_document_back(
    host: Host, client: Client, response: str, copied: dict[str, dict[str, str]], play: Callable[..., Played]
) -> None:
    newest = json.loads(host.check_output("quern-backup list --json"))[-1]["short_id"]
    later = client.call(
        "POST",
        f"/api/v1/forms/{client.call('GET', f'/api/v1/responses/{response}')['form']}/responses",
        {"answers": {"comment": "Came after the copy."}},
    )["id"]
    files = warehouse(host)
    assert files
    assert settings(host, newest) == host.file("/etc/quern/quern.env").content_string
    host.check_output("find /var/lib/quern-warehouse -name '*.parquet' -delete")
    done = play("playbooks/restore.yml", backup_snapshot=newest)
    assert done.code == 0, done.output
    assert "are back, all alike" in done.output
    assert in_both(copied, owned(host)) == copied
    assert {path: host.file(f"/var/lib/quern-warehouse/{path}").sha256sum for path in files} == files
    assert host.check_output("find /var/lib/quern-warehouse -not -user quern-low -o -not -group quern-warehouse") == ""
    assert client.call("GET", f"/api/v1/responses/{response}")["answers"]["comment"] == "Keep this sentence."
    with pytest.raises(OSError, match="404"):
        client.call("GET", f"/api/v1/responses/{later}")


#: Copies of another day each, as the nightly ones would be; the repository is the account's own.
_OLDER = """
set -eu
export RESTIC_REPOSITORY=/var/backups/quern RESTIC_PASSWORD="$(quern-backup password)"
for day in %s; do
    echo "$day" | restic backup --quiet --no-cache --tag quern --host quern --time "$day 02:30:00" \\
        --stdin --stdin-filename rehearsed
done
chown -R quern-backup:quern-backup /var/backups/quern
"""
_FORGET = """
set -eu
export RESTIC_REPOSITORY=/var/backups/quern RESTIC_PASSWORD="$(quern-backup password)"
restic forget --quiet --no-cache %s
chown -R quern-backup:quern-backup /var/backups/quern
"""


def copies(host: Host) -> dict[str, datetime]:
    """The copies that there are, and of when."""
    listed = json.loads(host.check_output("quern-backup list --json"))
    return {one["id"]: datetime.fromisoformat(one["time"][:19]) for one in listed}


def to_keep(known: dict[str, datetime]) -> set[str]:
    """The newest of each of the last days, weeks and months."""
    newest_first = sorted(known, key=lambda one: known[one], reverse=True)
    kept = set()
    for period, number in KEPT.items():
        of = {known[one].strftime(period): one for one in reversed(newest_first)}
        kept |= set(sorted(of.values(), key=lambda one: known[one], reverse=True)[:number])
    return kept


def test_old_copies_go_and_the_promised_ones_stay(host: Host) -> None:
    today = datetime.now(UTC)
    days = [f"{today - timedelta(days=age):%Y-%m-%d}" for age in (*range(1, 12), *range(20, 480, 20))]
    ours: set[str] = set()
    host.check_output("quern-backup run")
    before = copies(host)
    try:
        host.check_output(_OLDER % " ".join(days))
        older = copies(host)
        ours = set(older) - set(before)
        assert len(ours) == len(days)
        host.check_output("quern-backup run")
        left = copies(host)
        (new,) = set(left) - set(older)
        wanted = to_keep(older | {new: left[new]})
        assert set(left) == wanted
        assert len(wanted) < len(days)
    finally:
        host.run(_FORGET % " ".join(ours & set(copies(host))))


def test_a_truncated_archive_leaves_the_copies_and_the_data_as_they_were(
    host: Host,
    client: Client,
    response: str,
    copied: dict[str, dict[str, str]],
    play: Callable[..., Played],
    tmp_path: Path,
) -> None:
    """With another password given, as for another host's copies: the own ones open as before."""
    whole = tmp_path / "whole"
    (whole / "data").mkdir(parents=True)
    (whole / "data/piece").write_bytes(bytes(1 << 20))
    subprocess.run(["tar", "-C", str(whole), "-cf", str(tmp_path / "quern-backup.tar"), "."], check=True)
    archive = tmp_path / "quern-backup.tar"
    archive.write_bytes(archive.read_bytes()[: 1 << 19])
    before, password = copies(host), host.check_output("quern-backup password")
    done = play(
        "playbooks/restore.yml",
        backup_copy_from=str(archive),
        secrets_given={"quern-backup.restic_password": "A" * 43},
    )
    assert done.code != 0
    assert "its own copies are as they were" in done.output
    # The value itself would be in the output of a failed test.
    assert (host.check_output("quern-backup password") == password) is True
    assert copies(host) == before
    assert client.call("GET", f"/api/v1/responses/{response}")["id"] == response
    assert host.service("quern-backup.timer").is_running
    assert [name for name in host.file("/var/backups").listdir() if name.startswith("quern.")] == []
