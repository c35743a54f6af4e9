"""Secrets are sealed at rest and shown to nobody."""

import re
from typing import Any

from testinfra.host import Host

#: A password inside a connection string.
_PASSWORD = re.compile(rb"(mongodb|unix)://[a-z-]+:[A-Za-z0-9_-]{20,}@")


def test_credentials_are_encrypted_and_for_root_only(host: Host) -> None:
    folder = host.file("/etc/credstore.encrypted")
    assert (folder.user, folder.mode) == ("root", 0o700)
    names = folder.listdir()
    assert len(names) >= 24
    for name in names:
        file = host.file(f"/etc/credstore.encrypted/{name}")
        assert (file.user, file.mode) == ("root", 0o600), name
        assert not _PASSWORD.search(file.content), name


def test_no_secret_is_in_an_argument_list_or_an_environment(host: Host, expected: dict[str, Any]) -> None:
    for name in expected["services"]:
        pid = host.check_output("systemctl show -p MainPID --value %s", name)
        for kind in ("cmdline", "environ"):
            assert not _PASSWORD.search(host.file(f"/proc/{pid}/{kind}").content), (name, kind)


def test_no_secret_is_in_the_journal(host: Host) -> None:
    # grep's answer 1 says that there is no such line.
    assert host.run(r"journalctl --no-pager -o cat | grep -qE '(mongodb|unix)://[a-z-]+:[A-Za-z0-9_-]{20,}@'").rc == 1


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
