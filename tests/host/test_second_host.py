"""A host without any connection is installed from a bundle, and takes over what another one backed up."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from testinfra.host import Host

from tests.host.client import Client
from tests.host.conftest import ROOT, Place, Played, connect, place_of, relay_login
from tests.host.test_analytics import fill
from tests.host.test_backup import in_both, owned, settings, warehouse
from tests.host.test_rotation import secret

pytestmark = pytest.mark.full

_PATIENCE_SECONDS = 600
_CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5)"


@pytest.fixture(scope="module")
def second() -> Iterator[Place]:
    """A blank host that reaches this machine and nothing else."""
    name = f"s{os.getpid()}"
    program = str(ROOT / "molecule/nspawn-host")
    subprocess.run([program, "create", name], check=True, stdout=subprocess.DEVNULL)
    try:
        place = place_of(name)
        issue = [sys.executable, str(ROOT / "molecule/issue-certificate"), str(place.folder / "tls"), place.gateway]
        subprocess.run(issue, check=True)
        subprocess.run([program, "sever", name], check=True)
        yield place
    finally:
        subprocess.run([program, "destroy", name], check=True)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "bundle.tar"
    # The same as on the first host, see molecule/inventory.
    built = subprocess.run(
        [sys.executable, str(ROOT / "scripts/build-llama")], check=True, capture_output=True, text=True
    )
    wheel = Path(built.stdout.splitlines()[-1])
    command = [sys.executable, str(ROOT / "scripts/bundle"), "--llama", str(wheel.parent), "--into", str(path)]
    subprocess.run(command, check=True)
    return path


def rested(host: Host) -> dict[str, dict[str, str]]:
    """What tenants own, when no work is left that changes it."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    found = owned(host)
    before: dict[str, dict[str, str]] = {}
    while found != before:
        assert time.monotonic() < deadline, "expected the work to end"
        time.sleep(10)
        found, before = owned(host), found
    return found


def test_a_blank_host_without_a_connection_takes_over_from_another(
    host: Host,
    client: Client,
    second: Place,
    bundle: Path,
    play: Callable[..., Played],
    tmp_path: Path,
) -> None:
    other = connect(second)
    name_server = other.check_output("awk '/nameserver/ {print $2; exit}' /etc/resolv.conf")
    assert other.run("python3 -c %s %s 53", _CONNECT, name_server).rc != 0
    there = {"QUERN_TEST_HOST": second.folder.name, "QUERN_TEST_BUNDLE": str(bundle)}

    installed = play("site.yml", environment=there)
    assert installed.code == 0, installed.output

    form = client.form("To be taken over")
    made = client.call("POST", f"/api/v1/forms/{form}/responses", {"answers": {"comment": "Take me along."}})
    client.processed(made["id"], _PATIENCE_SECONDS)
    fill(host)
    kept, files = rested(host), warehouse(host)
    copied = play("playbooks/backup.yml", backup_copy_to=str(tmp_path))
    assert copied.code == 0, copied.output
    files = dict(files.items() & warehouse(host).items())
    assert files
    password = host.check_output("quern-backup password")
    taken = play(
        "playbooks/restore.yml",
        environment=there,
        backup_copy_from=str(tmp_path / "quern-backup.tar"),
        secrets_given={"quern-backup.restic_password": password, "quern.quern_mail_password": relay_login()[1]},
    )
    assert taken.code == 0, taken.output
    assert in_both(kept, owned(other)) == kept
    assert files.items() <= warehouse(other).items()
    assert settings(other, "latest") == host.file("/etc/quern/quern.env").content_string
    for name in ("quern.quern_secret_keys", "quern.quern_audit_key"):
        # The value itself would be in the output of a failed test.
        assert (secret(other, name) == secret(host, name)) is True, name
    authority = "/etc/quern/tls/authority.pem"
    assert other.file(authority).content == host.file(authority).content
    health = "curl -sf --cacert /etc/quern/tls/authority.pem --connect-to quern.test:443:127.0.0.1:443 https://quern.test/healthz"
    assert other.run(health).rc == 0
