"""A new release goes in under load without a failed request; a broken one takes itself back."""

import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
from testinfra.host import Host

from tests.host.client import Client
from tests.host.conftest import Place, Played
from tests.host.load import Load

_COMMENTED = """
import sys, zipfile
with zipfile.ZipFile(sys.argv[1], "a") as wheel:
    wheel.comment = b"other"
"""


@pytest.fixture(scope="module")
def form(client: Client) -> str:
    return client.form("Under load")


def active(host: Host) -> str:
    return str(host.check_output("readlink /opt/quern/current"))


def started(host: Host, unit: str) -> str:
    return str(host.check_output("systemctl show -p ActiveEnterTimestampMonotonic --value %s", unit))


def test_a_second_release_fails_no_request(
    host: Host,
    place: Place,
    client: Client,
    form: str,
    trusting: ssl.SSLContext,
    play: Callable[..., Played],
    release: Callable[[str, str], Path],
) -> None:
    before = active(host)
    source = release("app/quern/__init__.py", "\n# Another release.\n")
    with Load(place.address, client.key, form, trusting) as load:
        done = play("playbooks/deploy.yml", app_source=str(source))
    assert done.code == 0, done.output
    after = active(host)
    assert after != before
    assert host.check_output("readlink /opt/quern/previous") == before
    for unit in ("quern-api@1", "quern-api@2", "quern-worker@batched"):
        pid = host.check_output("systemctl show -p MainPID --value %s", unit)
        assert after in host.file(f"/proc/{pid}/environ").content_string, unit
    print(f"{load.answered} answered, {load.repeated} repeated on a new connection, {len(load.acknowledged)} accepted")
    assert load.failures == []
    assert client.call("GET", f"/api/v1/responses/{load.acknowledged[-1]}")["id"] == load.acknowledged[-1]


def test_a_broken_release_takes_itself_back(
    host: Host,
    place: Place,
    client: Client,
    form: str,
    trusting: ssl.SSLContext,
    play: Callable[..., Played],
    release: Callable[[str, str], Path],
) -> None:
    before = active(host)
    source = release("app/quern/api/server.py", '\nraise RuntimeError("broken on purpose")\n')
    with Load(place.address, client.key, form, trusting) as load:
        done = play("playbooks/deploy.yml", app_source=str(source))
    assert done.code != 0
    assert "the previous release is back" in done.output
    assert active(host) == before
    assert load.failures == []
    assert "down" not in host.check_output("grep -rh 'server unix:/run/quern-api/' /etc/nginx")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"QUERN_JOB__LEASE": "never"}, "QUERN_JOB__LEASE: "),
        # A slip of the pen would be passed over in silence.
        ({"QUERN_JOBS__LEASE": 10}, "QUERN_JOBS__LEASE: "),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_touched(
    host: Host, play: Callable[..., Played], settings: dict[str, object], said: str
) -> None:
    units = ("quern-api@1", "quern-api@2", "quern-worker@batched", "quern-relay")
    before = [active(host), host.file("/etc/quern/quern.env").content_string, *(started(host, unit) for unit in units)]
    done = play("playbooks/deploy.yml", app_settings=settings)
    assert done.code != 0
    assert said in done.output
    after = [active(host), host.file("/etc/quern/quern.env").content_string, *(started(host, unit) for unit in units)]
    assert after == before


def test_a_setting_by_which_nothing_serves_is_taken_back(
    host: Host, place: Place, client: Client, form: str, trusting: ssl.SSLContext, play: Callable[..., Played]
) -> None:
    before = host.file("/etc/quern/quern.env").content_string
    with Load(place.address, client.key, form, trusting) as load:
        # Of the right form, and there is no such Redis: the API's first instance does not become ready.
        done = play("playbooks/deploy.yml", app_settings={"QUERN_REDIS_QUEUE_URL": "unix:///run/nowhere/redis.sock"})
    assert done.code != 0
    # The release is another one where the test before left a second one active.
    assert "the previous release is back" in done.output or "from before are back" in done.output
    assert host.file("/etc/quern/quern.env").content_string == before
    assert load.failures == []


@pytest.mark.full
def test_another_engine_is_another_release_and_rollback_brings_the_one_before_back(
    host: Host, play: Callable[..., Played]
) -> None:
    before = active(host)
    environment = host.check_output("readlink /opt/quern/current/environment")
    (wheel,) = host.check_output("ls /opt/quern/wheels/llama/llama_cpp_python-*.whl").split()
    host.check_output("cp -p %s /root/wheel", wheel)
    try:
        # Other bytes that install as the same.
        host.check_output("python3 -c %s %s", _COMMENTED, wheel)
        done = play("playbooks/deploy.yml")
        assert done.code == 0, done.output
        assert active(host) != before
        other = host.check_output("readlink /opt/quern/current/environment")
        assert other != environment
        assert other in host.check_output("cat /proc/$(systemctl show -p MainPID --value quern-engine)/maps")
        assert play("playbooks/rollback.yml").code == 0
        assert active(host) == before
        assert host.check_output("readlink /opt/quern/current/environment") == environment
    finally:
        host.check_output("mv /root/wheel %s", wheel)


def test_the_operator_goes_back_to_the_release_before(host: Host, play: Callable[..., Played]) -> None:
    wanted = host.check_output("readlink /opt/quern/previous")
    assert active(host) != wanted
    done = play("playbooks/rollback.yml")
    assert done.code == 0, done.output
    assert active(host) == wanted


def test_old_releases_are_removed(host: Host) -> None:
    assert len(host.file("/opt/quern/releases").listdir()) <= 4
    host.check_output("/usr/local/sbin/quern-releases prune 3")
    kept = host.check_output("/usr/local/sbin/quern-releases list").splitlines()
    assert len(kept) == 3
    assert {line.split()[2] for line in kept if len(line.split()) > 2} == {"active", "previous"}
