"""The operator's command: every part has --help and --json, and errors say what to run, not where the code was."""

import os
import subprocess
import sys
from typing import Any

import click
import orjson
import pytest

from quern.cli.main import main
from quern.store import clock
from tests.app.api.client import Client, House, Json, until
from tests.app.cli.conftest import Quern

PROCESSES = {"api", "events", "relay", "scheduler", "worker", "engine", "analytics"}


def _commands(group: click.Group, words: tuple[str, ...] = ()) -> dict[tuple[str, ...], click.Command]:
    found: dict[tuple[str, ...], click.Command] = {}
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            found |= _commands(command, (*words, name))
        found[(*words, name)] = command
    return found


ALL = _commands(main)


@pytest.mark.parametrize("words", sorted(ALL), ids=" ".join)
def test_every_command_says_what_it_is_for(words: tuple[str, ...]) -> None:
    command = ALL[words]
    assert command.help
    assert len(command.help) > 5
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.required is False:
            assert parameter.help or parameter.name in ("tenant_id", "limit"), (words, parameter.name)


@pytest.mark.parametrize(
    "words", sorted(words for words, found in ALL.items() if not isinstance(found, click.Group)), ids=" ".join
)
def test_every_command_that_is_no_process_speaks_json(words: tuple[str, ...]) -> None:
    if words[0] not in PROCESSES:
        assert any("--json" in parameter.opts for parameter in ALL[words].params)


def test_help_is_printed_without_any_configuration(quern: Quern) -> None:
    bare = Quern({"PATH": quern.environment["PATH"]}, quern.directory)
    found = bare("--help")
    assert found.code == 0
    for name in ("tenant", "key", "form", "job", "queue", "dead", "audit", "status", "doctor"):
        assert f"\n  {name} " in found.out


def test_a_missing_configuration_is_explained(quern: Quern) -> None:
    bare = Quern({"PATH": quern.environment["PATH"]}, quern.directory)
    for words in (("status",), ("doctor",), ("api",), ("worker", "high")):
        found = bare(*words)
        assert found.code != 0
        assert "QUERN_MONGODB_URI: it is not set. Example: " in found.err
        assert "Traceback" not in found.err


def test_a_tenant_and_its_keys_from_first_to_last(quern: Quern, house: House) -> None:
    made = quern("tenant", "create", "Made by hand", "--requests-per-minute", "0", "--json").json()
    assert made["id"] in [row["id"] for row in quern("tenant", "list", "--json").json()]
    client = Client(house.stack.url, made["key"])
    assert client.send("GET", "/forms").status == 200
    second = quern("key", "create", "--tenant", made["id"], "--name", "two", "--scope", "forms:read", "--json").json()
    listed: list[Json] = quern("key", "list", "--tenant", made["id"], "--json").json()
    assert [row["name"] for row in listed] == ["first", "two"]
    assert "hash" not in repr(listed)
    assert client.with_key(second["key"]).send("GET", "/keys").status == 403
    revoked = quern("key", "revoke", "--tenant", made["id"], second["id"], "--json").json()
    assert revoked["revoked"] is True
    until(lambda: client.with_key(second["key"]).send("GET", "/forms").status == 401)
    assert quern("tenant", "suspend", made["id"], "--json").json()["suspended"] is True
    until(lambda: client.send("GET", "/forms").status == 401)
    assert quern("tenant", "resume", made["id"], "--json").json()["suspended"] is False
    until(lambda: client.send("GET", "/forms").status == 200)
    actions = [entry["action"] for entry in quern("audit", "list", "--tenant", made["id"], "--json").json()]
    assert sorted(actions) == [
        "key.created",
        "key.created",
        "key.revoked",
        "tenant.created",
        "tenant.resumed",
        "tenant.suspended",
    ]


@pytest.mark.parametrize(
    "words",
    [
        ("tenant", "suspend", "ten_none"),
        ("key", "create", "--tenant", "ten_none", "--name", "x"),
        ("key", "revoke", "--tenant", "ten_none", "key_none"),
        ("job", "show", "job_none"),
        ("job", "cancel", "job_none"),
        ("dead", "replay", "job_none"),
        ("dead", "replay"),
        ("audit", "verify", "--expect", "nonsense"),
    ],
    ids=" ".join,
)
def test_what_is_not_there_is_said_with_what_to_run(quern: Quern, words: tuple[str, ...]) -> None:
    found = quern(*words)
    assert found.code == 1
    assert found.err.startswith("Error: ")
    assert "quern " in found.err
    assert "Traceback" not in found.err


