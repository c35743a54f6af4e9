"""The provisioned test host, its expected values, and the far ends that run beside it."""

import json
import os
import shlex
import shutil
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import testinfra
import yaml
from testinfra.host import Host

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "app"))

from quern.embedded.certificate import ServerCertificate
from quern.embedded.receiver import Receiver
from quern.embedded.smtp_sink import SmtpSink
from tests.host.client import Client

ROOT = Path(__file__).resolve().parents[2]
RECEIVER_PORT = 8443
MAIL_PORT = 2525
#: A UNIX socket's path ends at 107 bytes, and a cache may lie deep.
_SOCKETS = tempfile.TemporaryDirectory(prefix="q-", dir="/tmp")


def pytest_configure(config: pytest.Config) -> None:
    """Name the set of tests that only `make test-host-full` runs."""
    config.addinivalue_line("markers", "full: takes minutes; run by `make test-host-full` only")


@dataclass(frozen=True)
class Place:
    """Where the host is, and how it is reached."""

    address: str
    gateway: str
    key: Path
    known_hosts: Path
    folder: Path

    @property
    def url(self) -> str:
        return f"https://{self.address}"


def place_of(name: str) -> Place:
    """Where a host of molecule/nspawn-host is."""
    cache = Path(os.environ.get("QUERN_CACHE") or Path.home() / ".cache" / "quern")
    folder = cache / "hosts" / "running" / name
    facts = json.loads((folder / "facts.json").read_text())
    return Place(facts["address"], facts["gateway"], Path(facts["key"]), Path(facts["known_hosts"]), folder)


@pytest.fixture(scope="session")
def place() -> Place:
    return place_of(os.environ.get("QUERN_TEST_HOST", "quern"))


@pytest.fixture(scope="session")
def host(place: Place) -> Host:
    return connect(place)


def connect(place: Place, account: str = "admin") -> Host:
    """Commands run as root over SSH; `account` comes in, and is root itself where roles/base is not applied."""
    # A starved machine takes longer than testinfra's ten seconds to let somebody in.
    where = f"ssh://{account}@{place.address}"
    return testinfra.get_host(
        where,
        ssh_identity_file=str(place.key),
        ssh_extra_args=" ".join(options(place)),
        timeout=180,
        sudo=account != "root",
    )


def options(place: Place) -> list[str]:
    """How SSH comes in. One connection for all commands: the host takes only so many new ones a minute."""
    named = {
        "UserKnownHostsFile": place.known_hosts,
        "ControlMaster": "auto",
        "ControlPersist": 60,
        "ControlPath": f"{_SOCKETS.name}/%C",
    }
    return [f"-o{name}={value}" for name, value in named.items()]


def told(place: Place, command: Sequence[str], secret: str) -> str:
    """What a command answers as root to a secret on its standard input: sudo writes arguments into the journal."""
    come_in = ["ssh", "-oBatchMode=yes", "-i", str(place.key), *options(place), f"admin@{place.address}"]
    said = subprocess.run(
        [*come_in, shlex.join(["sudo", "-n", *command])], input=secret, capture_output=True, text=True, check=False
    )
    assert said.returncode == 0, said.stderr
    return said.stdout


@pytest.fixture(scope="session")
def expected() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "expected.yml").read_text())
    if only := os.environ.get("QUERN_TEST_SERVICES", "").split():
        # One role's scenario: nothing else runs there.
        for name in ("services", "networked"):
            loaded[name] = [service for service in loaded[name] if service in only]
    return loaded


@pytest.fixture(scope="session")
def trusting(host: Host) -> ssl.SSLContext:
    """A client that trusts the host's own authority and no other."""
    return ssl.create_default_context(cadata=host.file("/etc/quern/tls/authority.pem").content_string)


@pytest.fixture(scope="session")
def certificate(place: Place) -> ServerCertificate:
    tls = place.folder / "tls"
    return ServerCertificate(tls / "authority.pem", tls / "server.pem", tls / "server.key")


@pytest.fixture(scope="session")
def receiver(place: Place, certificate: ServerCertificate) -> Iterator[Receiver]:
    with Receiver(host=place.gateway, port=RECEIVER_PORT, certificate=certificate) as running:
        yield running


def relay_login() -> tuple[str, str]:
    """What molecule/inventory tells the host: without it, the relay takes no mail."""
    known = json.loads((ROOT / "molecule/relay.json").read_text())
    return known["username"], known["password"]


@pytest.fixture(scope="session")
def mail_relay(place: Place, certificate: ServerCertificate) -> Iterator[SmtpSink]:
    with SmtpSink(
        host=place.gateway, port=MAIL_PORT, tls="starttls", certificate=certificate, credentials=relay_login()
    ) as running:
        yield running


@pytest.fixture(scope="session")
def tenant_key(host: Host) -> str:
    """The secret key of a tenant of the tests' own."""
    made = json.loads(host.check_output("quern tenant create host-tests --requests-per-minute 0 --json"))
    return str(made["key"])


@pytest.fixture(scope="session")
def client(place: Place, tenant_key: str, trusting: ssl.SSLContext) -> Client:
    """A client with that key."""
    return Client(place.url, tenant_key, trusting)


@dataclass(frozen=True)
class Played:
    """How a playbook ended, and the tasks that changed something, each with its item."""

    code: int
    output: str
    changed: list[tuple[str, str]]


@pytest.fixture(scope="session")
def play(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Played]:
    """Runs a playbook against the host: `play("playbooks/deploy.yml", app_source=…)`; `environment` for another one.

    `dry` only foretells.
    """

    def run(playbook: str, environment: dict[str, str] | None = None, dry: bool = False, **variables: Any) -> Played:
        changes = tmp_path_factory.mktemp("changes")
        surroundings = {
            **os.environ,
            **(environment or {}),
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_ROLES_PATH": str(ROOT / "roles"),
            "ANSIBLE_CALLBACK_PLUGINS": str(ROOT / "molecule/callback_plugins"),
            "ANSIBLE_CALLBACKS_ENABLED": "changes",
            "QUERN_CHANGES": str(changes),
        }
        program = str(Path(sys.executable).parent / "ansible-playbook")
        command = [program, "-i", str(ROOT / "molecule/inventory"), playbook, "-e", json.dumps(variables)]
        command += ["--check"] if dry else []
        done = subprocess.run(
            command, cwd=ROOT, env=surroundings, capture_output=True, text=True, check=False, timeout=5400
        )
        (written,) = changes.glob("*.json")
        changed = [(task, item) for task, item in json.loads(written.read_text())["changed"]]
        return Played(done.returncode, done.stdout + done.stderr, changed)

    return run


@pytest.fixture
def release(tmp_path: Path) -> Callable[[str, str], Path]:
    """Makes the source of another release: this checkout's, with a text added to one of its files."""

    def make(file: str, text: str) -> Path:
        source = tmp_path / "source"
        (source / "app").mkdir(parents=True)
        shutil.copytree(ROOT / "app/quern", source / "app/quern", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("app/pyproject.toml", "requirements.txt", "requirements-llama.txt"):
            shutil.copy(ROOT / name, source / name)
        with (source / file).open("a") as opened:
            opened.write(text)
        return source

    return make
