"""Out of the host go only those who must, and only where they must."""

import pytest
from testinfra.host import Host

from tests.host.conftest import RECEIVER_PORT, Place

_CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5)"


def reaches(host: Host, account: str, address: str, port: int) -> bool:
    """Whether a process of that account, in the host's own network, can connect."""
    return bool(host.run("runuser -u %s -- python3 -c %s %s %s", account, _CONNECT, address, str(port)).rc == 0)


def test_the_webhook_sender_reaches_the_receiver(host: Host, place: Place, receiver: object) -> None:
    assert reaches(host, "quern-webhooks", place.gateway, RECEIVER_PORT)


@pytest.mark.parametrize(
    "account", ["quern-api", "quern-batched", "quern-engine", "quern-default", "mongodb", "nginx", "root"]
)
def test_no_other_account_reaches_it(host: Host, place: Place, receiver: object, account: str) -> None:
    assert not reaches(host, account, place.gateway, RECEIVER_PORT)


@pytest.mark.parametrize("account", ["quern-webhooks", "quern-default", "_apt", "root"])
def test_nobody_reaches_the_addresses_of_machine_credentials(host: Host, account: str) -> None:
    before = _refused(host)
    assert not reaches(host, account, "169.254.169.254", 80)
    # Not merely that nobody answers there: the rule counted it.
    assert _refused(host) > before


def _refused(host: Host) -> int:
    rules = host.check_output("nft list chain inet quern output")
    line = next(line for line in rules.splitlines() if "@metadata4" in line)
    return int(line.split("packets ")[1].split()[0])


def test_forwarding_is_refused(host: Host) -> None:
    assert "policy drop" in host.check_output("nft list chain inet quern forward")