def test_jobs_are_shown_cancelled_and_replayed(quern: Quern, house: House, owner: Client) -> None:
    form = owner.form([{"name": "a", "type": "text"}], [{"name": "mood", "type": "sentiment"}])
    response = owner.submit(form, {"a": "x"})
    job = owner.call("GET", f"/responses/{response}")["jobs"][0]["id"]
    until(lambda: owner.send("GET", f"/jobs/{job}").status == 200)
    shown = quern("job", "show", job, "--json").json()
    assert shown["log"]
    assert "payload" not in shown
    assert quern("job", "cancel", job, "--json").json()["outcome"] in ("cancelled", "asked to stop")
    until(lambda: owner.call("GET", f"/jobs/{job}")["status"] == "cancelled")
    assert "only a waiting or running job" in quern("job", "cancel", job).err
    db = house.stack.runtime.store.db
    db.jobs.update_one({"_id": job}, {"$set": {"state": "dead"}})
    db.responses.update_one({"_id": response}, {"$set": {"steps.mood": "dead"}})
    assert job in [row["id"] for row in quern("dead", "list", "--json").json()]
    assert quern("dead", "replay", job, "--json").json()["jobs"] == [job]
    assert job not in [row["id"] for row in quern("dead", "list", "--json").json()]
    mine = quern("job", "list", "--limit", "1000", "--json").json()
    assert job in [row["id"] for row in mine]
    done = db.audit.find({"subject": job, "actor": "operator"}).sort("at", 1)
    assert [entry["action"] for entry in done] == ["job.cancelled", "job.replayed"]
    assert owner.call("GET", f"/responses/{response}")["status"] == "processing"


def test_an_outbox_that_was_set_aside_is_shown_and_brought_back(quern: Quern, house: House, owner: Client) -> None:
    db = house.stack.runtime.store.db
    form = owner.form([{"name": "a", "type": "text"}], [{"name": "mood", "type": "sentiment"}])
    response = owner.submit(form, {"a": "x"})
    until(lambda: db.audit.find_one({"subject": response}) is not None)
    until(lambda: "outbox" not in (db.responses.find_one({"_id": response}) or {}))
    assert quern("outbox", "list", "--json").json() == []
    # As if it had arrived just now, with a version of the form that this relay cannot read.
    db.jobs.delete_many({"subject": response})
    audit = db.audit.find_one({"subject": response})
    db.responses.update_one({"_id": response}, {"$set": {"version": 99, "outbox": {"at": clock.now(), "audit": audit}}})
    until(lambda: "unrelayed" in (db.responses.find_one({"_id": response}) or {}))
    assert [row["id"] for row in quern("outbox", "list", "--json").json()] == [response]
    row = _checks(quern("doctor", "--json"))["outboxes"]
    assert not row["ok"]
    assert "quern outbox retry" in row["run"]
    db.responses.update_one({"_id": response}, {"$set": {"version": 1}})
    assert quern("outbox", "retry").code == 1
    assert quern("outbox", "retry", response, "--json").json()["responses"] == 1
    until(lambda: db.jobs.find_one({"subject": response}) is not None)


def test_tables_are_for_people_and_hold_no_control_characters(quern: Quern, owner: Client) -> None:
    owner.call("POST", "/keys", {"name": "\u202eodd\u200b name"}, status=201)
    for words in (("queue", "list"), ("status",), ("tenant", "list"), ("form", "list"), ("audit", "list")):
        found = quern(*words)
        assert found.code == 0, found.err
        assert found.out.strip()
        assert not [character for character in found.out if ord(character) < 32 and character != "\n"]


def test_status_and_queues_count_what_is_there(quern: Quern) -> None:
    facts = quern("status", "--json").json()
    assert {row["queue"] for row in facts["queues"]} == {"high", "default", "webhooks", "low", "batched"}
    assert "away" in facts["engine"]
    assert facts["responses"] >= 0
    assert quern("queue", "list", "--json").json()[0].keys() == {"queue", "blocked", "queued", "running", "dead"}


def test_a_secret_key_is_fresh_and_fits(quern: Quern) -> None:
    one, two = (quern("secret-key").out.strip() for _ in range(2))
    assert one != two
    assert quern("status", "--json", QUERN_SECRET_KEYS=one).code == 0


def test_migrating_again_does_no_harm(quern: Quern) -> None:
    assert quern("migrate", "--json").json()


def _checks(outcome: Any) -> dict[str, Json]:
    return {row["check"]: row for row in orjson.loads(outcome.out)}


