"""Every secret is made anew under load, without a failed request, and the former ones open nothing."""

import ssl
from collections.abc import Callable

import pytest
from testinfra.host import Host

from tests.host.client import Client
from tests.host.conftest import Place, Played
from tests.host.load import Load

pytestmark = pytest.mark.full


def secret(host: Host, file: str) -> str:
    name = file.split(".", 1)[1]
    return str(host.check_output("systemd-creds decrypt --name=%s /etc/credstore.encrypted/%s -", name, file))


def test_secrets_are_rotated_without_a_failed_request(
    host: Host, place: Place, client: Client, trusting: ssl.SSLContext, play: Callable[..., Played]
) -> None:
    files = [
        file for file in host.file("/etc/credstore.encrypted").listdir() if file != "quern-admin.quern_redis_queue_url"
    ]
    before = {file: secret(host, file) for file in files}
    form = client.form("While secrets change")
    with Load(place.address, client.key, form, trusting) as load:
        done = play("playbooks/rotate_secrets.yml")
    assert done.code == 0, done.output
    after = {file: secret(host, file) for file in files}
    assert [file for file in files if before[file] == after[file]] == []
    assert load.failures == []
    print(f"{load.answered} answered, {load.repeated} repeated on a new connection")

    program = "import pymongo, sys; pymongo.MongoClient(sys.stdin.read()).quern.command('ping')"
    python = "/opt/quern/current/environment/bin/python"
    for content, opens in ((after, True), (before, False)):
        uri = content["quern-api.quern_mongodb_uri"]
        answer = host.run("printf %%s %s | %s -c %s", uri, python, program)
        assert (answer.rc == 0) is opens, answer.stderr
        password = content["quern-api.quern_redis_queue_url"].split(":")[2].split("@")[0]
        answer = host.run("redis-cli -s /run/redis-queue/redis.sock --user quern-api --pass %s ping", password)
        assert ("PONG" in answer.stdout) is opens, answer.stderr
    # What the former keys sealed is still open to those who may open it.
    assert before["quern.quern_secret_keys"] in after["quern.quern_secret_keys"]
    assert play("site.yml").changed == []
