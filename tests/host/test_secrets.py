"""Secrets are sealed at rest and shown to nobody."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from testinfra.host import Host

from tests.host.conftest import Played

#: Opens every credential and looks for its secrets wherever somebody could read them; it prints names, never a secret.
#: Only what is too long to occur by chance is a secret: a password of 256 bits, or a part of a keyfile, ring or list.
_SEARCH = """
import json, pathlib, re, subprocess, sys

FOLDER = pathlib.Path("/etc/credstore.encrypted")
CHUNK, LONGEST = 1 << 22, 4096

def secrets_of(path):
    command = ["systemd-creds", "decrypt", "--name=" + path.name.split(".", 1)[1], str(path), "-"]
    text = subprocess.run(command, capture_output=True, check=True).stdout
    login = re.match(rb"[a-z]+://[^:]+:([^@]+)@", text)
    return [one for one in re.split(rb"[,\\s]+", login[1] if login else text) if len(one) >= 20]

def found_in(stream):
    found, rest = set(), b""
    while chunk := stream.read(CHUNK):
        seen = rest + chunk
        found |= {name for name, values in known.items() for value in values if value in seen}
        rest = seen[-LONGEST:]
    return found

def found_in_files(paths):
    found = {}
    for path in paths:
        try:
            with path.open("rb") as stream:
                names = found_in(stream)
        except OSError:
            continue  # the process has ended meanwhile, or the file went
        if names:
            found[str(path)] = sorted(names)
    return found

files = sorted(path for path in FOLDER.iterdir() if "." in path.name.strip("."))
known = {path.name: secrets_of(path) for path in files if not path.name.startswith(".")}
processes = [path for path in pathlib.Path("/proc").iterdir() if path.name.isdecimal()]
# With every field of an entry: a command line is one.
with subprocess.Popen(["journalctl", "--no-pager", "-o", "export"], stdout=subprocess.PIPE) as journal:
    in_journal = sorted(found_in(journal.stdout))
logs = [path for path in pathlib.Path("/var/log").rglob("*") if path.is_file() and "journal" not in path.parts]
print(json.dumps({
    "opened": {name: len(values) for name, values in known.items()},
    "processes": len(processes),
    "credential files": found_in_files(FOLDER.iterdir()),
    "argument lists": found_in_files(path / "cmdline" for path in processes),
    "environments": found_in_files(path / "environ" for path in processes),
    "journal": in_journal,
    "logs": found_in_files(logs),
}))
"""


@pytest.fixture(scope="module")
def shown(host: Host) -> dict[str, Any]:
    """Where the secrets of which credentials were seen in plain text, by kind of place."""
    found: dict[str, Any] = json.loads(host.check_output("python3 -c %s", _SEARCH))
    return found


def test_credentials_are_encrypted_and_for_root_only(host: Host, shown: dict[str, Any]) -> None:
    folder = host.file("/etc/credstore.encrypted")
    assert (folder.user, folder.mode) == ("root", 0o700)
    names = folder.listdir()
    assert len(names) >= 24
    for name in names:
        file = host.file(f"/etc/credstore.encrypted/{name}")
        assert (file.user, file.mode) == ("root", 0o600), name
    # Of each at least one secret was looked for.
    assert set(shown["opened"]) == set(names)
    assert all(shown["opened"].values()), shown["opened"]
    assert shown["credential files"] == {}


@pytest.mark.parametrize("kind", ["argument lists", "environments"])
def test_no_secret_is_in_an_argument_list_or_an_environment(
    shown: dict[str, Any], expected: dict[str, Any], kind: str
) -> None:
    assert shown["processes"] >= len(expected["services"])
    assert shown[kind] == {}


def test_no_secret_is_in_the_journal(shown: dict[str, Any]) -> None:
    assert shown["journal"] == []
    assert shown["logs"] == {}


def test_only_who_sends_mail_holds_the_relays_password(host: Host) -> None:
    found = host.check_output("find /run/credentials -name quern_mail_password").split()
    units = {"quern-worker@default.service", "prometheus-alertmanager.service"}
    assert set(found) == {f"/run/credentials/{unit}/quern_mail_password" for unit in units}


def test_a_first_key_that_was_moved_away_is_not_made_again(host: Host, play: Callable[..., Played]) -> None:
    count = "quern tenant list --json | python3 -c 'import json, sys; print(len(json.load(sys.stdin)))'"
    before = host.check_output(count)
    host.check_output("mv /root/quern-first-key.json /root/elsewhere.json")
    try:
        done = play("playbooks/verify.yml")
        assert done.code == 0, done.output
        assert done.changed == []
        assert "The first key is where you keep it" in done.output
        assert host.check_output(count) == before
        assert not host.file("/root/quern-first-key.json").exists
    finally:
        host.check_output("mv /root/elsewhere.json /root/quern-first-key.json")


def test_no_account_of_another_service_opens_the_database(host: Host) -> None:
    assert host.run("runuser -u nobody -- test -r /run/mongodb/mongod.sock").rc != 0
    assert host.run("runuser -u nginx -- ls /run/mongodb").rc != 0


def test_mongods_keyfile_is_for_mongod_alone(host: Host) -> None:
    # Whatever mode systemd gives a credential: a group's right to read it would keep mongod from starting.
    file = host.file("/run/mongodb/keyfile")
    assert (file.user, file.group, file.mode) == ("mongodb", "mongodb", 0o400)
    pid = host.check_output("systemctl show -p MainPID --value mongod")
    assert host.file(f"/proc/{pid}/cmdline").content.endswith(b"--keyFile\0/run/mongodb/keyfile\0")


def test_redis_refuses_who_has_no_account(host: Host) -> None:
    answer = host.run("redis-cli -s /run/redis-queue/redis.sock ping")
    assert "NOAUTH" in answer.stdout


def test_mongod_refuses_who_has_no_account(host: Host) -> None:
    program = (
        "import pymongo; c = pymongo.MongoClient('mongodb://%2Frun%2Fmongodb%2Fmongod.sock/?directConnection=true');"
        "c.quern.responses.find_one()"
    )
    answer = host.run("python3 -c %s", program)
    assert answer.rc != 0
    assert "requires authentication" in answer.stderr