def test_the_doctor_finds_what_is_well_and_what_is_not(quern: Quern) -> None:
    found = quern("doctor", "--json")
    checks = _checks(found)
    for name in (
        "MongoDB",
        "replica set",
        "indexes",
        "Redis queue",
        "Redis policy",
        "mail relay",
        "API",
        "events",
        "outboxes",
    ):
        assert checks[name]["ok"], checks[name]
    # This stack has no engine, and the doctor says so.
    assert not checks["engine"]["ok"]
    assert checks["engine"]["run"]
    assert found.code == 1


@pytest.mark.parametrize(
    ("setting", "value", "check"),
    [
        ("QUERN_MONGODB_URI", "mongodb://%2Fnowhere%2Fm.sock/?directConnection=true", "MongoDB"),
        ("QUERN_REDIS_QUEUE_URL", "unix:///nowhere/r.sock", "Redis queue"),
        ("QUERN_API_BIND", "unix:/nowhere/api.sock", "API"),
        ("QUERN_EVENTS_BIND", "127.0.0.1:1", "events"),
        ("QUERN_MAIL__PORT", "1", "mail relay"),
        ("QUERN_MAIL__USERNAME", "forms", "mail relay"),
        ("QUERN_MAIL__CA_FILE", "/etc/ssl/certs/ca-certificates.crt", "mail relay"),
        ("QUERN_MONGODB_DATABASE", "empty", "indexes"),
        ("QUERN_MONGODB_DATABASE", "empty", "workers"),
    ],
)
def test_the_doctor_names_what_is_down_and_what_to_run(quern: Quern, setting: str, value: str, check: str) -> None:
    found = quern("doctor", "--json", **{setting: value})
    assert found.code == 1
    row = _checks(found)[check]
    assert not row["ok"]
    assert row["run"]
    assert "Traceback" not in found.err


def test_what_cannot_be_looked_at_is_not_waited_for(quern: Quern) -> None:
    away = "mongodb://%2Fnowhere%2Fm.sock/?directConnection=true"
    checks = _checks(quern("doctor", "--json", QUERN_MONGODB_URI=away))
    assert checks["dead letters"] == {
        "check": "dead letters",
        "ok": False,
        "found": "not looked at: MongoDB first",
        "run": "",
    }


def test_a_database_that_is_away_is_said_in_one_line(quern: Quern) -> None:
    found = quern("status", QUERN_MONGODB_URI="mongodb://%2Fnowhere%2Fm.sock/?directConnection=true")
    assert found.code == 1
    assert found.err.strip().splitlines() == [
        "Error: expected MongoDB to answer, found ServerSelectionTimeoutError; run `quern doctor`"
    ]


def test_the_audit_chain_is_verified_also_after_erasures_and_a_changed_answer_is_found(
    quern: Quern, house: House, owner: Client
) -> None:
    form = owner.form([{"name": "a", "type": "text"}])
    erased, changed = owner.submit(form, {"a": "gone"}), owner.submit(form, {"a": "true words"})
    owner.call("DELETE", f"/responses/{erased}", status=204)
    db = house.stack.runtime.store.db
    until(lambda: db.audit.count_documents({"pending": True}) == 0 and db.audit.find_one({"subject": changed}))
    subjects = {"subject": {"$in": [erased, changed]}, "seq": {"$exists": True}}
    until(lambda: db.audit.count_documents(subjects) >= 3)
    verified = quern("audit", "verify", "--json")
    facts = orjson.loads(verified.out)
    assert [problem for problem in facts["problems"] if erased in problem or changed in problem] == []
    assert facts["contents_erased"] >= 1
    db.responses.update_one({"_id": changed}, {"$set": {"answers.a": "other words"}})
    found = quern("audit", "verify")
    assert found.code == 1
    assert changed in found.out
    db.responses.update_one({"_id": changed}, {"$set": {"answers.a": "true words"}})
    entry = db.audit.find_one({"subject": changed})
    assert entry is not None
    db.audit.update_one({"_id": entry["_id"]}, {"$set": {"actor": "somebody else"}})
    found = quern("audit", "verify")
    assert found.code == 1
    assert f"entry {entry['seq']}" in found.out
    db.audit.update_one({"_id": entry["_id"]}, {"$set": {"actor": entry["actor"]}})


def test_a_wrong_setting_of_the_engine_is_named_without_its_value() -> None:
    environment = {**os.environ, "QUERN_ENGINE_CONTEXT": "lots-of-it"}
    command = [sys.executable, "-m", "quern.cli.main", "engine"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode != 0
    assert "QUERN_ENGINE_CONTEXT" in ended.stderr
    assert "lots-of-it" not in ended.stderr + ended.stdout
    assert "Traceback" not in ended.stderr
