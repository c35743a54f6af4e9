"""The provisioned test host, its expected values, and the far ends that run beside it."""

import json
import os
import ssl
import sys
from collections.abc import Iterator
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

RECEIVER_PORT = 8443
MAIL_PORT = 2525


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


@pytest.fixture(scope="session")
def place() -> Place:
    cache = Path(os.environ.get("QUERN_CACHE") or Path.home() / ".cache" / "quern")
    folder = cache / "hosts" / "running" / os.environ.get("QUERN_TEST_HOST", "quern")
    facts = json.loads((folder / "facts.json").read_text())
    return Place(facts["address"], facts["gateway"], Path(facts["key"]), Path(facts["known_hosts"]), folder)


@pytest.fixture(scope="session")
def host(place: Place) -> Host:
    """Commands run as root over SSH."""
    # One connection for all commands: the host takes only so many new ones a minute.
    shared = f"-o ControlMaster=auto -o ControlPersist=60 -o ControlPath={place.folder}/ssh-%C"
    options = f"-o UserKnownHostsFile={place.known_hosts} {shared}"
    return testinfra.get_host(f"ssh://root@{place.address}", ssh_identity_file=str(place.key), ssh_extra_args=options)


@pytest.fixture(scope="session")
def expected() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "expected.yml").read_text())
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


@pytest.fixture(scope="session")
def mail_relay(place: Place, certificate: ServerCertificate) -> Iterator[SmtpSink]:
    with SmtpSink(host=place.gateway, port=MAIL_PORT, tls="starttls", certificate=certificate) as running:
        yield running


@pytest.fixture(scope="session")
def tenant_key(host: Host) -> str:
    """The secret key of a tenant of the tests' own."""
    made = json.loads(host.check_output("quern tenant create host-tests --requests-per-minute 0 --json"))
    return str(made["key"])
