"""Every secret is made anew under load, without a failed request, and the former ones open nothing."""

import json
import re
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from testinfra.host import Host

from tests.host.client import Client
from tests.host.conftest import Place, Played, told
from tests.host.load import Load

pytestmark = pytest.mark.full

#: Tries each address of a JSON object; a refusal that names anything but the password is an error.
_LOG_IN = """
import json, sys
import pymongo, pymongo.errors, redis

def enters(address):
    try:
        if address.startswith("mongodb:"):
            with pymongo.MongoClient(address) as client:
                client.admin.command("ping")
        else:
            redis.Redis.from_url(address, protocol=2).ping()
    except redis.exceptions.NoPermissionError:
        return True
    except redis.exceptions.AuthenticationError:
        return False
    except pymongo.errors.OperationFailure as error:
        if error.code != 18:
            raise
        return False
    return True

print(json.dumps({name: enters(address) for name, address in json.load(sys.stdin).items()}))
"""


def secret(host: Host, file: str) -> str:
    name = file.split(".", 1)[1]
    return str(host.check_output("systemd-creds decrypt --name=%s /etc/credstore.encrypted/%s -", name, file))


def newest(content: str) -> str:
    """Without the former password of an administrator's, which stands behind the new one while it is rotated."""
    return re.sub(r",[A-Za-z0-9_-]{43}(?=@|$)", "", content)


def logins(content: dict[str, str]) -> dict[str, str]:
    """Every account of the databases, by its credential's file; the administrator of Redis is one of both instances."""
    found = {file: text for file, text in content.items() if text.startswith(("mongodb:", "unix:"))}
    found["mongodb.admin"] = found["quern-api.quern_mongodb_uri"].replace(
        re.findall("//(.*)@", found["quern-api.quern_mongodb_uri"])[0], f"admin:{content['mongodb.admin']}"
    )
    found["cache"] = found["quern-admin.quern_redis_queue_url"].replace("redis-queue", "redis-cache")
    return found


def opened(place: Place, content: dict[str, str]) -> dict[str, bool]:
    """Which of them lets somebody in."""
    python = "/opt/quern/current/environment/bin/python"
    return dict(json.loads(told(place, [python, "-c", _LOG_IN], json.dumps(logins(content)))))


def test_secrets_are_rotated_without_a_failed_request(
    host: Host, place: Place, client: Client, trusting: ssl.SSLContext, play: Callable[..., Played]
) -> None:
    # What the inventory gives is the operator's to change.
    files = [file for file in host.file("/etc/credstore.encrypted").listdir() if file != "quern.quern_mail_password"]
    before = {file: secret(host, file) for file in files}
    form = client.form("While secrets change")
    with Load(place.address, client.key, form, trusting) as load:
        done = play("playbooks/rotate_secrets.yml")
    assert done.code == 0, done.output
    (said,) = re.findall(r"made_anew:\n((?: +- .+\n)+)", done.output)
    assert set(re.findall("- (.+)", said)) == {*files, "/etc/quern/tls/server.key"}
    after = {file: secret(host, file) for file in files}
    assert [file for file in files if before[file] == after[file]] == []
    assert load.failures == []
    print(f"{load.answered} answered, {load.repeated} repeated on a new connection")

    assert opened(place, after) == dict.fromkeys(logins(after), True)
    assert opened(place, before) == dict.fromkeys(logins(before), False)
    # What the former keys sealed is still open to those who may open it.
    assert before["quern.quern_secret_keys"] in after["quern.quern_secret_keys"]
    assert play("site.yml").changed == []


def drop_ins(unit: str) -> str:
    """Where settings of a unit last until they are removed, or the host goes down."""
    return f"/run/systemd/system/{unit}.service.d"


@contextmanager
def failing(host: Host, unit: str, command: str) -> Iterator[None]:
    """A unit that runs this command, as root, before each start."""
    folder = drop_ins(unit)
    setting = f"[Service]\nExecStartPre=+/bin/sh -c '{command}'\n"
    host.check_output("mkdir -p %s && printf %%s %s >%s/test.conf && systemctl daemon-reload", folder, setting, folder)
    try:
        yield
    finally:
        host.check_output("rm -r %s && systemctl daemon-reload", folder)


def test_an_interrupted_rotation_goes_on_without_a_failed_request(
    host: Host, place: Place, client: Client, trusting: ssl.SSLContext, play: Callable[..., Played]
) -> None:
    before = {file: secret(host, file) for file in host.file("/etc/credstore.encrypted").listdir()}
    kinds = {"rotate_secrets": ["mongodb", "redis"]}
    form = client.form("While secrets change twice")
    with Load(place.address, client.key, form, trusting) as load:
        with failing(host, "quern-scheduler", "exit 1"):
            stopped = play("playbooks/rotate_secrets.yml", **kinds)
        introduced = {file: newest(secret(host, file)) for file in before}
        # Some processes use the new secrets by now, and others the former ones: both hold.
        assert opened(place, introduced) == dict.fromkeys(logins(before), True)
        assert opened(place, before) == dict.fromkeys(logins(before), True) | {"mongodb.admin": False}
        # A start that fails once, as it may in a slice that was just being removed, is tried again.
        mark = f"{drop_ins('quern-scheduler')}/failed"
        once = f"test -e {mark} || {{ touch {mark}; exit 1; }}"
        with failing(host, "quern-scheduler", once):
            done = play("playbooks/rotate_secrets.yml", **kinds)
    assert stopped.code != 0
    assert done.code == 0, done.output
    assert "FAILED - RETRYING" in done.output
    assert load.failures == []
    after = {file: secret(host, file) for file in before}
    assert after == introduced
    assert opened(place, after) == dict.fromkeys(logins(after), True)
    assert opened(place, before) == dict.fromkeys(logins(before), False)
    assert play("site.yml").changed == []
