"""The virtual machine that the tests share, the far ends beside it, and a client of the appliance."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from quern.embedded.certificate import ServerCertificate
from quern.embedded.receiver import Receiver
from quern.embedded.smtp_sink import SmtpSink
from tests.vm.client import Client
from tests.vm.guest import Guest

ROOT = Path(__file__).resolve().parents[2]
RECEIVER_PORT = 8443
MAIL_PORT = 2525


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The smoke part first: it looks at a machine to which nothing has been done yet."""
    items.sort(key=lambda item: item.path.name != "test_smoke.py")


@pytest.fixture(scope="session")
def expected() -> dict[str, Any]:
    """What a virtual machine is expected to be."""
    loaded: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "expected.yml").read_text())
    return loaded


@pytest.fixture(scope="session")
def services(expected: dict[str, Any]) -> list[str]:
    """Every confined service's instances."""
    return [unit for units in expected["profiles"].values() for unit in units]


@pytest.fixture(scope="session")
def guest(services: list[str]) -> Iterator[Guest]:
    """A fresh copy of the image that serves. Its QEMU is ended by its process id, whatever happens.

    `QUERN_VM_ATTACH` names one that runs already, and is left running.
    """
    if given := os.environ.get("QUERN_VM_ATTACH"):
        attached = Guest(given)
        attached.attach()
        attached.wait_serving(services)
        yield attached
        return
    running = Guest(f"vmt{os.getpid()}")
    try:
        running.start()
        seconds = running.wait_serving(services)
        facts = running.facts
        how = f"{facts['how']}, {facts['accelerator']}"
        print(f"\nSSH after {facts['boot_seconds']} s, serving {seconds:.0f} s later ({how})")
        # Where a boot takes minutes, it is done once for each image; a power cut or a reboot boots all the same.
        if facts["accelerator"] == "tcg" and facts["how"] == "booted":
            running.save()
            running.wait_serving(services)
        yield running
    finally:
        running.destroy()


@pytest.fixture(scope="session")
def certificate(guest: Guest) -> ServerCertificate:
    """What the far ends show, and the guest trusts."""
    tls = guest.folder / "tls"
    return ServerCertificate(tls / "authority.pem", tls / "server.pem", tls / "server.key")


@pytest.fixture(scope="session")
def receiver(certificate: ServerCertificate) -> Iterator[Receiver]:
    """Takes the webhooks. The guest knows this machine's loopback by its gateway's address."""
    with Receiver(
        host=os.environ.get("QUERN_VM_GATEWAY", "127.0.0.1"), port=RECEIVER_PORT, certificate=certificate
    ) as running:
        yield running


@pytest.fixture(scope="session")
def mail_relay(certificate: ServerCertificate) -> Iterator[SmtpSink]:
    """Takes the mail, of who logs in as the guest was told to."""
    known = json.loads((ROOT / "molecule/relay.json").read_text())
    with SmtpSink(
        host=os.environ.get("QUERN_VM_GATEWAY", "127.0.0.1"),
        port=MAIL_PORT,
        tls="starttls",
        certificate=certificate,
        credentials=(known["username"], known["password"]),
    ) as running:
        yield running


@pytest.fixture(scope="session")
def client(guest: Guest) -> Client:
    """A tenant of the tests' own, without a limit."""
    return Client.of_new_tenant(guest)
